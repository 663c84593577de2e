"""The primitive and the losses over gloo groups of 1 to 4 ranks against the reference on the joined batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import GCLLoss, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.distributed import first_column
from tests.distributed import cases
from tests.distributed.pool import WORLDS, error_of
from tests.test_lse import DENSE_FORMS, accuracy_floor

NAMES = ("row", "col", "positive", "dlhs", "drhs", "dscale")
transports = st.sampled_from(("all_gather", "ring"))


@st.composite
def cuts(draw, geometries=("random", "paired", "clustered", "wide")):
    """Unequal ranks; labels of the default, or of any rank's columns, with one or several positives; ids."""
    world = draw(st.sampled_from(WORLDS))
    rows = tuple(draw(st.sampled_from((1, 2, 7, 16, 33))) for _ in range(world))
    positives = draw(st.sampled_from((None, None, 0, 3)))
    more = tuple(draw(st.sampled_from((0, 1, 17))) for _ in range(world))
    cols = tuple(n + k for n, k in zip(rows, more, strict=True))
    if positives is not None and draw(st.booleans()):
        cols = cols[::-1]  # ranks with fewer columns than rows
    problem = draw(testing.problems(labels=False, geometries=geometries))
    return cases.Cut(
        testing.Problem(**{**vars(problem), "n": sum(rows), "m": sum(cols), "positives": positives}), rows, cols
    )


def joined(parts):
    """Ranks' results as those of one process: lines one after the other, the scale's gradients added."""
    *lines, scales = zip(*parts, strict=True)
    return [*(torch.cat(line) for line in lines), torch.stack(scales).double().sum()]


def one_process(function, batch, gradients):
    outputs = function(*batch.differentiable, **batch.options)
    inputs = batch.differentiable
    got = torch.autograd.grad(cases.weighted_sum(outputs, gradients), inputs, allow_unused=True, materialize_grads=True)
    return [v.detach() for v in (*outputs, *got)]


def exactly(batch):
    return testing.Batch(*(x.detach().double().requires_grad_() for x in batch.differentiable), batch.options)


