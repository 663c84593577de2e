"""Exact search, the grades of the protocol, and evaluation end to end with an encoder that is a table."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gcl_kernels.training.data import Pairs
from gcl_kernels.training.ranking import (
    corpus_of,
    embed,
    embed_corpus,
    minmax_grades,
    random_ranking,
    say_contradictions,
    search,
)
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


def ranked(evaluation):
    return [[evaluation.document_ids[place] for place in places] for places in evaluation.ranking.tolist()]


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
    assert ranked(evaluation) == [["E", "N"], ["N", "E"]]
    assert evaluation.gains.tolist() == [[100, 1], [100, 0]]
    assert evaluation.means["NDCG@10"] == pytest.approx(1.0)
    assert encoder.model.training, "the model is left as it was"


def test_evaluation_on_a_corpus_counts_what_is_not_judged_as_0_and_passes_over_empty_documents():
    corpus = {"W": {"a": "w", "b": ""}, "E2": {"a": "e", "b": "e"}, "none": {"a": "", "b": ""},
              "E": {"a": "e", "b": ""}, "N": {"a": "", "b": "n"}}  # fmt: skip
    evaluation = evaluate(Table(VECTORS), small_pairs(), corpus, TEXT, TWO, top_k=3)
    # E2 and E have one direction: equal scores go by id, descending.
    assert ranked(evaluation) == [["E2", "E", "N"], ["N", "E2", "E"]]
    assert evaluation.gains.tolist() == [[0, 100, 1], [100, 0, 0]]


def test_field_weights_and_missing_values_decide_the_order():
    pairs = Pairs(Path("p"), {"q": ["east"]}, {"a": ["e"], "b": [""]}, [1.0], ["Q"], ["E"])
    corpus = {"mixed": {"a": "e", "b": "n"}, "E": {"a": "e", "b": ""}, "other": {"a": "n", "b": "e"}}
    kinds = TWO[0]
    order = ranked(evaluate(Table(VECTORS), pairs, corpus, TEXT, (kinds, {"a": 0.9, "b": 0.1})))
    assert order == [["E", "mixed", "other"]]
    order = ranked(evaluate(Table(VECTORS), pairs, corpus, TEXT, (kinds, {"a": 0.1, "b": 0.9})))
    assert order == [["E", "other", "mixed"]]


@pytest.mark.parametrize("scores", [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
def test_of_a_pair_given_twice_the_highest_score_counts(scores):
    pairs = Pairs(Path("p"), {"q": ["east"] * 3}, {"a": ["e", "e", "n"], "b": [""] * 3}, scores,
                  ["Q"] * 3, ["E", "E", "N"])  # fmt: skip
    assert evaluate(Table(VECTORS), pairs, None, TEXT, TWO).gains.tolist() == [[100, 1]]


def test_the_corpus_of_the_pairs_has_each_document_once():
    assert corpus_of(small_pairs()) == {"E": {"a": "e", "b": ""}, "N": {"a": "n", "b": ""}}


def test_random_rankings_are_the_same_for_the_same_seed():
    pairs, documents = small_pairs(), [*"ENABCDFG"]
    first, again, other = (random_ranking(pairs, documents, seed=seed) for seed in (1, 1, 2))
    assert first.ranking.equal(again.ranking)
    assert not first.ranking.equal(other.ranking)
    assert sorted(first.ranking[0].tolist()) == list(range(8))


class Unsteady(Table):
    """Embeds a value to the last bits by its place in the batch and by how many are beside it, as batched encoders do."""

    def __call__(self, fields, kinds):
        embeddings, mask = super().__call__(fields, kinds)
        for key, vectors in embeddings.items():
            places = torch.arange(len(vectors))[:, None]
            embeddings[key] = vectors * (1 + 1e-6 * torch.sin(places * 3.7 + len(vectors) + torch.arange(2)))
        return embeddings, mask


@st.composite
def listed_twice(draw):
    """A corpus and judged rows with many equal cells and repeated pairs, each in two orders."""
    cell, identity = st.sampled_from(["", "e", "n", "w"]), st.sampled_from("ABCDEFGHIJ")
    corpus = draw(st.dictionaries(identity, st.fixed_dictionaries({"a": cell, "b": cell}), min_size=1))
    corpus["K"] = {"a": "e", "b": ""}
    score = st.sampled_from([0.0, 1.0, 2.5, 9.0])
    row = st.tuples(st.sampled_from(["east", "north", "e"]), identity, st.sampled_from(["e", "n"]), cell, score)
    rows = draw(st.lists(row, min_size=1, max_size=20))
    return (corpus, dict(draw(st.permutations(list(corpus.items()))))), (rows, draw(st.permutations(rows)))


def pairs_of(rows):
    queries, documents, a, b, scores = map(list, zip(*rows, strict=True))
    # The ids are fewer than the texts: rows of one id differ.
    ids = [query[0] for query in queries]
    return Pairs(Path("p"), {"q": queries}, {"a": a, "b": b}, scores, ids, documents)


@pytest.mark.parametrize("with_corpus", [True, False])
@given(listed_twice(), st.integers(1, 7), st.sampled_from([2, 1000]))
def test_no_metric_depends_on_the_order_of_a_file(with_corpus, listed, batch_size, top_k):
    results = []
    for corpus, rows in zip(*listed, strict=True):
        documents = corpus if with_corpus else None
        found = evaluate(Unsteady(VECTORS), pairs_of(rows), documents, TEXT, TWO, batch_size=batch_size, top_k=top_k)
        chance = random_ranking(pairs_of(rows), found.document_ids, top_k=top_k)
        results.append(
            (found.means, found.rows(), dict(zip(found.query_ids, ranked(found), strict=True)), chance.means)
        )
    assert results[0] == results[1]


@given(st.lists(st.sampled_from(["e", "n", "w", "east"]), min_size=1), st.integers(1, 5), st.randoms())
def test_an_embedding_does_not_depend_on_the_rows_order_and_equal_rows_have_one(cells, batch_size, random):
    def vectors(cells):
        return embed(Unsteady(VECTORS), {"a": cells}, {"a": "txt"}, {"a": 1.0}, batch_size=batch_size)

    first = dict(zip(cells, vectors(cells).tolist(), strict=True))
    shuffled = random.sample(cells, len(cells))
    assert vectors(shuffled).tolist() == [first[cell] for cell in shuffled]
    for cell, vector in first.items():
        expected = torch.nn.functional.normalize(torch.tensor(VECTORS[cell]), dim=0)
        assert torch.tensor(vector).allclose(expected, atol=1e-5)


@pytest.mark.parametrize("best_first", [True, False])
def test_equal_scores_go_by_document_id_descending_as_in_trec_eval(best_first):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec-eval-terrier is the oracle and is not installed")
    numbers = range(50) if best_first else range(49, -1, -1)
    corpus = {f"d{(7 * number) % 50}": {"a": "e", "b": ""} for number in numbers}
    scores = {f"d{(7 * number) % 50}": 50 - number for number in range(50)}
    pairs = Pairs(Path("p"), {"q": ["east"] * 50}, {"a": ["e"] * 50, "b": [""] * 50}, list(map(float, scores.values())),
                  ["Q"] * 50, list(scores))  # fmt: skip
    evaluation = evaluate(Table(VECTORS), pairs, corpus, TEXT, TWO)
    oracle = pytrec_eval.RelevanceEvaluator(
        {"Q": dict(zip(scores, minmax_grades(pairs.scores), strict=True))}, {"ndcg_cut.10"}
    )
    expected = oracle.evaluate({"Q": dict.fromkeys(corpus, 1.0)})["Q"]["ndcg_cut_10"]
    assert evaluation.means["NDCG@10"] == pytest.approx(expected, abs=1e-9)
    assert ranked(evaluation) == [sorted(corpus, reverse=True)]


def test_contradictions_of_a_test_file_are_said_once(capsys):
    pairs = Pairs(
        Path("p"), {"q": ["x", "y", "z", "z"]}, {}, [1.0, 2.0, 1.0, 1.0], ["Q", "Q", "R", "R"], ["E", "E", "E", "E"]
    )
    say_contradictions("p.csv", pairs)
    assert capsys.readouterr().out == (
        "p.csv: expected one score for a pair, got more for 1, first 'Q' and 'E'; the highest counts\n"
        "p.csv: expected the same cells in all rows of a query, got others for 1, first 'Q'; the fullest row counts\n"
    )
    say_contradictions("p.csv", small_pairs())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])
def test_equal_documents_have_equal_scores_wherever_they_lie(count):
    # In float32 a product of one or two queries with equal documents differs in its last bit by the place in the matrix.
    generator = torch.Generator().manual_seed(0)
    queries, document = (
        torch.nn.functional.normalize(torch.randn(rows, 512, generator=generator), dim=1) for rows in (count, 1)
    )
    places, scores = search(queries, document.repeat(1055, 1), 1055, document_chunk=1000)
    assert places.tolist() == [list(range(1055))] * count
    assert [len(row.unique()) for row in scores] == [1] * count
    assert scores[:, 0].allclose(queries @ document[0], atol=1e-6)
