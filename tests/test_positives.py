"""`positives_of` beside the definition, and in a loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcl_kernels import gcl_loss, positives_of

ids = st.lists(st.sampled_from((-5, -1, 0, 1, 2, 7, 2**62)), min_size=1, max_size=20)


@given(lhs=ids, rhs=st.none() | ids)
def test_every_column_of_the_row_s_id_in_order(lhs, rhs):
    labels = positives_of(torch.tensor(lhs), None if rhs is None else torch.tensor(rhs))
    columns = lhs if rhs is None else rhs
    expected = [[j for j, other in enumerate(columns) if other == own >= 0] for own in lhs]
    assert labels.shape == (len(lhs), max(1, *map(len, expected)) if len(expected) > 1 else max(1, len(expected[0])))
    assert labels.dtype == torch.int64
    for row, of_row in zip(labels.tolist(), expected, strict=True):
        assert row == of_row + [-1] * (len(row) - len(of_row))


def test_a_loss_of_every_document_of_a_query():
    """Two rows of one query and one document each, as one query's row with two documents."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    queries = torch.tensor([5, 5, 8])
    loss = gcl_loss(x, y, 2.0, labels=positives_of(queries), directions="lhs_to_rhs", reduction="none")
    log_p = (2.0 * x @ y.T).log_softmax(dim=1)
    torch.testing.assert_close(loss, -torch.stack([log_p[0, :2].sum(), log_p[1, :2].sum(), log_p[2, 2]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "lhs_ids: expected dtype int64, got float32"),
        (([1, 2],), "lhs_ids: expected a torch.Tensor, got list"),
        ((torch.zeros(3, 1, dtype=torch.int64),), r"lhs_ids: expected a 1-d tensor, got shape \(3, 1\)"),
        ((torch.arange(3), torch.arange(3).int()), "rhs_ids: expected dtype int64, got int32"),
        ((torch.arange(3), torch.arange(0)), r"rhs_ids: expected at least one id, got shape \(0,\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        positives_of(*arguments)
