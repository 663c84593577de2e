"""pairwise_logsumexp against the float64 reference, and its properties."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import backends, gcl_loss, ops, pairwise_logsumexp, testing
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.backends import torch as torch_backend
from gcl_kernels.backends.torch import softmax
from gcl_kernels.pairs import OPTIONAL, Pairs
from tests.oracle import DTYPES, NAMES, assert_accurate, bias_of_logits, run

tiles = st.tuples(st.sampled_from((1, 7, 16, 64, 200)), st.sampled_from((1, 5, 16, 64, 200)))


@given(problem=testing.problems(terms=True), dtype=st.sampled_from(DTYPES), tile=tiles)
@settings(max_examples=2 * settings.default.max_examples)
def test_as_accurate_as_dense_pytorch(problem, dtype, tile):
    batch = problem.build(dtype)
    with backends.settings(tile=tile):
        actual = run(pairwise_logsumexp, batch)
    assert [v.dtype for v in actual] == [torch.float64] * 3 + [dtype] * 2 + [torch.float32]
    assert_accurate(actual, batch)


@given(problem=testing.problems(terms=True), dtype=st.sampled_from(DTYPES), tile=st.one_of(st.none(), tiles))
def test_as_accurate_on_a_device_whose_numbers_are_not_read(problem, dtype, tile):
    """Two exponentials always, tiles of whole lines by default, sums of positives in integers, half-precision operands."""
    batch = problem.build(dtype)
    with backends.settings(tile=tile, host_reads=False, workspace_mib=0.1):
        actual = run(pairwise_logsumexp, batch)
    assert_accurate(actual, batch)


def test_the_scale_is_not_rounded():
    assert abs(bias_of_logits(pairwise_logsumexp)) < 4e-8


def test_a_column_that_only_a_row_far_below_sees():
    """A row many powers of two below the others in its first tile, and not as far in one later column, where no other counts:
    the factor between its reference and theirs is below what float32 holds in full, 2^-126."""
    x, y = torch.zeros(40, 2), torch.zeros(40, 2)
    x[1, 0], y[:, 0], y[20, 0] = 1.0, -140.4 * math.log(2), -30 * math.log(2)
    ids = torch.arange(40)
    options = {
        "labels": torch.full((40,), -1),
        "lhs_ids": torch.where(ids == 1, -1, 7),
        "rhs_ids": torch.where(ids == 20, 7, -1),
    }
    with backends.settings(tile=(40, 16)):
        col = pairwise_logsumexp(x, y, 1.0, **options).col
    torch.testing.assert_close(col[20], y[20, 0].double())


@given(problem=testing.problems(terms=True), tile=tiles)
def test_float64_to_the_last_digits(problem, tile):
    batch = problem.build(torch.float64)
    with backends.settings(tile=tile):
        actual = run(pairwise_logsumexp, batch)
    assert all(v.dtype == torch.float64 for v in actual)
    assert_accurate(actual, batch)


@given(problem=testing.problems(terms=True), tile=st.one_of(st.none(), tiles))
def test_float64_on_a_device_whose_numbers_are_not_read(problem, tile):
    """Where a column has several positives, they are added up in units of 2^-40."""
    batch = problem.build(torch.float64)
    with backends.settings(tile=tile, host_reads=False, workspace_mib=0.1):
        actual = run(pairwise_logsumexp, batch)
    for a, o in zip(actual, run(reference.pairwise_logsumexp, batch), strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10)


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


@given(problem=testing.problems(labels=False), limits=st.booleans())
def test_swapping_the_sides_swaps_row_and_col(problem, limits):
    batch = dataclasses.replace(problem, limits=limits).build(torch.float64)
    ids = batch.options
    other_side = {"lhs": "rhs", "rhs": "lhs"}
    swapped_ids = {f"{other_side[name[:3]]}{name[3:]}": x for name, x in ids.items()}
    # the diagonal pair is labelled from whichever side has a row for it
    labels = torch.arange(problem.m).where(torch.arange(problem.m) < problem.n, -1)
    one = pairwise_logsumexp(*batch.differentiable, **ids)
    other = pairwise_logsumexp(batch.rhs, batch.lhs, batch.logit_scale, labels=labels, **swapped_ids)
    torch.testing.assert_close(one.row, other.col)
    torch.testing.assert_close(one.col, other.row)
    torch.testing.assert_close(one.positive, other.positive[: problem.n])


@given(problem=testing.problems(terms=True), seed=st.integers(0, 99))
def test_permuting_rows_and_columns_permutes_results(problem, seed):
    batch = problem.build(torch.float64)
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randperm(problem.n, generator=g), torch.randperm(problem.m, generator=g)
    new_column = torch.empty_like(j).scatter_(0, j, torch.arange(problem.m))
    labels = batch.options.get("labels", torch.arange(problem.n))
    moved = {
        "labels": torch.where(labels >= 0, new_column[labels.clamp(min=0)], -1)[i],
        **{k: v[i if OPTIONAL[k][0] == "rows" else j] for k, v in batch.options.items() if k != "labels"},
    }
    plain = pairwise_logsumexp(*batch.differentiable, **batch.options)
    permuted = pairwise_logsumexp(batch.lhs[i], batch.rhs[j], batch.logit_scale, **moved)
    torch.testing.assert_close(permuted.row, plain.row[i])
    torch.testing.assert_close(permuted.col, plain.col[j])
    torch.testing.assert_close(permuted.positive, plain.positive[i])


@given(problem=testing.problems(terms=True), one=tiles, other=tiles)
def test_tile_size_does_not_matter(problem, one, other):
    results = []
    for tile in (one, other):
        with backends.settings(tile=tile):
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


@given(problem=testing.problems(terms=True), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
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
    original = softmax.shared_logsumexp2_
    monkeypatch.setattr(
        softmax, "shared_logsumexp2_", lambda *arguments: attempts.append(original(*arguments)) or attempts[-1]
    )
    fast = run(pairwise_logsumexp, batch)
    assert (attempts[0] is None) == unsafe_scale
    monkeypatch.setattr(softmax, "SAFE_SPREAD", -math.inf)
    for a, b in zip(fast, run(pairwise_logsumexp, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_followed_as_matmul_follows_it(dtype):
    lhs, rhs = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.autocast("cpu", dtype):
        row, col, positive = pairwise_logsumexp(lhs, rhs, 3.0)
        mixed = pairwise_logsumexp(lhs, rhs.to(dtype), 3.0)
    expected = pairwise_logsumexp(lhs.to(dtype), rhs.to(dtype), 3.0)
    for a, b, c in zip((row, col, positive), expected, mixed, strict=True):
        assert a.dtype == torch.float64
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
    ids = {"lhs_ids": torch.randint(0, 3, (5, 2)), "rhs_ids": torch.randint(0, 3, (7, 2))}
    numbers = {"lhs_limit": torch.rand(5), "rhs_limit": torch.rand(7), "rhs_bias": torch.rand(7)}
    call = ops.Call(Want(True, True), Need(True, True, False), "torch")
    for more in ({}, {"labels": torch.randint(-1, 7, (5, 2)), **ids, **numbers}):
        torch.library.opcheck(ops._forward, ops.arguments(Pairs.of(lhs, rhs, scale, **more), None, call))
    g = Lines(*(torch.rand(shape, dtype=torch.float64) for shape in (5, 7, (5, 1))))
    known = ops.arguments(Pairs.of(lhs.detach(), rhs.detach(), scale), g, call)
    torch.library.opcheck(ops._forward, known, test_utils=("test_schema", "test_faketensor"))
    statistics = [v.detach() for v in ops._forward(*known)[:3]]
    torch.library.opcheck(ops._backward, (*known, *statistics))


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_compiles_to_one_graph(directions):
    encoder = torch.nn.Linear(6, 4)

    def loss(x, y, scale):
        return gcl_loss(encoder(x), encoder(y), scale, directions=directions, label_smoothing=0.1)

    x, y, scale = torch.randn(9, 6), torch.randn(9, 6), torch.tensor(2.0, requires_grad=True)
    expected = torch.autograd.grad(loss(x, y, scale), [scale, *encoder.parameters()])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    actual = torch.autograd.grad(compiled(x, y, scale), [scale, *encoder.parameters()])
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


def test_float16_keeps_the_probabilities_of_many_columns():
    """Of 262,144 equal logits each has probability 4e-6, a subnormal of float16 with six bits left unless G is lifted."""
    n, m = 2, 2**18
    g = torch.Generator().manual_seed(0)
    lhs, rhs = torch.randn(n, 4, generator=g).half(), (0.01 * torch.randn(m, 4, generator=g)).half()
    pairs = Pairs.of(lhs, rhs, torch.tensor(1.0))
    with backends.settings(host_reads=False):  # G is then stored in the operands' dtype, as on a GPU
        statistics = torch_backend.forward(pairs, Want(True, False))
        upstream = Lines(torch.full((n,), 1e-3, dtype=torch.float64), None, None)
        actual = torch_backend.backward(pairs, statistics, upstream, Need(False, True, False), dtype=torch.float32).rhs
    p = (lhs.double() @ rhs.double().T).softmax(dim=1)
    assert testing.relative_error(actual, 1e-3 * p.T @ lhs.double()) < 1e-3
