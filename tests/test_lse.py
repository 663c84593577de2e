"""pairwise_logsumexp against the float64 reference, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from gcl_kernels import backends, pairwise_logsumexp, testing
from gcl_kernels.backends import torch_chunked

NAMES = ("row", "col", "positive", "dlhs", "drhs", "dscale")
tiles = st.tuples(st.sampled_from((1, 7, 16, 64, 200)), st.sampled_from((1, 5, 16, 64, 200)))


def run(function, batch: testing.Batch):
    return testing.value_and_gradients(
        lambda: function(batch.lhs, batch.rhs, batch.logit_scale, **batch.options), batch.differentiable
    )


# Equivalent ways to write scale * lhs @ rhs.T: (lhs, rhs, scale) -> (lhs, rhs, scale)
def as_given(lhs, rhs, scale):
    return lhs, rhs, scale


def scale_first(lhs, rhs, scale):
    return (scale * lhs.to(scale.dtype)).to(lhs.dtype), rhs, torch.ones_like(scale)


def scale_second(lhs, rhs, scale):
    return lhs, (scale * rhs.to(scale.dtype)).to(rhs.dtype), torch.ones_like(scale)


def scale_both(lhs, rhs, scale):
    share = scale.detach().clamp(min=1e-9) ** 0.4
    return share.to(lhs.dtype) * lhs, (scale / share).to(rhs.dtype) * rhs, torch.ones_like(scale)


DENSE_FORMS = (as_given, scale_first, scale_second, scale_both)


def accuracy_floor(problem, batch, dscale):
    """The rule's floor; where a few logits decide the result, a few float32 roundings more: of the largest logit, and of the
    largest term of dscale, one number, whose few terms may cancel.

    The rule compares errors that average over many roundings. A handful of logits, or one near-tie in a trained batch, can
    come out exact by luck in one float32 evaluation and one rounding off in an equally good one.
    """
    if problem.n * problem.m >= 1000 and problem.d >= 7 and problem.geometry != "paired":
        return 1e-6
    with torch.no_grad():
        largest = float((batch.lhs.float() @ batch.rhs.float().T).abs().max())
    roundings = 4 * torch.finfo(torch.float32).eps * largest
    scale, dscale = float(batch.logit_scale.detach()), abs(float(dscale.detach()))
    cancelled = min(roundings / dscale, 1e-4) if dscale > 0 else 0.0
    return 1e-6 + roundings * scale + cancelled


def small_tiles(monkeypatch, tile):
    monkeypatch.setattr(torch_chunked, "default_tile", lambda *_: tile)


@given(problem=testing.problems(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), tile=tiles)
@settings(max_examples=2 * settings.default.max_examples)
def test_as_accurate_as_dense_pytorch(problem, dtype, tile):
    batch = problem.build(dtype)
    exact = testing.Batch(*(x.detach().double().requires_grad_() for x in batch.differentiable), batch.options)
    oracle = run(reference.pairwise_logsumexp, exact)
    dense = [run(lambda *a, f=form, **k: reference.pairwise_logsumexp(*f(*a), **k), batch) for form in DENSE_FORMS]
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, tile)
        actual = run(pairwise_logsumexp, batch)
    assert [v.dtype for v in actual] == [torch.float32] * 3 + [dtype] * 2 + [torch.float32]
    testing.assert_as_accurate(actual, dense, oracle, NAMES, floor=accuracy_floor(problem, batch, oracle[-1]))


@given(problem=testing.problems(), tile=tiles)
def test_float64_to_the_last_digits(problem, tile):
    batch = problem.build(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, tile)
        actual = run(pairwise_logsumexp, batch)
    oracle = run(reference.pairwise_logsumexp, batch)
    assert all(v.dtype == torch.float64 for v in actual)
    testing.assert_as_accurate(actual, [oracle], oracle, NAMES, floor=1e-12)


@given(
    problem=testing.problems(
        sizes=(1, 2, 3, 5), dims=(1, 3), scales=(1.0, 3.0), geometries=("random", "paired", "clustered")
    )
)
@settings(max_examples=20)
def test_gradcheck(problem):
    batch = problem.build(torch.float64)

    def visible_outputs(*inputs):
        return tuple(torch.where(v.isinf(), 0.0, v) for v in pairwise_logsumexp(*inputs, **batch.options))

    assert torch.autograd.gradcheck(visible_outputs, batch.differentiable)


@given(problem=testing.problems(labels=False))
def test_swapping_the_sides_swaps_row_and_col(problem):
    batch = problem.build(torch.float64)
    ids = batch.options
    swapped_ids = {"lhs_ids": ids["rhs_ids"], "rhs_ids": ids["lhs_ids"]} if ids else {}
    # the diagonal pair is labelled from whichever side has a row for it
    labels = torch.arange(problem.m).where(torch.arange(problem.m) < problem.n, -1)
    one = pairwise_logsumexp(*batch.differentiable, **ids)
    other = pairwise_logsumexp(batch.rhs, batch.lhs, batch.logit_scale, labels=labels, **swapped_ids)
    torch.testing.assert_close(one.row, other.col)
    torch.testing.assert_close(one.col, other.row)
    torch.testing.assert_close(one.positive, other.positive[: problem.n])


@given(problem=testing.problems(), seed=st.integers(0, 99))
def test_permuting_rows_and_columns_permutes_results(problem, seed):
    batch = problem.build(torch.float64)
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(problem.n, generator=g), torch.randperm(problem.m, generator=g)
    new_column = torch.empty_like(j).scatter_(0, j, torch.arange(problem.m))
    labels = batch.options.get("labels", torch.arange(problem.n))
    moved = {
        "labels": torch.where(labels >= 0, new_column[labels.clamp(min=0)], -1)[i],
        **{k: batch.options[k][order] for k, order in (("lhs_ids", i), ("rhs_ids", j)) if k in batch.options},
    }
    plain = pairwise_logsumexp(*batch.differentiable, **batch.options)
    permuted = pairwise_logsumexp(batch.lhs[i], batch.rhs[j], batch.logit_scale, **moved)
    torch.testing.assert_close(permuted.row, plain.row[i])
    torch.testing.assert_close(permuted.col, plain.col[j])
    torch.testing.assert_close(permuted.positive, plain.positive[i])


@given(problem=testing.problems(), one=tiles, other=tiles)
def test_tile_size_does_not_matter(problem, one, other):
    results = []
    for tile in (one, other):
        with pytest.MonkeyPatch.context() as patch:
            small_tiles(patch, tile)
            results.append(run(pairwise_logsumexp, problem.build(torch.float64)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(problem=testing.problems(ids=False, scales=(0.0,)))
def test_scale_zero_gives_log_m(problem):
    batch = problem.build(torch.float32)
    row, col, positive = pairwise_logsumexp(*batch.differentiable, **batch.options)
    torch.testing.assert_close(row, torch.full_like(row, math.log(problem.m)))
    torch.testing.assert_close(col, torch.full_like(col, math.log(problem.n)))
    assert not positive.any()


@given(
    problem=testing.problems(
        labels=False, ids=False, sizes=(2, 3, 16, 33), scales=(0.0, 1.0), geometries=("random", "paired")
    )
)
def test_a_duplicate_with_ids_behaves_as_if_removed(problem):
    batch = problem.build(torch.float64)
    n, m = problem.n, problem.m
    # document m is a copy of document 0 under a second column; its id hides it from query 0, whose positive is document 0
    rhs = torch.cat([batch.rhs, batch.rhs[:1]])
    lhs_ids, rhs_ids = torch.arange(n), torch.cat([torch.arange(m), torch.zeros(1, dtype=torch.int64)])
    twice = pairwise_logsumexp(batch.lhs, rhs, batch.logit_scale, lhs_ids=lhs_ids, rhs_ids=rhs_ids)
    once = pairwise_logsumexp(*batch.differentiable)
    torch.testing.assert_close(twice.row[0], once.row[0])
    torch.testing.assert_close(twice.col[:m], once.col)
    assert bool((twice.row[1:] > once.row[1:]).all())  # to the others it is one more negative


@given(problem=testing.problems(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_the_positive_never_exceeds_its_logsumexp(problem, dtype):
    batch = problem.build(dtype)
    row, col, positive = pairwise_logsumexp(*batch.differentiable, **batch.options)
    labels = batch.options.get("labels", torch.arange(problem.n)).reshape(problem.n, -1)
    positive, labelled = positive.reshape(labels.shape), labels >= 0
    one_rounding = torch.finfo(positive.dtype).eps * positive.abs().clamp(min=1)
    for lse in (row[:, None], col[labels.clamp(min=0)]):
        assert bool(((lse - positive >= -one_rounding) | ~labelled).all())


@given(
    problem=testing.problems(sizes=(2, 3, 17, 65)),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    data=st.data(),
)
def test_what_is_not_finite_never_passes_as_finite(problem, value, data):
    """The rule: a result is non-finite wherever the dense reference's is, so nothing that depends on a NaN looks sound."""
    batch = problem.build(torch.float32)
    side = data.draw(st.sampled_from((batch.lhs, batch.rhs)))
    with torch.no_grad():
        side[data.draw(st.integers(0, side.shape[0] - 1)), 0] = value
    visible = {k: v for k, v in batch.options.items() if k == "labels"}  # ids give -inf, which is no fault
    batch = testing.Batch(*batch.differentiable, visible)
    actual, dense = run(pairwise_logsumexp, batch), run(reference.pairwise_logsumexp, batch)
    for name, a, d in zip(NAMES, actual, dense, strict=True):
        assert bool((d.isfinite() | ~a.isfinite()).all()), name


