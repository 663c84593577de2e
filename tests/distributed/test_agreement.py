"""A rank that differs from the others is an error on every rank, and the group is fit for the next call."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import GCLLoss, gcl_loss, pairwise_logsumexp
from gcl_kernels.distributed import first_column
from gcl_kernels.types import TRANSPORTS
from tests.distributed.pool import error_of

x, ids = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
LABELS = torch.arange(4)
# what rank 1 of 3 passes besides what all pass, and the message on all ranks
DIFFERENT = [
    ({"lhs": torch.ones(4, 5), "rhs": torch.ones(4, 5)}, r"lhs and rhs: .* D = 3, float32 .* and D = 5, float32 .* rank 1"),
    ({"lhs": x.double(), "rhs": x.double()}, r"lhs and rhs: .* D = 3, float32 .* and D = 3, float64 on cpu on rank 1"),
    ({"lhs": torch.ones(4, 3).requires_grad_()}, r"requires_grad of lhs, rhs, logit_scale: .*True, False, False\] on rank 1"),
    ({"logit_scale": 2.5}, r"logit_scale: expected the same on every rank, got 2.0 on rank 0 and 2.5 on rank 1"),
    ({"lhs_ids": ids, "rhs_ids": ids}, r"lhs_ids: .* None on rank 0 and a tensor \(\.\.\., 1\) on rank 1"),
    ({"labels": LABELS}, r"labels: expected the same on every rank, got None on rank 0 and a tensor \(\.\.\., 1\) on rank 1"),
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
        assert "scores: expected numbers in [1, 100] for 'log', got 101" in text


def first_column_on_rank(group):
    """Rank 1 fails in a loss while the others ask where their columns stand; afterwards all can."""
    mine = (lambda: gcl_loss(x, x[:, :2], 2.0, process_group=group)) if dist.get_rank(group) == 1 else None
    error = error_of(mine or (lambda: first_column(x, group)))
    return f"{type(error).__name__}: {error}", first_column(x, group)


def test_a_failure_elsewhere_is_shared_with_who_asks_for_the_first_column(pool):
    shared = (
        "ValueError: process_group: expected valid arguments on every rank, got on rank 1 ValueError: rhs: expected"
    )
    for rank, (error, first) in enumerate(pool.run(3, first_column_on_rank)):
        assert error.startswith("ValueError: rhs: expected" if rank == 1 else shared)
        assert first == 4 * rank


def test_a_group_is_expected():
    for function in (pairwise_logsumexp, gcl_loss):
        with pytest.raises(ValueError, match="process_group: expected 'world' as the only name, got 'x'"):
            function(x, x, 1.0, process_group="x")
        with pytest.raises(TypeError, match=r"process_group: expected None, 'world', .* got int 3"):
            function(x, x, 1.0, process_group=3)
        with pytest.raises(ValueError, match="transport: expected one of 'all_gather', 'ring', got 'tree'"):
            function(x, x, 1.0, transport="tree")
