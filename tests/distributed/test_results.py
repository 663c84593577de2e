"""The primitive and the losses over gloo groups of 1 to 4 ranks against the reference on the joined batch."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import backends, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.distributed import first_column
from gcl_kernels.types import TRANSPORTS
from tests.distributed import cases
from tests.distributed.pool import WORLDS
from tests.oracle import DTYPES, assert_accurate

transports = st.sampled_from(TRANSPORTS)


@st.composite
def cuts(draw, geometries=("random", "paired", "clustered", "wide"), terms=False):
    """Unequal ranks; labels of the default, or of any rank's columns, with one or several positives; ids."""
    world = draw(st.sampled_from(WORLDS))
    rows = tuple(draw(st.sampled_from((1, 2, 7, 16, 33))) for _ in range(world))
    positives = draw(st.sampled_from((None, None, 0, 3)))
    more = tuple(draw(st.sampled_from((0, 1, 17))) for _ in range(world))
    cols = tuple(n + k for n, k in zip(rows, more, strict=True))
    if positives is not None and draw(st.booleans()):
        cols = cols[::-1]  # ranks with fewer columns than rows
    problem = draw(testing.problems(labels=False, terms=terms, geometries=geometries))
    return cases.Cut(
        testing.Problem(**{**vars(problem), "n": sum(rows), "m": sum(cols), "positives": positives}), rows, cols
    )


def joined(parts):
    """Ranks' results as those of one process: lines one after the other, the scale's gradients added."""
    *lines, scales = zip(*parts, strict=True)
    return [*(torch.cat(line) for line in lines), torch.stack(scales).double().sum()]