def test_one_direction_keeps_a_bad_row_to_itself():
    from gcl_kernels import gcl_loss

    lhs, rhs = torch.randn(40, 8), torch.randn(50, 8)
    good = lhs.clone().requires_grad_()
    gcl_loss(good, rhs, 5.0, directions="lhs_to_rhs", reduction="none")[1:].sum().backward()
    lhs[0] = math.nan
    bad = lhs.requires_grad_()
    loss = gcl_loss(bad, rhs, 5.0, directions="lhs_to_rhs", reduction="none")
    loss[1:].sum().backward()
    assert loss[0].isnan()
    assert bad.grad is not None
    assert good.grad is not None
    torch.testing.assert_close(bad.grad[1:], good.grad[1:])


@given(problem=testing.problems())
def test_same_inputs_same_bits(problem):
    first, second = (run(pairwise_logsumexp, problem.build(torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("unsafe_scale", [False, True])
def test_both_exponential_forms_are_reached_and_agree(unsafe_scale, monkeypatch):
    """Rows far above columns' logsumexp (by over 100 powers of two) must take two exponentials; others need not."""
    lhs, rhs = torch.randn(70, 4, dtype=torch.float64), torch.randn(90, 4, dtype=torch.float64)
    if unsafe_scale:
        lhs[0], rhs[0] = 30.0, 30.0
    options = {"labels": torch.full((70,), -1)}
    batch = testing.Batch(
        lhs.requires_grad_(), rhs.requires_grad_(), torch.tensor(1.0).double().requires_grad_(), options
    )
    attempts = []
    original = torch_chunked.shared_logsumexp2_
    monkeypatch.setattr(
        torch_chunked, "shared_logsumexp2_", lambda *arguments: attempts.append(original(*arguments)) or attempts[-1]
    )
    fast = run(pairwise_logsumexp, batch)
    assert (attempts[0] is None) == unsafe_scale
    monkeypatch.setattr(torch_chunked, "SAFE_SPREAD", -math.inf)
    for a, b in zip(fast, run(pairwise_logsumexp, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Products(TorchDispatchMode):
    """FLOPs of matrix products, those into a given tensor too; a product over two columns is no logits."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            inner = args[0 if name == "mm" else 1].shape[1]
            self.flops += 2 * result.numel() * inner if inner > 2 else 0
        return result


class LargestTensor(TorchDispatchMode):
    numel = nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel, self.nbytes = max(self.numel, x.numel()), max(self.nbytes, x.nbytes)
        return result


def both_passes(lhs, rhs, lhs_ids=None, rhs_ids=None, need=(True, True, True), want=(True, True), tile=(32, 48)):
    """The backend itself: the operators around it hide its work from PyTorch's counters."""
    inputs = (lhs, rhs, torch.tensor(10.0), None, lhs_ids, rhs_ids)
    row, col, positive = torch_chunked.forward(*inputs, *want, tile)
    if any(need):
        g = torch.ones_like(row) if want[0] else None, torch.ones_like(col) if want[1] else None
        torch_chunked.backward(*inputs, row, col, positive, *g, -2 * torch.ones_like(positive), *need, tile)


def assert_rounded_last(backend, lhs, rhs):
    """The gradients asked for in float32 are the numbers that are rounded to the inputs' dtype otherwise."""
    inputs = lhs, rhs, torch.tensor(3.0, device=lhs.device), None, None, None
    row, col, positive = backend.forward(*inputs, True, True)
    upstream = torch.ones_like(row), torch.ones_like(col), -2 * torch.ones_like(positive)
    arguments = *inputs, row, col, positive, *upstream, True, True, True
    rounded, wide = backend.backward(*arguments), backend.backward(*arguments, dtype=torch.float32)
    for r, w in zip(rounded[:2], wide[:2], strict=True):
        assert (r.dtype, w.dtype) == (lhs.dtype, torch.float32)
        assert torch.equal(r, w.to(lhs.dtype))
        assert not torch.equal(r.float(), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_float32_of_half_precision(dtype):
    assert_rounded_last(torch_chunked, torch.randn(40, 8).to(dtype), torch.randn(50, 8).to(dtype))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_n_by_m_tensor_is_ever_made(ids, dtype):
    n, m, d = 300, 400, 8
    options = {"lhs_ids": torch.arange(n)[:, None], "rhs_ids": torch.arange(m)[:, None] % 7} if ids else {}
    with LargestTensor() as largest:
        both_passes(torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype), **options)
    assert largest.numel == m * d  # an input's own size; a tile is 32 x 48


@pytest.mark.parametrize(
    ("need", "want", "units"),
    [
        ((True, True, True), (True, True), 8),
        ((True, False, False), (True, True), 6),
        ((False, True, True), (True, True), 6),
        ((False, False, True), (True, True), 6),
        ((False, False, False), (True, True), 2),
        ((True, True, True), (True, False), 8),
    ],
)
def test_nothing_is_computed_for_a_frozen_side(need, want, units):
    n, m, d = 64, 96, 32
    lhs, rhs = torch.randn(n, d), torch.randn(m, d)
    lhs, rhs = lhs / lhs.norm(dim=1, keepdim=True), rhs / rhs.norm(dim=1, keepdim=True)
    with Products() as products:
        both_passes(lhs, rhs, need=need, want=want)
    assert products.flops == units * n * m * d


def test_no_gradient_work_under_no_grad(monkeypatch):
    lhs, rhs = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    monkeypatch.setattr(torch_chunked, "backward", None)
    with torch.no_grad():
        result = pairwise_logsumexp(lhs, rhs, 1.0)
    assert not any(v.requires_grad for v in result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed_as_matmul_follows_it(dtype):
    lhs, rhs = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        row, col, positive = pairwise_logsumexp(lhs, rhs, 3.0)
        mixed = pairwise_logsumexp(lhs, rhs.to(dtype), 3.0)
    expected = pairwise_logsumexp(lhs.to(dtype), rhs.to(dtype), 3.0)
    for a, b, c in zip((row, col, positive), expected, mixed, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    row.sum().backward()
    assert lhs.grad is not None
    assert lhs.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert pairwise_logsumexp(lhs.double(), rhs.double(), 3.0).row.dtype == torch.float64


def test_a_second_backward_through_the_gradient_is_refused():
    lhs, rhs = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    (gradient,) = torch.autograd.grad(pairwise_logsumexp(lhs, rhs, 1.0).row.sum(), lhs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_the_operators_pass_opcheck():
    lhs, rhs, scale = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True), torch.tensor(2.0)
    ids = torch.randint(0, 3, (5, 2)), torch.randint(0, 3, (7, 2))
    for labels, (lhs_ids, rhs_ids) in ((None, (None, None)), (torch.randint(-1, 7, (5, 2)), ids)):
        inputs = lhs, rhs, scale, labels, lhs_ids, rhs_ids
        arguments = *inputs, [True, True], None, None, None, [True, True, False], "torch"
        torch.library.opcheck(torch.ops.gcl_kernels.pairwise_logsumexp.default, arguments)


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_compiles_to_one_graph(directions):
    from gcl_kernels import gcl_loss

    encoder = torch.nn.Linear(6, 4)

    def loss(x, y, scale):
        return gcl_loss(encoder(x), encoder(y), scale, directions=directions, label_smoothing=0.1)

    x, y, scale = torch.randn(9, 6), torch.randn(9, 6), torch.tensor(2.0, requires_grad=True)
    expected = torch.autograd.grad(loss(x, y, scale), [scale, *encoder.parameters()])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    actual = torch.autograd.grad(compiled(x, y, scale), [scale, *encoder.parameters()])
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


def test_the_default_backend_follows_device_and_dtype(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_triton in (False, True):
        monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
        assert backends.choose(None, cpu, torch.float32) == "torch"
        assert backends.choose(None, cuda, torch.bfloat16) == ("triton" if has_triton else "torch")
        assert backends.choose(None, cuda, torch.float64) == "torch"
