"""Statistics of batches: the loss floor is reached and never passed, weights that are few have few effective rows."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import reference
from gcl_kernels.training.batches import batch_statistics, effective_number, loss_floor, sigmoid_floor
from gcl_kernels.training.options import parse_args


def loss_of(logits, weights):
    positives = logits.diagonal()
    rows, columns = logits.logsumexp(1) - positives, logits.logsumexp(0) - positives
    return (weights * (rows + columns) / 2).mean().item()


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.floats(0.1, 5)), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_no_embeddings_go_below_the_floor_and_the_best_reach_it(rows, seed):
    ids = torch.tensor([row[:2] for row in rows])
    weights = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    of_pair = torch.full((5, 5), 1e-300, dtype=torch.float64)
    of_pair.index_put_((ids[:, 0], ids[:, 1]), weights, accumulate=True)
    counts = [torch.bincount(column, minlength=5).clamp(min=1) for column in ids.T]
    best = of_pair.log() - counts[0].log()[:, None] - counts[1].log()
    floor = loss_floor(weights, ids)
    assert loss_of(best[ids[:, 0]][:, ids[:, 1]], weights) == pytest.approx(floor, abs=1e-9)
    other = best + torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert loss_of(other[ids[:, 0]][:, ids[:, 1]], weights) >= floor - 1e-9


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from((0.0, 0.1, 1.0, 5.0))), min_size=1, max_size=9
    ),
    st.integers(0, 99),
)
def test_no_logits_go_below_the_sigmoid_loss_s_floor_and_the_best_reach_it(rows, seed):
    """Against the reference's loss, at logits that rows of one query and columns of one document have in common."""
    ids = torch.tensor([row[:2] for row in rows])
    weights = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    floor = sigmoid_floor(weights, ids)

    def loss(logits):
        n = len(rows)
        return reference.sigmoid_loss(
            logits[ids[:, 0]][:, ids[:, 1]], torch.eye(n, dtype=torch.float64), 1.0, 0.0, weights=weights
        )

    logits = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    # Where pairs are all positives or all negatives the infimum lies at infinity.
    assert floor - 1e-9 <= loss(logits).item() <= floor + 1e-3
    other = 3 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert loss(other) >= floor - 1e-9


def test_effective_numbers_are_the_rows_of_equal_weight():
    assert effective_number(torch.ones(7)) == pytest.approx(7)
    assert effective_number(torch.tensor([3.0, 3.0, 0.0])) == pytest.approx(2)


def test_the_statistics_are_those_of_the_run(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,score", *(f"q{n % 2},t{n},{100 if n == 7 else 1}" for n in range(8))]))
    argv = [f"--train-data={path}", "--left-keys=query", "--right-keys=title", "--weight-key=score", "--batch-size=8"]

    def statistics(*options):
        return batch_statistics(parse_args([*argv, *options]))

    constant = statistics("--score-to-weight=constant", "--false-negatives=keep")
    assert (constant.rows, constant.effective_rows, constant.little_weight) == (8, pytest.approx(8), 0)
    # Four rows of each query: a query's documents share its softmax, and so do a document's four copies of its query.
    assert constant.floor == pytest.approx(math.log(4))
    # A pair of a query and a document is a row's positive and three other rows' negative.
    sigmoid = statistics("--score-to-weight=constant", "--false-negatives=keep", "--loss=sigmoid")
    assert sigmoid.floor == pytest.approx(math.log(4) + 3 * math.log(4 / 3))
    assert statistics("--loss=sigmoid").floor == 0
    linear = statistics("--score-to-weight=linear")
    assert linear.effective_rows == pytest.approx(107**2 / (100**2 + 7))
    assert linear.little_weight == pytest.approx(7 / 8)
    assert linear.floor == 0
    # Scores scaled to 1..100 end at 100, whatever the largest of unscaled ones would be.
    assert statistics("--score-to-weight=inverse", "--s-max=200") == statistics("--score-to-weight=inverse")
    # Through the same weights at both ends, a straight line is the linear function.
    piecewise = statistics("--score-to-weight=piecewise", "--knots=1:1,100:100")
    assert piecewise.effective_rows == pytest.approx(linear.effective_rows)
    few = statistics("--score-to-weight=linear", "--min-score=50")
    assert (few.rows, few.little_weight) == (1, 0)
    assert statistics("--score-to-weight=constant", "--false-negatives=avoid").rows == 2
