"""Gradient caching gives the gradients of encoding the whole batch at once."""

import contextlib
import subprocess
import sys
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from gcl_kernels import gcl_loss, grad_cache, testing


class Encoder(nn.Module):
    """Dropout, keyword arguments, nests of tensors, options that are no tensors, several results."""

    def __init__(self, dtype=torch.float64, dropout=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 40, dtype=dtype), nn.Linear(40, 8, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, fields, *, mask=None, gain=1.0):
        def encode(x):
            hidden = self.dropout(torch.tanh(self.first(gain * x)))
            return self.second(hidden if mask is None else hidden * mask)

        results = {name: encode(x) for name, x in fields.items()}
        return {"features": (results["query"], results["title"]), "logit_scale": self.logit_scale.exp()}


def batch(n=23, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    fields = UserDict({k: torch.randn(n, 6, generator=g, dtype=dtype) for k in ("query", "title")})
    return fields, {"mask": torch.rand(n, 1, generator=g, dtype=dtype), "gain": 2.0}


def micro_batches_one_by_one(encoder, size):
    """What caching must equal: the same micro-batches, all their graphs alive at once."""

    def encode(fields, mask, gain):
        parts = [
            encoder({k: x[i : i + size] for k, x in fields.items()}, mask=mask[i : i + size], gain=gain)
            for i in range(0, len(mask), size)
        ]
        features = tuple(torch.cat(x) for x in zip(*(p["features"] for p in parts), strict=True))
        return {"features": features, "logit_scale": parts[0]["logit_scale"]}

    return encode


def loss_and_gradients(model, encode, inputs, autocast=None, scaler=None):
    model.zero_grad()
    torch.manual_seed(7)
    fields, options = inputs
    # without the cache, for weights that are cast once add their gradients up in bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
        out = encode(fields, **options)
        loss = gcl_loss(*out["features"], out["logit_scale"])
    torch.rand(3)  # as another encoder would draw
    (loss if scaler is None else scaler.scale(loss)).backward()
    after = torch.rand(3)  # the random state goes on as without caching
    return [loss.detach(), *(p.grad for p in model.parameters()), after]


@pytest.mark.parametrize("size", [1, 5, 23, 100])
def test_gradients_are_those_without_caching_dropout_on(size):
    model, inputs = Encoder(), batch()
    expected = loss_and_gradients(model, micro_batches_one_by_one(model, size), inputs)
    actual = loss_and_gradients(model, grad_cache.cached(model, size), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_one_pass_dropout_off():
    model, (fields, options) = Encoder(dropout=0.0), batch()
    expected = loss_and_gradients(model, model, (fields, options))
    actual = loss_and_gradients(model, grad_cache.cached(model, 4), (fields, options))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("autocast", [None, True])
def test_float32_and_autocast_with_a_scaler(autocast):
    """To rounding the same: dropout masks depend on the dtype, so there is no float64 oracle."""
    model = Encoder().float()
    inputs = batch()
    fields = {k: x.float() for k, x in inputs[0].items()}
    options = {"mask": inputs[1]["mask"].float(), "gain": 2.0}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if autocast else None

    def run(encode):
        got = loss_and_gradients(model, encode, (fields, options), autocast, scaler)
        scale = 1.0 if scaler is None else scaler.get_scale()
        return [got[0], *(g / scale for g in got[1:-1])]

    dense, actual = run(micro_batches_one_by_one(model, 5)), run(grad_cache.cached(model, 5))
    for a, d in zip(actual, dense, strict=True):
        assert testing.relative_error(a, d) < 1e-6


def test_training_in_float16_with_a_scaler_that_skips_the_first_steps():
    fields, options = batch(dtype=torch.float32)

    def trained(wrap):
        model = Encoder(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28, backoff_factor=2.0**-8)
        scales = []
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                out = wrap(model)(fields, **options)
                loss = gcl_loss(*out["features"], out["logit_scale"])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, [p.detach() for p in model.parameters()]

    scales, expected = trained(lambda model: micro_batches_one_by_one(model, 5))
    assert scales[0] == 2.0**20 > scales[-2] == scales[-1]  # skipped, then not
    assert not torch.equal(expected[0], Encoder(torch.float32).first.weight)
    actual_scales, actual = trained(lambda model: grad_cache.cached(model, 5))
    assert actual_scales == scales
    for a, e in zip(actual, expected, strict=True):
        assert testing.relative_error(a, e) < 1e-6


def test_a_backward_inside_autocast_does_not_reuse_weights_cast_without_a_graph():
    model = Encoder(torch.float32)
    fields = {k: x.float() for k, x in batch()[0].items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = grad_cache.cached(model, 5)(fields)
        gcl_loss(*out["features"], out["logit_scale"]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_several_encoders_and_a_parameter_outside():
    left, right, scale = Encoder(), Encoder(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (fields, _), parameters = batch(), []

    def run(wrap):
        torch.manual_seed(3)
        x, y = wrap(left)(fields)["features"][0], wrap(right)(fields)["features"][1]
        loss = gcl_loss(x, y, scale)
        parameters[:] = [p for m in (left, right) for p in (*m.first.parameters(), *m.second.parameters())]
        for p in (*parameters, scale):
            p.grad = None
        loss.backward()
        return [loss.detach(), scale.grad.clone(), *(p.grad.clone() for p in parameters)]

    for a, e in zip(run(lambda m: grad_cache.cached(m, 23)), run(lambda m: m), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_only_one_micro_batch_has_a_graph_at_a_time():
    live, most = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal live, most
            live, most = live + len(x), max(most, live + len(x))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            nonlocal live
            live -= len(g)
            return g

    layer = nn.Linear(6, 4)

    def encoder(x):
        y = layer(x)
        return Counted.apply(y) if y.requires_grad else y

    x = grad_cache.cached(encoder, 5)(torch.randn(23, 6))
    assert live == 0
    gcl_loss(x, torch.randn(23, 4), 1.0).backward()
    assert (live, most) == (0, 5)


def test_gradients_are_averaged_over_ranks_with_the_last_micro_batch_only():
    """DistributedDataParallel decides for it in a forward, by whether that is inside `no_sync`."""

    class Averaged(nn.Linear):
        syncs, synced = True, ()

        @contextlib.contextmanager
        def no_sync(self):
            self.syncs = False
            yield
            self.syncs = True

        def forward(self, x):
            if torch.is_grad_enabled():
                self.synced += (self.syncs,)
            return super().forward(x)

    model = Averaged(6, 4)
    gcl_loss(grad_cache.cached(model, 4)(torch.randn(9, 6)), torch.randn(9, 4), 1.0).backward()
    assert model.synced == (False, False, True)


def test_a_named_tuple_stays_one():
    class Pair(NamedTuple):
        double: torch.Tensor
        names: list

    x = torch.randn(9, 6)
    pair = grad_cache.cached(lambda x: Pair(2 * x, ["a", x + 1]), 4)(x)
    assert torch.equal(pair.double, 2 * x)
    assert torch.equal(pair.names[1], x + 1)


def test_a_frozen_encoder_and_no_grad():
    model = nn.Linear(6, 4).requires_grad_(False)
    other = nn.Linear(6, 4)
    x = torch.randn(9, 6)
    gcl_loss(grad_cache.cached(model, 4)(x), grad_cache.cached(other, 4)(x), 1.0).backward()
    assert model.weight.grad is None
    assert other.weight.grad.any()
    with torch.no_grad():
        y = grad_cache.cached(other, 4)(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, other(x).detach())


def test_results_without_gradient():
    """Whole numbers, and results the loss does not use."""
    layer = nn.Linear(6, 4)

    def encoder(x):
        return layer(x), x.argmax(dim=1), layer(2 * x)

    y, top, _ = grad_cache.cached(encoder, 4)(x := torch.randn(9, 6))
    assert torch.equal(top, x.argmax(dim=1))
    assert not top.requires_grad
    gcl_loss(y, torch.randn(9, 4), 1.0).backward()
    assert layer.weight.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 6), torch.zeros(3, 6)), r"encoder: expected .* one batch size .*, got {'args\[0\]': 4, 'args\[1\]': 3}"),
        ((torch.zeros(0, 6),), r"encoder: expected .* one batch size >= 1, got {'args\[0\]': 0}"),
        ((["a", "b"],), r"encoder: expected .* one batch size >= 1, got {}"),
        ((torch.zeros(4, 6, requires_grad=True),), r"args\[0\]: expected a tensor without gradient"),
    ],
)  # fmt: skip
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        grad_cache.cached(lambda x, *_: x, 2)(*arguments)


def test_results_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"result: expected \(2, ...\) from encoder for a micro-batch of 2, got \(1, 6\)"
    ):
        grad_cache.cached(lambda x: x.mean(dim=0, keepdim=True), 2)(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="micro_batch_size: expected an integer >= 1, got 0"):
        grad_cache.cached(len, 0)
    with pytest.raises(TypeError, match="encoder: expected a callable, got int"):
        grad_cache.cached(3, 1)


MEMORY = """
import torch
from gcl_kernels import gcl_loss, grad_cache
from gcl_kernels.training.memory import peak_memory, reset_peak_memory
cpu = torch.device("cpu")
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256), torch.nn.GELU()] * 30, torch.nn.Linear(256, 16))
encode = grad_cache.cached(model, 512)
def step(n):
    gcl_loss(encode(torch.randn(n, 256)), torch.randn(n, 16), 10.0).backward()
step(64)
reset_peak_memory(cpu)
before = peak_memory(cpu)
for n in (512, 4096):
    step(n)
    print(peak_memory(cpu) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory can be reset on Linux only")
def test_memory_is_that_of_a_micro_batch():
    """8 times the batch: its inputs (4 MiB) and embeddings more, not 8 times the activations (30 MiB a micro-batch)."""
    environment = {"GCL_KERNELS_WORKSPACE_MIB": "8", "PATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, check=True)
    small, large = map(int, run.stdout.split())
    assert 20 * 2**20 < small <= large < 2 * small
