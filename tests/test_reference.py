"""The oracle against plain loops, and against what others call this loss."""

import math

import pytest
import torch
from torch.nn import functional as F

import reference

N, M, D = 4, 6, 3


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairwise_logsumexp_is_the_formula_in_loops():
    x, y, scale = numbers(N, D), numbers(M, D, seed=1), 2.5
    labels = torch.tensor([[2, -1], [0, 5], [-1, -1], [3, 3]])
    lhs_ids, rhs_ids = torch.tensor([7, -1, 8, 8]), torch.tensor([8, -1, 7, 8, 7, 9])
    row, col, positive = reference.pairwise_logsumexp(x, y, scale, labels=labels, lhs_ids=lhs_ids, rhs_ids=rhs_ids)

    s = [[scale * sum(float(x[i, d] * y[j, d]) for d in range(D)) for j in range(M)] for i in range(N)]

    def sees(i, j):
        return j in labels[i] or not (lhs_ids[i] == rhs_ids[j] >= 0)

    for i in range(N):
        assert row[i].item() == pytest.approx(math.log(sum(math.exp(s[i][j]) for j in range(M) if sees(i, j))))
        assert positive[i].tolist() == pytest.approx([s[i][t] if t >= 0 else 0.0 for t in labels[i].tolist()])
    for j in range(M):
        assert col[j].item() == pytest.approx(math.log(sum(math.exp(s[i][j]) for i in range(N) if sees(i, j))))


def test_gcl_loss_is_weighted_cross_entropy_both_ways():
    x, y, w = numbers(N, D), numbers(N, D, seed=1), torch.tensor([0.0, 1.0, 2.0, 50.0], dtype=torch.float64)
    s = 3.0 * x @ y.T
    by_row = F.cross_entropy(s, torch.arange(N), reduction="none")
    by_col = F.cross_entropy(s.T, torch.arange(N), reduction="none")
    torch.testing.assert_close(reference.gcl_loss(x, y, 3.0, weights=w), (w * (by_row + by_col) / 2).mean())
    for directions, expected in (("lhs_to_rhs", by_row), ("rhs_to_lhs", by_col)):
        actual = reference.gcl_loss(x, y, 3.0, weights=w, directions=directions, reduction="weighted_mean")
        torch.testing.assert_close(actual, (w * expected).sum() / w.sum())


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_torch_s(smoothing):
    x, y = numbers(N, D), numbers(M, D, seed=1)
    labels = torch.tensor([3, 1, 0, 5])
    expected = F.cross_entropy(2.0 * x @ y.T, labels, label_smoothing=smoothing)
    actual = reference.gcl_loss(x, y, 2.0, labels=labels, directions="lhs_to_rhs", label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected)


def test_z_loss_adds_the_square_of_the_logsumexp():
    x, y = numbers(N, D), numbers(N, D, seed=1)
    s = x @ y.T
    expected = reference.gcl_loss(x, y, 1.0) + 0.01 * (s.logsumexp(1).square() + s.logsumexp(0).square()).mean() / 2
    torch.testing.assert_close(reference.gcl_loss(x, y, 1.0, z_loss=0.01), expected)


def test_pairwise_fields_sum_over_pairs_and_leave_absent_fields_out():
    a, b, t = numbers(N, D), numbers(N, D, seed=1), numbers(N, D, seed=2)
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    actual = reference.gcl_loss(
        {"a": a, "b": b},
        {"t": t},
        2.0,
        lhs_field_weights={"a": 1.0, "b": 3.0},
        lhs_field_mask=mask,
        field_mode="pairwise",
        reduction="none",
    )
    expected = torch.zeros(N, dtype=torch.float64)
    for weight, field, present in ((0.25, a, [0, 1, 2]), (0.75, b, [0, 2, 3])):
        pair = reference.gcl_loss(
            F.normalize(field[present]), F.normalize(t), 2.0, labels=torch.tensor(present), reduction="none"
        )
        expected[present] += weight * pair
    torch.testing.assert_close(actual, expected)


def test_aggregation_by_hand():
    title, image = (
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]),
        torch.tensor([[0.0, 5.0], [1.0, 0.0], [math.nan, 0.0]]),
    )
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    actual = reference.aggregate_fields(
        {"title": title, "image": image}, {"title": 0.1, "image": 0.9}, mask=mask, normalize=False
    )
    torch.testing.assert_close(actual, torch.tensor([[0.06, 0.98], [0.9, 0.1], [1.0, 0.0]]))


def everything(x, y, w, mask, ids):
    """One result for each branch of `reference` that makes a tensor of its own."""
    left, right = {"a": x, "b": y}, {"t": y}
    scale, weights = x.new_tensor(2.0), {"a": 1.0, "b": 3.0}
    yield from reference.pairwise_logsumexp(x, y, scale)
    yield from reference.pairwise_logsumexp(x, y, scale, lhs_ids=ids, rhs_ids=ids)
    yield reference.aggregate_fields(left, weights, mask=mask)
    yield reference.aggregate_fields(left)
    yield from (reference.score_to_weight(name, w) for name in ("constant", "linear", "inverse", "inverse_sqrt", "log"))
    for reduction in ("mean", "weighted_mean", "sum", "none"):
        yield reference.gcl_loss(x, y, scale, reduction=reduction)
        yield reference.gcl_loss(x, y, scale, weights=w, lhs_ids=ids, rhs_ids=ids, reduction=reduction)
        for field_mode in ("aggregate", "pairwise"):
            options = {"lhs_field_weights": weights, "lhs_field_mask": mask, "field_mode": field_mode}
            yield reference.gcl_loss(left, right, scale, weights=w, reduction=reduction, **options)
            yield reference.gcl_loss(left, right, scale, reduction=reduction, field_mode=field_mode)


def test_every_tensor_is_made_on_the_device_of_the_embeddings():
    x, y, w = numbers(N, D), numbers(N, D, seed=1), torch.rand(N, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    ids = torch.tensor([7, -1, 7, 8])
    expected = list(everything(x, y, w, mask, ids))
    # The embeddings stay on the CPU and the default device becomes another one, which computes nothing: what is made
    # without naming a device is found out on any machine.
    with torch.device("meta"):
        actual = list(everything(x, y, w, mask, ids))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
