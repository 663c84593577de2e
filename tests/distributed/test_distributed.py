"""The primitive and the losses over gloo groups of 1 to 4 ranks against the reference on the joined batch."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import ClipLoss, GCLLoss, distributed, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.backends import torch_chunked
from gcl_kernels.distributed import TRANSPORTS, first_column
from tests.distributed import cases
from tests.distributed.pool import WORLDS, error_of
from tests.test_lse import DENSE_FORMS, LargestTensor, accuracy_floor

NAMES = ("row", "col", "positive", "dlhs", "drhs", "dscale")
transports = st.sampled_from(TRANSPORTS)


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


class Exchanges:
    """What a rank does in order: sends, waits, products with a block of so many columns; bytes sent; the largest tensor."""

    def __init__(self, patch):
        self.events, self.sent, self.largest = [], 0, LargestTensor()
        for owner, name, note in (
            (distributed, "all_gather_single", lambda got, x, **_: self.send("gather", x.nbytes)),
            (dist, "all_to_all_single", lambda got, x, *_, **__: self.send("exchange", x.nbytes)),
            (dist, "batch_isend_irecv", lambda ops: self.send("send", ops[0].tensor.nbytes)),
            (distributed.Shift, "wait", lambda _: self.events.append("wait")),
            (torch_chunked, "forward", lambda lhs, rhs, *_: self.events.append(len(rhs))),
            (torch_chunked, "backward", lambda lhs, rhs, *_, **__: self.events.append(len(rhs))),
        ):
            patch.setattr(owner, name, self.noted(getattr(owner, name), note))

    def send(self, name, size):
        self.events.append(name)
        self.sent += size

    def noted(self, function, note):
        def run(*args, **kwargs):
            note(*args, **kwargs)
            return function(*args, **kwargs)

        return run


def exchanges_on_rank(group, transport, with_fields):
    """(Events of a forward, of a backward, bytes sent, whether a tensor was as large as all ranks' rhs)."""
    cols, d = 3 + dist.get_rank(group), 400
    g = torch.Generator().manual_seed(0)
    fields = {name: torch.randn(cols, d, generator=g).requires_grad_() for name in ("title", "image")}
    lhs, rhs = torch.randn(3, d, requires_grad=True), fields if with_fields else fields["title"]
    with pytest.MonkeyPatch.context() as patch:
        exchanges = Exchanges(patch)
        with exchanges.largest:
            loss = gcl_loss(lhs, rhs, 1.0, process_group=group, transport=transport)
            forward, exchanges.events = exchanges.events, []
            loss.backward()
    return forward, exchanges.events, exchanges.sent, exchanges.largest.nbytes >= 4 * 12 * d


def test_the_ring_sends_while_it_computes_and_never_holds_rhs(pool):
    """Of 3 ranks with 3, 4 and 5 columns: the next block is on its way before the products with this one."""
    for rank, (forward, backward, _, all_of_rhs) in enumerate(pool.run(3, exchanges_on_rank, "ring", False)):
        own, second, third = (3 + (rank - step) % 3 for step in range(3))
        agreement, statistics = ["gather"], ["exchange"]
        assert forward == [*agreement, "send", own, "wait", "send", second, "wait", third, *statistics]
        assert backward == [
            *["gather", "send", own],  # col; rhs
            *["send", "wait", "send", second],  # drhs leaves; rhs has come and goes on
            *["wait", "send", "wait", third],  # the drhs of the block in hand is waited for after its products only
            *["wait", "send", "wait"],
        ]
        assert not all_of_rhs


def test_all_gather_holds_rhs(pool):
    for forward, backward, _, all_of_rhs in pool.run(3, exchanges_on_rank, "all_gather", False):
        assert forward == ["gather", "gather", 12, "exchange"]
        assert backward == ["gather", 12, "exchange"]
        assert all_of_rhs


def clip_losses_on_rank(group):
    """Entries of the largest tensor that ClipLoss makes, for each pair of flags."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_chunked, "default_tile", lambda *_: (16, 16))
        patch.setattr(torch_chunked, "lines_at_once", lambda *_: 8)
        for flags in itertools.product((False, True), repeat=2):
            image, text = torch.randn(2, 60, 3, requires_grad=True).unbind()
            with LargestTensor() as largest:
                ClipLoss(*flags, rank=rank, world_size=world)(image, text, 2.0).backward()
            sizes.append(largest.numel)
    return sizes


def test_clip_loss_makes_no_rank_hold_its_rows_by_all_columns(pool):
    for sizes in pool.run(WORLDS[-1], clip_losses_on_rank):
        assert max(sizes) < 60 * 240 / 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_vector_a_document_travels(pool, transport):
    plain, fields = ([sent for *_, sent, _ in pool.run(3, exchanges_on_rank, transport, f)] for f in (False, True))
    assert fields == plain


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
    ({"lhs": x[:0], "rhs": x[:0]}, r"lhs: expected at least one row and one column, got shape \(0, 3\)"),
    ({"rhs": x[:0]}, r"rhs: expected at least one row and one column, got shape \(0, 3\)"),
    ({"rhs": x.double()}, r"rhs: expected the dtype of lhs, torch.float32, got torch.float64"),
    ({"reduction": "sum"}, r"reduction: expected the same on every rank, got mean on rank 0 and sum on rank 1"),
    ({"weights": -torch.ones(4)}, r"weights: expected finite numbers >= 0, got -1.0"),
    ({"label_smoothing": 0.1}, r"label_smoothing: expected the same on every rank, got 0.0 on rank 0 and 0.1 on rank 1"),
]  # fmt: skip


def refused_on_rank(group, extra, everywhere):
    """Whether a rank's wrong call raises the right kind and leaves the group fit for the next call; the message."""
    messages = []
    for transport in ("all_gather",) if "transport" in extra else TRANSPORTS:
        arguments = {"lhs": x, "rhs": x, "logit_scale": 2.0, "transport": transport, **everywhere}
        mine = {**arguments, **(extra if dist.get_rank(group) == 1 else {})}
        loss_only = {"reduction", "weights", "label_smoothing"} & set(extra)
        for function in (gcl_loss,) if loss_only else (gcl_loss, pairwise_logsumexp):
            error = error_of(lambda f=function, a=mine: f(**a, process_group=group))
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
    assert pool.run(3, refused_on_rank, extra, {"labels": LABELS}) == [[message] * 4] * 3


def scores_on_rank(group):
    scores = torch.full((4,), 50.0 if dist.get_rank(group) else 101.0)
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
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    g = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(world * 8, 16, generator=g).to(dtype) for _ in range(2))
    mine = slice(8 * rank, 8 * rank + 8)
    got = []
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


def compiled_on_rank(group):
    """Gradients of the encoder and the scale, eager and compiled; the graphs that were compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    rank = dist.get_rank(group)
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
