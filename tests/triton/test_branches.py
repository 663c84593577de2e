"""Both exponential forms are reached, and agree; tiles, chunks and boundaries do not show in results."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import gcl_loss, linear, testing
from gcl_kernels.backends import Lines
from gcl_kernels.backends.triton import lines, one_pass, operands
from tests.oracle import DTYPES, NAMES, assert_accurate, everything, run

from .common import build, cases, configs, configurations, triton, using
from .conftest import DEVICE, INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ONE = [c for c in configurations() if c.forward.one_exponential]


def spread_problem(kind: str) -> testing.Batch:
    """Logits whose rows and columns lie near each other, or hundreds of powers of two apart in some tile."""
    g = torch.Generator().manual_seed(1)
    lhs, rhs = torch.randn(70, 8, generator=g), torch.randn(90, 8, generator=g)
    if kind == "one row far above":
        lhs[40], rhs[5] = 12.0, 12.0
    if kind == "one row far below":
        lhs[40, 0], rhs[:, 0] = -300.0, 1.0
    if kind == "one column far below":
        lhs[:, 0], rhs[40, 0] = 1.0, -300.0
    if kind == "all scattered":
        lhs *= torch.linspace(0, 30, 70)[:, None]
    if kind in FAR_GROUPS:  # 300 powers of two above the others among themselves
        group = FAR_GROUPS[kind]
        lhs, rhs = 0.1 * lhs, 0.1 * rhs
        lhs[:, 0], rhs[:, 0] = 0.0, 0.0
        lhs[:group, 0], rhs[:group, 0] = 14.4, 14.4
    options = {"labels": torch.randint(-1, 90, (70,), generator=g).to(DEVICE)}
    scale = torch.tensor(1.0, device=DEVICE)
    return testing.Batch(*(x.to(DEVICE).requires_grad_() for x in (lhs, rhs, scale)), options)


# Rows and columns of a group: whole tiles far above, or far below, the mean of all lines, between which nothing is far.
FAR_GROUPS = {"a small group far above": 32, "a large group far above": 64}
KINDS = ("near", "one row far above", "one row far below", "one column far below", "all scattered")


@pytest.mark.parametrize("kind", [*KINDS, *FAR_GROUPS])
@pytest.mark.parametrize("config", ONE[:2], ids=["descriptors", "pointers"])
def test_both_exponential_forms_agree(kind, config):
    batch = spread_problem(kind)
    forward, backward = (dataclasses.replace(t, one_exponential=False) for t in (config.forward, config.backward))
    for each in (config, dataclasses.replace(config, forward=forward, backward=backward)):
        with using(each):
            assert_accurate(run(triton, batch), batch)


@pytest.mark.skipif(not INTERPRETED, reason="counts calls, which only the interpreter makes")
@pytest.mark.parametrize("kind", KINDS)
def test_both_exponential_forms_are_reached(kind, monkeypatch):
    from gcl_kernels.backends.triton import softmax

    calls = {"logsumexp_parts": 0, "shared_gradient": 0, "gradient_by_line": 0}

    class Counted:
        def __init__(self, name):
            self.name, self.step = name, getattr(softmax, name)

        def __call__(self, *args, **kwargs):
            calls[self.name] += 1
            return self.step(*args, **kwargs)

    for name in calls:
        monkeypatch.setattr(softmax, name, Counted(name))
    with using(ONE[1]):
        run(triton, spread_problem(kind))
    assert (calls["logsumexp_parts"] > 0) == (kind != "near")
    # a row far below the others contributes nothing to any column: the backward need not care
    assert (calls["gradient_by_line"] > 0) == (kind not in ("near", "one row far below"))
    if kind != "all scattered":
        assert calls["shared_gradient"] > 0  # only the tiles that need it take the other form


@pytest.mark.parametrize("sides", [(32, 64), (128, 256)])
def test_lines_know_the_extremes_of_their_tiles(sides):
    """Relative to the middle of the mean row and the mean column; past the end is nothing, and a NaN is not passed over."""
    n, m, log2e = 300, 90, 1 / math.log(2)
    g = torch.Generator().manual_seed(3)
    row, col = (100 * torch.randn(length, generator=g, dtype=torch.float64).to(DEVICE) for length in (n, m))
    statistics = Lines(row, col, torch.zeros(n, 1, dtype=torch.float64, device=DEVICE))
    sampled = [x[torch.arange(128, device=DEVICE) * len(x) // 128] for x in (row, col)]
    middle = sum(x.mean() for x in sampled) / 2
    upstream = Lines(torch.ones_like(row), torch.ones_like(col), None)
    options = {"m": m, "joined": True, "scale": None, "nonzero": False, "entries": False, "sides": sides}
    row_line, col_line, _ = lines.pack(statistics, upstream, None, **options)
    for line, x, side, extreme in ((row_line, row, sides[0], torch.amax), (col_line, col, sides[1], torch.amin)):
        expected = [extreme((x - middle) * log2e, 0) for x in x.split(side)]
        for i, value in enumerate(expected):
            assert line[3, i * side : (i + 1) * side].sub(value).abs().max() <= 1e-4
    row[40] = math.nan
    row_line, _, _ = lines.pack(statistics, upstream, None, **options)
    assert row_line[3, 40 // sides[0] * sides[0]].isnan()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("direction", ["lhs_to_rhs", "rhs_to_lhs"])
@pytest.mark.parametrize("kind", ["near", "one row far below", "one column far below"])
def test_stored_exponentials_are_made_again_where_their_references_are_off(kind, direction, sign, monkeypatch):
    """A line whose logits all lie far below what the norms allow has nothing left of them in float32."""
    batch = spread_problem(kind)
    with torch.no_grad():
        batch.lhs.mul_(sign)
        batch.logit_scale.mul_(sign)
    launched, original = [], one_pass.run

    def run_and_note(kernel, programs, **arguments):
        launched.append((kernel, int(arguments["p_skip"]) if arguments.get("p_skip") is not None else None))
        original(kernel, programs, **arguments)

    monkeypatch.setattr(one_pass, "run", run_and_note)
    monkeypatch.setattr(linear, "LARGEST_DIRECTION", 0)  # below it a loss rather launches little
    with using(ONE[0]):
        actual = run(gcl_loss, batch, directions=direction, backend="triton")
    sweeps = [skip for kernel, skip in launched if skip is not None]
    assert sweeps == [0, int(kind == "near")]
    assert all(kernel != "backward_tile" for kernel, _ in launched)  # no tile is made a second time
    assert_accurate(actual, batch, reference.gcl_loss, names=("loss", *NAMES[3:]), directions=direction)


@given(case=cases(), other=configs, budget=st.sampled_from((2**13, 2**15, 2**18)))
@settings(max_examples=8)
def test_tiles_and_chunks_do_not_show(case, other, budget):
    config, problem = case
    results = []
    for each, limit in ((config, None), (other, budget)):
        with using(each, limit):
            results.append(run(triton, build(problem, torch.float32)))
    # of two float32 results, each as near to the truth as float32 products are
    batch = build(problem, torch.float32)
    exact = testing.in_float64(
        lambda *x: everything(reference.pairwise_logsumexp(*x, **batch.options)), batch.differentiable
    )
    for a, b, o in zip(*results, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * (1 + float(torch.where(o.isinf(), 0, o).abs().max())))


@given(case=cases(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=8)
def test_nothing_past_the_end_is_used(case, dtype):
    """NaN around the inputs, and in every buffer that is handed out uninitialised, changes no bit."""
    config, problem = case
    clean = build(problem, dtype)

    def surround(x):
        """x within a larger buffer of NaN, whose layout the kernels read as it is, or copy."""
        rows, d = x.shape
        outer = torch.full((rows + 130, -(-d // 16) * 16 + 64), math.nan, dtype=dtype, device=DEVICE)
        outer[1 : rows + 1, 16 : 16 + d] = x.detach()
        return outer[1 : rows + 1, 16 : 16 + d].requires_grad_()

    poisoned = dataclasses.replace(clean, lhs=surround(clean.lhs), rhs=surround(clean.rhs))
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    with using(config, 2**15), pytest.MonkeyPatch.context() as patch:
        plain = run(triton, clean)
        patch.setattr(torch.Tensor, "new_empty", new_nan)
        same = run(triton, poisoned)
    for a, b in zip(plain, same, strict=True):
        assert torch.equal(a, b)
        assert not b.isnan().any()


def test_float16_keeps_small_probabilities():
    """A softmax of 1,024 equal logits lies among float16's subnormals once it is divided by N, as a mean does."""
    n, m = 8, 1024
    lhs = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).half().to(DEVICE).requires_grad_()
    rhs = (0.01 * torch.randn(m, 4, generator=torch.Generator().manual_seed(1))).half().to(DEVICE).requires_grad_()
    batch = testing.Batch(lhs, rhs, torch.tensor(1.0, device=DEVICE).requires_grad_(), {})

    def mean(function):
        return lambda *inputs, **options: (function(*inputs, **options).row / 65_536,)

    with using(ONE[-1]):
        drhs = run(mean(triton), batch)[2]
    oracle_drhs = testing.in_float64(mean(reference.pairwise_logsumexp), batch.differentiable)[2]
    rounded = testing.relative_error(oracle_drhs.half(), oracle_drhs)  # the output's own dtype is all that may be lost
    assert testing.relative_error(drhs, oracle_drhs) <= 1.25 * rounded + 1e-3


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision_is_followed(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        seen = operands.input_precision(torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[precision]
    assert seen == (expected if torch.version.hip is None or precision == "highest" else "bf16x3")
