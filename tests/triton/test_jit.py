"""Launches as they are made on a GPU, up to the driver, which here launches nothing.

Ahead-of-time compilation is told types and alignments; here Triton's JIT finds them itself, in the arguments of the launch code.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from gcl_kernels import backends
from gcl_kernels.backends import Lines, Mean, Need, Want
from gcl_kernels.backends import triton as backend
from gcl_kernels.backends.triton import field_kernels, kernels, line_kernels, loss_kernels, strip_kernels
from gcl_kernels.backends.triton.config import FAMILIES
from gcl_kernels.backends.triton.tape import Tape
from gcl_kernels.pairs import Pairs


class Utilities:
    """Of a driver: what loading a kernel and making a descriptor need."""

    def load_binary(self, *_):
        return 1, 1, 128, 0, 1024  # module, function, registers, spills, threads a block

    def get_device_properties(self, _):
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, *_):
        pass


class Launcher:
    launches = 0

    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        Launcher.launches += 1


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _=0):
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for name in TILES + LINES + STRIPS:
        FOUND[name].device_caches.clear()


FOUND = {**vars(kernels), **vars(strip_kernels), **vars(line_kernels), **vars(loss_kernels), **vars(field_kernels)}
TILES = ("forward_tile", "backward_tile")
STRIPS = ("largest_norms", "one_reference", "forward_strips")
LINES = ("merge_partials", "finish_lines", "pack_lines", "inner_products", "sum_parts", "sum_losses", "spread_gradient")
LINES += ("pack_limits",)


def variants(*names):
    """How many times each kernel was compiled."""
    return [len(FOUND[name].device_caches[0][0]) for name in names]


def step(
    n,
    m,
    d=768,
    dtype=torch.bfloat16,
    labels=None,
    channels=None,
    want=(True, True),
    stored=False,
    terms=(),
    with_strips=False,
):
    labels, left, right = (
        torch.zeros(length, k, dtype=torch.int64) if k else None
        for length, k in ((n, labels), (n, channels), (m, channels))
    )
    numbers = {name: torch.zeros(n if name.startswith("lhs") else m) for name in terms}
    pairs = Pairs(
        torch.zeros(n, d, dtype=dtype),
        torch.zeros(m, d, dtype=dtype),
        torch.tensor(1.0),
        labels,
        left,
        right,
        **numbers,
    )
    row, col, positive = (torch.ones(k, dtype=torch.float64) for k in (n, m, (n, pairs.positives)))
    upstream = Lines(row if want[0] else None, col if want[1] else None, positive)
    config = FAMILIES["sm_90"].config(dtype, d, "ieee")
    if with_strips:  # however small the plane
        config = dataclasses.replace(config, strips=dataclasses.replace(config.strips, waves=0))
    with backends.settings(config=config):
        if stored:
            backend.forward_with_gradient(pairs, upstream, Need(True, True, True))
        else:
            backend.backward(pairs, backend.forward(pairs, Want(*want)), upstream, Need(True, True, True))


def loss_of_lines(n, m, labels=None, want=(True, True)):
    row, col, positive = (torch.ones(shape, dtype=torch.float64) for shape in (n, m, (n, 1)))
    lines = Lines(row if want[0] else None, col if want[1] else None, positive)
    labels = None if labels is None else torch.zeros(n, 1, dtype=torch.int64)
    loss = backend.sum_losses(lines, torch.ones(n), True, torch.float32, labels)
    backend.spread_gradient(loss, torch.ones(n), n, m, True, Want(*want), labels)
    return loss


def test_a_ragged_batch_compiles_nothing_new():
    """Tiles as well as lines; where one forward takes several chunks, the parts are merged as they come."""
    for n in (300, 301, 517, 1024, 4097):
        step(n, n + 7)
        loss = loss_of_lines(n, n + 7)
        assert loss.dtype == torch.float32
    assert variants(*TILES, *LINES) == [1, 1, 0, 1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("want", [(True, True), (True, False), (False, True)], ids=str)
def test_ragged_labels_and_limits_compile_nothing_new(want):
    for n in (300, 301, 517, 1024):
        step(n, n + 7, labels=1, terms=("lhs_limit", "rhs_limit"), want=want)
        loss_of_lines(n, n + 7, labels=1, want=want)
    assert variants(*TILES, *LINES) == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"labels": 1},
        {"labels": 3, "channels": 2},
        {"channels": 1},
        {"want": (True, False)},
        {"want": (False, True)},
        {"want": (True, False), "stored": True},
        {"want": (False, True), "stored": True},
        {"terms": ("lhs_limit",)},
        {"terms": ("rhs_limit", "rhs_bias"), "labels": 1, "channels": 1},
        {"terms": ("lhs_limit", "rhs_bias"), "want": (True, False), "stored": True},
        {"d": 256, "dtype": torch.float32},
        {"d": 760, "dtype": torch.float16},
    ],
    ids=str,
)
def test_every_option_passes_the_jit(options):
    before = Launcher.launches
    step(300, 400, **options)
    assert Launcher.launches > before
    assert variants("forward_tile", "merge_partials", "finish_lines") == [
        1,
        *([1, 0] if "stored" in options else [0, 1]),
    ]


@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 768), (torch.float16, 256), (torch.bfloat16, 760)])
def test_strips_compile_once(dtype, d):
    """Over ragged batches, in one chunk of rows and in several; the statistics are finished, and merged, in two ways."""
    for n in (300, 301, 517, 1024):
        step(n, n + 7, d, dtype, with_strips=True)
    with backends.settings(workspace_mib=2**-6):
        step(2100, 2107, d, dtype, with_strips=True)
    assert variants(*STRIPS) == [1, 1, 1]
    assert variants("forward_tile", "merge_partials", "finish_lines") == [1, 2, 4]


def test_launches_say_what_they_are_compiled_with(monkeypatch):
    """Fused multiplications and additions, whatever Triton's default is, and the registers that the table allows a thread."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    step(300, 400, 256)
    loss_of_lines(300, 400)
    step(300, 400, 256, with_strips=True)
    found = {name: [x.metadata for x in FOUND[name].device_caches[0][0].values()] for name in TILES + STRIPS + LINES}
    assert all(x.enable_fp_fusion for each in found.values() for x in each)
    limits = {name: {x.maxnreg for x in found[name]} for name in ("forward_tile", "forward_strips", "backward_tile")}
    assert limits == {"forward_tile": {None}, "forward_strips": {128}, "backward_tile": {None}}