@given(cut=cuts(terms=True), transport=transports, positives=st.sampled_from(("joined", "apart")))
@settings(max_examples=settings.default.max_examples // 2)
def test_float64_to_the_last_digits(pool, cut, transport, positives):
    runs = pool.run(len(cut.rows), cases.primitive_on_rank, cut, torch.float64, transport, positives)
    for first, second in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    actual = joined([first for first, _ in runs])
    assert_accurate(actual, cut.joined(torch.float64), positives=positives)


@given(cut=cuts(terms=True), transport=transports, dtype=st.sampled_from(DTYPES))
@settings(max_examples=settings.default.max_examples // 2)
def test_as_accurate_as_dense_pytorch(pool, cut, transport, dtype):
    runs = pool.run(len(cut.rows), cases.primitive_on_rank, cut, dtype, transport)
    actual = joined([first for first, _ in runs])
    assert [v.dtype for v in runs[0][0]] == [torch.float64] * 3 + [dtype] * 2 + [torch.float32]
    assert_accurate(actual, cut.joined(dtype))


@given(
    cut=cuts(),
    transport=transports,
    weighted=st.booleans(),
    options=testing.loss_options(),
    margin=st.sampled_from((None, 0.07)),
)
@settings(max_examples=settings.default.max_examples * 2 // 3)
def test_what_ddp_averages_is_the_gradient_of_the_joined_batch(pool, cut, transport, weighted, options, margin):
    options = {**options, "false_negative_margin": margin}
    batch = cut.joined(torch.float64)
    shape = (sum(cut.rows), cut.problem.positives) if cut.problem.positives else (sum(cut.rows),)
    weights = torch.rand(shape, generator=cut.problem.generator(), dtype=torch.float64) if weighted else None
    parts = pool.run(len(cut.rows), cases.loss_on_rank, cut, torch.float64, transport, weights, options)
    loss = reference.gcl_loss(*batch.differentiable, weights=weights, **batch.options, **options)
    oracle = torch.autograd.grad(loss.sum(), batch.differentiable, allow_unused=True, materialize_grads=True)
    losses, lhs, rhs, scales = zip(*parts, strict=True)
    share = 1.0 if options["reduction"] == "none" else 1 / len(parts)
    actual = torch.cat(losses) if options["reduction"] == "none" else torch.stack(losses).mean()
    gradients = share * torch.cat(lhs), share * torch.cat(rhs), share * torch.stack(scales).sum()
    for a, o in zip((actual, *gradients), (loss.detach(), *oracle), strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10)


@given(
    mode=st.sampled_from(("aggregate", "pairwise")),
    reduction=st.sampled_from(("mean", "weighted_mean", "sum")),
    smoothing=st.sampled_from((0.0, 0.1)),
    world=st.sampled_from(WORLDS),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings.default.max_examples // 3)
def test_fields_and_mean_weights_are_those_of_the_joined_batch(pool, mode, reduction, smoothing, world, seed):
    rows, cols = (3, 1, 5, 2)[:world], (4, 3, 5, 2)[:world]
    options = {"score_to_weight": "log", "normalize": "mean", "field_mode": mode, "reduction": reduction}
    options["label_smoothing"] = smoothing
    parts = pool.run(world, cases.field_loss_on_rank, rows, cols, seed, options)
    lhs, rhs, masks, scores = cases.fields(rows, cols, seed)
    inputs = [x.requires_grad_() for x in (*lhs.values(), *rhs.values())]
    weights = reference.score_to_weight("log", scores)
    loss = reference.gcl_loss(
        lhs,
        rhs,
        3.0,
        weights=weights / weights.mean(),
        labels=cases.Cut(None, rows, cols).default_labels,
        lhs_field_mask=masks[0],
        rhs_field_mask=masks[1],
        field_mode=mode,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    oracle = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    actual, *gradients = zip(*parts, strict=True)
    torch.testing.assert_close(torch.stack(actual).mean(), loss.detach())
    for g, o in zip(gradients, oracle, strict=True):
        torch.testing.assert_close(torch.cat(g) / world, o)


def own_labels_on_rank(group, transport):
    """A loss whose labels count a rank's own columns; what it was made of."""
    rank = dist.get_rank(group)
    g = torch.Generator().manual_seed(rank)
    lhs, rhs = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (4 - rank, 2 + rank))
    labels = torch.randint(0, len(rhs), (len(lhs),), generator=g)
    first = first_column(rhs, group)
    loss = gcl_loss(lhs, rhs, 2.0, labels=labels + first, process_group=group, transport=transport)
    return first, loss, lhs, rhs, labels


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_labels_of_own_columns_are_shifted_by_the_first_column(pool, transport):
    firsts, losses, lhs, rhs, labels = zip(*pool.run(4, own_labels_on_rank, transport), strict=True)
    assert firsts == (0, 2, 5, 9)
    labels = torch.cat([own + first for own, first in zip(labels, firsts, strict=True)])
    expected = reference.gcl_loss(torch.cat(lhs), torch.cat(rhs), 2.0, labels=labels)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def ids_on_rank(group, transport):
    """(Columns of all ranks that a row sees), for ids that are alike on the ranks and for ids that are not."""
    rank, zeros = dist.get_rank(group), torch.zeros(4, 3)
    seen = []
    for ids in (torch.arange(4), torch.arange(4) + 4 * rank):
        options = {"lhs_ids": ids, "rhs_ids": ids, "process_group": group, "transport": transport}
        seen.append(pairwise_logsumexp(zeros, zeros, 1.0, **options).row.exp().round().tolist())
    return seen


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_ids_are_compared_across_ranks(pool, transport):
    """Of 3 ranks' 12 columns a row does not see the 2 of its id on other ranks."""
    assert pool.run(3, ids_on_rank, transport) == [[[10.0] * 4, [12.0] * 4]] * 3


def no_half_precision_sums_on_rank(group, dtype):
    """drhs of many ranks' parts that cancel: rounded one by one to half precision, they would leave noise."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(world * 8, 16, generator=g).to(dtype) for _ in range(2))
    mine = slice(8 * rank, 8 * rank + 8)
    got = []
    with backends.settings(cpu_bfloat16="widen"):  # a CPU's own products of bfloat16 are rounded tile by tile
        for transport in TRANSPORTS:
            y = rhs[mine].clone().requires_grad_()
            gcl_loss(lhs[mine], y, 1.0, process_group=group, transport=transport).backward()
            got.append(y.grad)
        y = rhs.clone().requires_grad_()
        (world * gcl_loss(lhs, y, 1.0)).backward()
    return [(got[0] != y.grad[mine]).sum(), (got[1] != y.grad[mine]).sum()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_a_gradient_are_added_before_they_are_rounded(pool, dtype):
    for counts in pool.run(4, no_half_precision_sums_on_rank, dtype):
        assert max(counts) <= 4  # of 128: only where float32 sums in another order round to the next number
