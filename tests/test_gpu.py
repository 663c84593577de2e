"""What only a GPU can show: large odd shapes, more than 2^31 logits, peak memory, no synchronisation, equal bits.

Under `TRITON_INTERPRET=1` the comparisons run on a CPU, at toy sizes, so that they are known to work before they meet a GPU.
"""

import os

import pytest
import torch

import reference
from gcl_kernels import ClipLoss, GCLLoss, backends, pairwise_logsumexp, plan, testing
from gcl_kernels.chips import CHIPS
from tests.oracle import DTYPES, NAMES

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a CUDA or HIP device, or TRITON_INTERPRET=1"),
    pytest.mark.skipif(backends.why_not_triton() is not None, reason="Triton does not work here"),
    # numpy says so when the interpreter computes past an end what is then dropped
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
real_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA or HIP device")


def batch(n, m, d, dtype, scale=100 / 7):
    """Pairs at a cosine around 0.6, as a half-trained model gives them."""
    g = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(k, d, generator=g, device=DEVICE)) for k in (n, m))
    k = min(n, m)
    y[:k] = torch.nn.functional.normalize(0.6 * x[:k] + 0.8 * y[:k])
    return *(v.to(dtype).requires_grad_() for v in (x, y)), torch.tensor(scale, device=DEVICE).requires_grad_()


def in_float64(function, inputs):
    """The oracle without N x M memory: the torch backend, which is as exact as the dense reference in float64."""
    return testing.in_float64(lambda *x: function(*x, backend="torch"), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "ids and labels"])
def test_large_odd_shapes(dtype, masked):
    n, m, d = (20_001, 23_457, 769) if ON_GPU else (37, 53, 19)
    inputs, options = batch(n, m, d, dtype), {}
    if masked:
        g = torch.Generator(DEVICE).manual_seed(1)
        options = {
            name: torch.randint(-1, high, (k, 2), generator=g, device=DEVICE)
            for name, high, k in (("labels", m, n), ("lhs_ids", n // 4, n), ("rhs_ids", n // 4, m))
        }

    def ours(*x, **more):
        return pairwise_logsumexp(*x, **options, **more)

    actual = testing.value_and_gradients(lambda: ours(*inputs, backend="triton"), inputs)
    dense = testing.dense_forms(lambda *x: reference.pairwise_logsumexp(*x, **options), inputs)
    floor = testing.floor(*inputs)
    testing.assert_as_accurate(actual, dense, in_float64(ours, inputs), NAMES, floor)


@real_gpu
def test_more_logits_than_32_bits_count():
    n, m, d = 46_501, 46_499, 64
    assert n * m > 2**31
    inputs = batch(n, m, d, torch.bfloat16)
    labels = torch.arange(n, device=DEVICE).flip(0).clamp(max=m - 1)  # the last rows' positives are the first columns

    def ours(*x, **more):
        return pairwise_logsumexp(*x, labels=labels, **more)

    actual = testing.value_and_gradients(lambda: ours(*inputs, backend="triton"), inputs)
    exact = in_float64(ours, inputs)
    rounding = torch.finfo(torch.bfloat16).eps
    for name, a, b in zip(NAMES, actual, exact, strict=True):
        assert testing.relative_error(a, b) < (1e-5 if name in ("row", "col", "positive") else 2 * rounding), name
        edge = slice(-100, None)  # where an offset that wrapped would show
        assert testing.relative_error(a.reshape(-1)[edge], b.reshape(-1)[edge]) < 4 * rounding, name


@real_gpu
@pytest.mark.parametrize(("n", "d"), [(16_384, 512), (65_536, 768)])
def test_peak_memory_is_the_budget_and_as_predicted(n, d):
    inputs = batch(n, n, d, torch.bfloat16)
    loss = ClipLoss()
    loss(*batch(64, 64, d, torch.bfloat16)).backward()  # libraries have their workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(*inputs).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.grad.nbytes for x in inputs)
    assert extra <= backends.workspace_bytes() + 2 * n * (5 * d + 200)  # accumulators in float32, vectors
    assert extra < 600e6
    predicted = plan.ours(plan.Sizes.of_batch(n, d, "bf16"), CHIPS["h200"]).extra_memory
    if torch.cuda.get_device_capability()[0] == 9:  # whose tiles these are
        assert predicted == pytest.approx(extra, rel=0.15)


def everything(n, m, d):
    """A step that uses what a training run may: fields, a mask, weights, ids, hard negatives."""
    g = torch.Generator(DEVICE).manual_seed(2)
    fields = {
        name: torch.randn(m, d, generator=g, device=DEVICE).bfloat16().requires_grad_() for name in ("image", "title")
    }
    query = torch.randn(n, d, generator=g, device=DEVICE).bfloat16().requires_grad_()
    mask = torch.rand(m, 2, generator=g, device=DEVICE) > 0.2
    scores = torch.randint(1, 100, (n,), generator=g, device=DEVICE)
    ids = torch.randint(-1, n // 4, (m,), generator=g, device=DEVICE)
    scale = torch.tensor(100 / 7, device=DEVICE).requires_grad_()
    criterion = GCLLoss("inverse_sqrt", backend="triton")

    def step():
        loss = criterion(
            {"query": query}, fields, scores, scale, rhs_field_mask=mask, lhs_ids=ids[:n].contiguous(), rhs_ids=ids
        )
        return [loss, *torch.autograd.grad(loss, [query, *fields.values(), scale])]

    return step


def test_same_inputs_same_bits():
    step = everything(4097, 5000, 256) if ON_GPU else everything(17, 33, 16)
    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool(a.isfinite().all()) for a in first)


@real_gpu
def test_a_step_with_everything_never_synchronises():
    step = everything(4097, 5000, 256)
    step()  # compiling may
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@real_gpu
def test_a_step_with_everything_replays_from_a_graph():
    step = everything(1025, 2000, 256)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