@pytest.mark.parametrize("masked", [False, True])
def test_fields_pass_the_jit(masked):
    for n in (5, 300):
        fields, mask = [torch.zeros(n, 768) for _ in range(2)], torch.ones(n, 2, dtype=torch.bool) if masked else None
        mean = Mean([0.5, 0.5], True, True)
        out, norms = backend.aggregate_fields(fields, mask, mean)
        backend.aggregate_fields_backward(fields, mask, mean, norms, out, [True, False])
    assert variants("aggregate_forward", "aggregate_backward") == [1 + masked, 1 + masked]


def flat(x):
    """Numbers in place of tensors and of descriptors."""
    if isinstance(x, (tuple, list)):
        return [leaf for item in x for leaf in flat(item)]
    if isinstance(x, TensorDescriptor):
        return flat([x.base, tuple(x.shape), tuple(x.strides), tuple(x.block_shape)])
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x]


def test_a_tape_launches_what_the_launch_code_does(monkeypatch):
    """The same compiled kernels with the same numbers; addresses are those of this step's inputs, or of its own memory."""
    launched, steps, kept = [], [], []
    monkeypatch.setattr(Launcher, "__call__", lambda self, *given: launched.append((self, given)))
    with backends.settings(config=FAMILIES["sm_90"].config(torch.bfloat16, 64, "ieee")):
        for _ in range(3):
            lhs, rhs = (torch.zeros(k, 64, dtype=torch.bfloat16) for k in (300, 310))
            inputs = lhs, rhs, torch.tensor(1.0), torch.ones(300)
            kept.append(inputs)  # alive, so that no address is used again
            launched.clear()
            loss, lines, plan = backend.loss_of_pairs(Pairs(*inputs[:3]), inputs[3], Want(True, True), True)
            need = Need(True, True, True)
            backend.loss_of_pairs_backward(loss, Pairs(*inputs[:3]), inputs[3], lines, need, True, plan)
            own = {x.data_ptr(): i for i, x in enumerate(inputs)}
            # the seventh is what a profiler is told
            steps.append([(kernel, flat([*given[:6], *given[7:]]), own) for kernel, given in launched])
    assert plan is not None
    assert all(isinstance(tape, Tape) for tape in plan[0].tapes.values())
    assert [len(step) for step in steps] == [8, 8, 8]
    for launch, recorded, repeated in zip(*steps, strict=True):
        for kernel, given, own in (recorded, repeated):
            assert kernel is launch[0]
            for x, expected in zip(given, launch[1], strict=True):
                if isinstance(expected, int) and expected > 2**32:
                    assert own.get(x) == launch[2].get(expected)
                    assert x % 16 == expected % 16
                else:
                    assert x is expected or x == expected