@given(cut=cuts(), transport=transports)
@settings(max_examples=settings.default.max_examples // 2)
def test_float64_to_the_last_digits(pool, cut, transport):
    runs = pool.run(len(cut.rows), cases.primitive_on_rank, cut, torch.float64, transport)
    for first, second in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    actual = joined([first for first, _ in runs])
    oracle = one_process(reference.pairwise_logsumexp, cut.joined(torch.float64), cases.upstream(cut))
    testing.assert_as_accurate(actual, [oracle], oracle, NAMES, floor=1e-12)


@given(cut=cuts(), transport=transports, dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
@settings(max_examples=settings.default.max_examples // 2)
def test_as_accurate_as_dense_pytorch(pool, cut, transport, dtype):
    runs = pool.run(len(cut.rows), cases.primitive_on_rank, cut, dtype, transport)
    batch, gradients = cut.joined(dtype), cases.upstream(cut)
    oracle = one_process(reference.pairwise_logsumexp, exactly(batch), gradients)
    dense = [
        one_process(lambda *a, f=form, **k: reference.pairwise_logsumexp(*f(*a), **k), batch, gradients)
        for form in DENSE_FORMS
    ]
    actual = joined([first for first, _ in runs])
    assert [v.dtype for v in runs[0][0]] == [torch.float32] * 3 + [dtype] * 2 + [torch.float32]
    testing.assert_as_accurate(actual, dense, oracle, NAMES, floor=accuracy_floor(cut.problem, batch, oracle[-1]))


@given(
    cut=cuts(),
    transport=transports,
    weighted=st.booleans(),
    options=testing.loss_options(),
)
@settings(max_examples=settings.default.max_examples * 2 // 3)
def test_what_ddp_averages_is_the_gradient_of_the_joined_batch(pool, cut, transport, weighted, options):
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


def column_on_rank(group):
    rank = torch.distributed.get_rank(group)
    return first_column(torch.zeros(rank + 2, 3), group)


def test_first_column(pool):
    assert pool.run(4, column_on_rank) == [0, 2, 5, 9]


x, ids = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
LABELS = torch.arange(4)
# what rank 1 of 3 passes besides what all pass, and the message on all ranks
DIFFERENT = [
    ({"lhs": torch.ones(4, 5), "rhs": torch.ones(4, 5)}, r"lhs and rhs: .* D = 3, float32 .* and D = 5, float32 .* rank 1"),
    ({"lhs": x.double(), "rhs": x.double()}, r"lhs and rhs: .* D = 3, float32 .* and D = 3, float64 on cpu on rank 1"),
    ({"lhs": torch.ones(4, 3).requires_grad_()}, r"requires_grad of lhs, rhs, logit_scale: .*True, False, False\] on rank 1"),
    ({"logit_scale": 2.5}, r"logit_scale: expected the same on every rank, got 2.0 on rank 0 and 2.5 on rank 1"),
    ({"lhs_ids": ids, "rhs_ids": ids}, r"lhs_ids: .* None on rank 0 and 1 channels of ids on rank 1"),
    ({"labels": LABELS}, r"labels: expected the same on every rank, got None on rank 0 and labels on rank 1"),
    ({"transport": "ring"}, r"transport: expected the same on every rank, got all_gather on rank 0 and ring on rank 1"),
    ({"rhs": torch.ones(3, 3)}, r"labels: expected labels for M < N .*N = 4, M = 3"),
    ({"rhs": torch.ones(3, 2)}, r"rhs: expected \(M, 3\) to match lhs \(4, 3\), got \(3, 2\)"),
    ({"lhs": [1.0]}, r"lhs: expected a"),
    ({"reduction": "sum"}, r"reduction: expected the same on every rank, got mean on rank 0 and sum on rank 1"),
    ({"weights": -torch.ones(4)}, r"weights: expected finite numbers >= 0, got -1.0"),
    ({"label_smoothing": 0.1}, r"label_smoothing: expected the same on every rank, got 0.0 on rank 0 and 0.1 on rank 1"),
]  # fmt: skip


def refused_on_rank(group, extra, everywhere):
    """Whether a rank's wrong call raises the right kind and leaves the group fit for the next call; the message."""
    arguments = {"lhs": x, "rhs": x, "logit_scale": 2.0, **everywhere}
    mine = {**arguments, **(extra if torch.distributed.get_rank(group) == 1 else {})}
    loss_only = {"reduction", "weights", "label_smoothing"} & set(extra)
    messages = []
    for function in (gcl_loss,) if loss_only else (gcl_loss, pairwise_logsumexp):
        error = error_of(lambda f=function: f(**mine, process_group=group))
        assert isinstance(error, (ValueError, TypeError)), error
        messages.append(str(error))
    gcl_loss(**arguments, process_group=group)
    return messages


@pytest.mark.parametrize(("extra", "message"), DIFFERENT)
def test_a_rank_that_differs_is_an_error_on_every_rank(pool, extra, message):
    for messages in pool.run(3, refused_on_rank, extra, {}):
        for text in messages:
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)


def test_labels_beyond_all_columns_are_an_error_on_every_rank(pool):
    message = "labels: expected columns 0..11 of all ranks' rhs, or -1 for none, got values from 0 to 12 on rank 1"
    extra = {"labels": torch.tensor([0, 1, 2, 12])}
    assert pool.run(3, refused_on_rank, extra, {"labels": LABELS}) == [[message, message]] * 3


def scores_on_rank(group):
    scores = torch.full((4,), 50.0 if torch.distributed.get_rank(group) else 101.0)
    return str(error_of(lambda: GCLLoss(process_group=group)(x, x, scores, 2.0)))


def test_a_score_refused_on_one_rank_is_an_error_on_every_rank(pool):
    for text in pool.run(2, scores_on_rank):
        assert "scores: expected numbers in [1, 100] for 'linear', got 101" in text


def test_a_group_is_expected():
    for function in (pairwise_logsumexp, gcl_loss):
        with pytest.raises(
            TypeError, match=r"process_group: expected None or a torch.distributed.ProcessGroup .* str 'x'"
        ):
            function(x, x, 1.0, process_group="x")
        with pytest.raises(ValueError, match="transport: expected one of 'all_gather', 'ring', got 'tree'"):
            function(x, x, 1.0, transport="tree")


def no_half_precision_sums_on_rank(group, dtype):
    """drhs of many ranks' parts that cancel: rounded one by one to half precision, they would leave noise."""
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(world * 8, 16, generator=g).to(dtype) for _ in range(2))
    mine = slice(8 * rank, 8 * rank + 8)
    got = []
    for transport in ("all_gather", "ring"):
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


def compiled_on_rank(group):
    """Gradients of the encoder and the scale, eager and compiled; the graphs that were compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    rank = torch.distributed.get_rank(group)
    torch.manual_seed(0)
    encoder, scale = torch.nn.Linear(6, 4, dtype=torch.float64), torch.tensor(2.0, requires_grad=True)
    x, y, ids = *torch.randn(2, 3 + rank, 6, dtype=torch.float64).unbind(), torch.arange(3 + rank) % 2

    def loss():
        images, texts = encoder(x), encoder(y)
        return gcl_loss(images, texts, scale, lhs_ids=ids, rhs_ids=ids, process_group=group, transport="ring")

    counter = CompileCounterWithBackend("aot_eager")  # needs no C++ compiler
    runs = [
        torch.autograd.grad(f(), [scale, *encoder.parameters()]) for f in (loss, torch.compile(loss, backend=counter))
    ]
    torch.compiler.reset()
    return *runs, counter.frame_count


def test_what_surrounds_the_exchange_compiles(pool):
    for eager, compiled, graphs in pool.run(2, compiled_on_rank):
        assert graphs >= 2
        torch.testing.assert_close(compiled, eager)
