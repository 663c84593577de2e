"""Ranking metrics against trec_eval, hand-worked cases and properties."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gcl_kernels.training.metrics import all_metrics, average_precision, err, ndcg, rbp, recall, reciprocal_rank


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def rankings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains by rank and all judged grades of Q queries: a random order of judged and unjudged documents."""
    queries, documents = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    largest = draw(st.sampled_from([1, 3, 100]))
    grades = torch.randint(0, largest + 1, (queries, documents), generator=generator).double()
    grades *= torch.rand(queries, documents, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    order = torch.argsort(torch.rand(queries, documents, generator=generator), dim=1)
    kept = draw(st.integers(1, documents))
    return grades.gather(1, order)[:, :kept], grades


@given(rankings())
def test_ndcg_ap_rr_and_recall_are_those_of_trec_eval(ranking):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec-eval-terrier is the oracle and is not installed")
    gains, judged = ranking
    # Every judged grade gets a document; those of the ranking come first, and the scores fall with the rank, so that
    # there are no ties for trec_eval to break its own way.
    qrel, run = {}, {}
    for q in range(len(gains)):
        rest = sorted(judged[q].tolist())
        for gain in gains[q].tolist():
            rest.remove(gain)
        documents = [*gains[q].tolist(), *rest]
        qrel[str(q)] = {f"d{number}": int(grade) for number, grade in enumerate(documents)}
        run[str(q)] = {f"d{rank}": 1000.0 - rank for rank in range(gains.shape[1])}
    cuts = {f"{name}.{k}" for name in ("ndcg_cut", "recall") for k in (1, 3, 10)}
    expected = pytrec_eval.RelevanceEvaluator(qrel, {*cuts, "map", "recip_rank"}).evaluate(run)
    for k in (1, 3, 10):
        assert ndcg(gains, judged, k).tolist() == pytest.approx(
            [expected[str(q)][f"ndcg_cut_{k}"] for q in range(len(gains))]
        )
        assert recall(gains, judged, k).tolist() == pytest.approx(
            [expected[str(q)][f"recall_{k}"] for q in range(len(gains))]
        )
    assert average_precision(gains, judged).tolist() == pytest.approx(
        [expected[str(q)]["map"] for q in range(len(gains))]
    )
    assert reciprocal_rank(gains, judged).tolist() == pytest.approx(
        [expected[str(q)]["recip_rank"] for q in range(len(gains))]
    )


def test_ndcg_by_hand():
    # DCG = 2 / log2(2) + 0 + 3 / log2(4); the ideal order is 3, 2, 1.
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(rows([2, 0, 3]), rows([1, 2, 3])).item() == pytest.approx((2 + 3 / 2) / ideal)
    assert ndcg(rows([2, 0, 3]), rows([1, 2, 3]), k=1).item() == pytest.approx(2 / 3)


def test_err_by_hand():
    # Largest grade 2: R is 1/4 for grade 1, 3/4 for grade 2, 0 for grade 0.
    expected = (1 / 4) / 1 + 0 + (3 / 4) * (3 / 4) / 3
    assert err(rows([1, 0, 2]), rows([2, 1])).item() == pytest.approx(expected)
    # The largest grade is that of the judged documents, found or not.
    assert err(rows([1]), rows([3, 1])).item() == pytest.approx(1 / 8)


def test_err_of_grade_100_does_not_overflow():
    gains = rows([100, 99, 1])
    # R is 1 - 2^-100, then 1/2 - 2^-100, then about 2^-99; the first stops nearly everyone.
    assert err(gains, gains).item() == pytest.approx(1.0)
    assert err(rows([99, 100]), gains).item() == pytest.approx(1 / 2 + 1 / 2 / 2)
    assert err(rows([2000, 0]), rows([2000])).item() == 1.0


def test_rbp_by_hand():
    expected = 0.2 * (1 / 2 * 1 + 0 + 1 * 0.8**2)
    assert rbp(rows([1, 0, 2]), rows([2, 1]), p=0.8).item() == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.0, 1.0, -1.0, 1.5])
def test_rbp_refuses_p_outside_0_to_1(p):
    with pytest.raises(ValueError, match=r"expected p in \(0, 1\), got"):
        rbp(rows([1]), rows([1]), p)


def test_average_precision_reciprocal_rank_and_recall_by_hand():
    gains, judged = rows([0, 5, 0, 1]), rows([5, 1, 1, 0])
    assert average_precision(gains, judged).item() == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert reciprocal_rank(gains, judged).item() == pytest.approx(1 / 2)
    assert recall(gains, judged, 2).item() == pytest.approx(1 / 3)


def test_a_query_without_relevant_documents_scores_0():
    for name, values in all_metrics(rows([0, 0], [1, 0]), rows([0], [1])).items():
        assert values[0] == 0, name
        assert values[1] > 0, name


@given(rankings())
def test_every_metric_is_between_0_and_1(ranking):
    for name, values in all_metrics(*ranking).items():
        assert ((values >= 0) & (values <= 1 + 1e-12)).all(), name


@given(rankings())
def test_the_ideal_ranking_is_the_best(ranking):
    gains, judged = ranking
    ideal = judged.sort(dim=1, descending=True).values
    relevant = judged.amax(dim=1) > 0
    assert ndcg(ideal, judged)[relevant].tolist() == pytest.approx([1.0] * int(relevant.sum()))
    assert average_precision(ideal, judged)[relevant].tolist() == pytest.approx([1.0] * int(relevant.sum()))
    for name, best in all_metrics(ideal, judged).items():
        assert (all_metrics(gains, judged)[name] <= best + 1e-12).all(), name


@given(rankings(), st.integers(0, 2**31))
def test_moving_a_better_document_up_never_lowers_a_metric(ranking, seed):
    gains, judged = ranking
    generator = torch.Generator().manual_seed(seed)
    place = int(torch.randint(0, gains.shape[1], (), generator=generator))
    other = int(torch.randint(place, gains.shape[1], (), generator=generator))
    improved = gains.clone()
    improved[:, place] = torch.maximum(gains[:, place], gains[:, other])
    improved[:, other] = torch.minimum(gains[:, place], gains[:, other])
    for name, before in all_metrics(gains, judged).items():
        assert (all_metrics(improved, judged)[name] >= before - 1e-12).all(), name


@given(rankings(), st.integers(2, 7))
def test_ndcg_and_rbp_do_not_depend_on_the_unit_of_the_grades(ranking, factor):
    gains, judged = ranking
    assert ndcg(gains * factor, judged * factor).tolist() == pytest.approx(ndcg(gains, judged).tolist())
    assert rbp(gains * factor, judged * factor).tolist() == pytest.approx(rbp(gains, judged).tolist())
