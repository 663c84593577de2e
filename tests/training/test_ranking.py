"""Exact search, the grades of the protocol, and evaluation end to end with an encoder that is a table."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gcl_kernels.training.data import Pairs
from gcl_kernels.training.ranking import corpus_of, embed_corpus, minmax_grades, random_ranking, search
from gcl_kernels.training.ranking import evaluate as evaluate_on


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 45), st.integers(1, 10), st.integers(1, 40), st.integers(0, 99)
)  # fmt: skip
def test_search_is_a_stable_sort_whatever_the_chunks(queries, documents, k, query_chunk, document_chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: products are exact, and ties are many.
    x = torch.randint(-2, 3, (queries, 3), generator=generator).float()
    y = torch.randint(-2, 3, (documents, 3), generator=generator).float()
    expected = [sorted(range(documents), key=lambda j: (-float(x[i] @ y[j]), j))[:k] for i in range(queries)]
    found = search(x, y, k, query_chunk=query_chunk, document_chunk=document_chunk)
    assert found[0].tolist() == expected
    assert found[1].tolist() == [[float(x[i] @ y[j]) for j in row] for i, row in enumerate(expected)]


@pytest.mark.parametrize("side", [0, 1])
def test_search_refuses_what_is_not_finite(side):
    sides = [torch.ones(2, 3), torch.ones(4, 3)]
    sides[side][1, 1] = torch.nan
    with pytest.raises(ValueError, match="expected finite embeddings, got NaN or infinity"):
        search(sides[0], sides[1], 2)


def test_minmax_grades_are_those_of_the_protocol():
    assert minmax_grades([0, 3, 1.5, 2.6667]) == [1, 100, 50, 89]
    assert minmax_grades([7, 7]) == [1, 1]


@given(st.lists(st.floats(0, 1e6), min_size=2))
def test_minmax_grades_keep_the_order_between_1_and_100(scores):
    grades = minmax_grades(scores)
    assert all(1 <= grade <= 100 for grade in grades)
    for a, grade_a in zip(scores, grades, strict=True):
        for b, grade_b in zip(scores, grades, strict=True):
            assert a < b or grade_a >= grade_b
    if min(scores) < max(scores):
        assert (min(grades), max(grades)) == (1, 100)


class Table:
    """An encoder whose embeddings are given: {value: vector}."""

    def __init__(self, vectors):
        self.model = torch.nn.Linear(1, 1)
        self.vectors = {"": [-5.0, 3.0]} | vectors  # of no meaning: the mask must keep it out

    def __call__(self, fields, kinds):
        embeddings = {key: torch.tensor([self.vectors[cell] for cell in cells]) for key, cells in fields.items()}
        return embeddings, torch.tensor([[bool(cell) for cell in cells] for cells in fields.values()]).T


def evaluate(encoder, pairs, documents, left, right, **options):
    documents = corpus_of(pairs) if documents is None else documents
    return evaluate_on(encoder, pairs, embed_corpus(encoder, documents, right), left, **options)


TEXT = {"q": "txt"}, {"q": 1.0}
TWO = {"a": "txt", "b": "txt"}, {"a": 1.0, "b": 1.0}


def small_pairs():
    return Pairs(
        Path("pairs.csv"), {"q": ["east", "east", "north"]}, {"a": ["e", "n", "n"], "b": ["", "", ""]},
        [3.0, 1.0, 3.0], ["Q1", "Q1", "Q2"], ["E", "N", "N"],
    )  # fmt: skip


VECTORS = {"east": [1.0, 0.0], "north": [0.0, 1.0], "e": [2.0, 0.1], "n": [0.1, 2.0], "w": [-1.0, 0.0]}


def test_evaluation_ranks_grades_and_measures():
    encoder = Table(VECTORS)
    evaluation = evaluate(encoder, small_pairs(), None, TEXT, TWO, batch_size=1)
    assert evaluation.query_ids == ["Q1", "Q2"]
    assert evaluation.document_ids == ["E", "N"]
    assert evaluation.ranking.tolist() == [[0, 1], [1, 0]]
    assert evaluation.gains.tolist() == [[100, 1], [100, 0]]
    assert evaluation.means["NDCG@10"] == pytest.approx(1.0)
    assert encoder.model.training, "the model is left as it was"


def test_evaluation_on_a_corpus_counts_what_is_not_judged_as_0_and_passes_over_empty_documents():
    corpus = {"W": {"a": "w", "b": ""}, "E2": {"a": "e", "b": "e"}, "none": {"a": "", "b": ""},
              "E": {"a": "e", "b": ""}, "N": {"a": "", "b": "n"}}  # fmt: skip
    evaluation = evaluate(Table(VECTORS), small_pairs(), corpus, TEXT, TWO, top_k=3)
    assert evaluation.document_ids == ["W", "E2", "E", "N"]
    assert evaluation.ranking.tolist() == [[1, 2, 3], [3, 1, 2]]
    assert evaluation.gains.tolist() == [[0, 100, 1], [100, 0, 0]]


def test_field_weights_and_missing_values_decide_the_order():
    pairs = Pairs(Path("p"), {"q": ["east"]}, {"a": ["e"], "b": [""]}, [1.0], ["Q"], ["E"])
    corpus = {"mixed": {"a": "e", "b": "n"}, "E": {"a": "e", "b": ""}, "other": {"a": "n", "b": "e"}}
    kinds = TWO[0]
    order = evaluate(Table(VECTORS), pairs, corpus, TEXT, (kinds, {"a": 0.9, "b": 0.1})).ranking.tolist()
    assert order == [[1, 0, 2]]
    order = evaluate(Table(VECTORS), pairs, corpus, TEXT, (kinds, {"a": 0.1, "b": 0.9})).ranking.tolist()
    assert order == [[1, 2, 0]]


def test_of_a_pair_given_twice_the_last_score_counts():
    pairs = Pairs(Path("p"), {"q": ["east"] * 3}, {"a": ["e", "e", "n"], "b": [""] * 3}, [9.0, 0.0, 9.0],
                  ["Q"] * 3, ["E", "E", "N"])  # fmt: skip
    assert evaluate(Table(VECTORS), pairs, None, TEXT, TWO).gains.tolist() == [[1, 100]]


def test_the_corpus_of_the_pairs_has_each_document_once():
    assert corpus_of(small_pairs()) == {"E": {"a": "e", "b": ""}, "N": {"a": "n", "b": ""}}


def test_random_rankings_are_the_same_for_the_same_seed():
    pairs, documents = small_pairs(), [*"ENABCDFG"]
    first, again, other = (random_ranking(pairs, documents, seed=seed) for seed in (1, 1, 2))
    assert first.ranking.equal(again.ranking)
    assert not first.ranking.equal(other.ranking)
    assert sorted(first.ranking[0].tolist()) == list(range(8))
