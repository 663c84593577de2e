"""Search: the exact ranking against a dense one, what is kept on disk, the terminal command, exports and indexes."""

from __future__ import annotations

import importlib.util
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gcl_kernels.training import indexes, searching
from gcl_kernels.training import search as search_command
from gcl_kernels.training.checkpoint import OURS
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.openclip import TINY_MODEL, create_model
from gcl_kernels.training.ranking import embed, embed_corpus
from gcl_kernels.training.ranking import search as search_all
from gcl_kernels.training.search import main
from gcl_kernels.training.search_model import SearchModel
from gcl_kernels.training.searching import Searcher

OPTIONS = {
    "model": TINY_MODEL, "left_keys": ["query"], "right_keys": ["title", "image"], "left_weights": [1.0],
    "right_weights": [0.3, 0.7], "img_or_txt": [["txt"], ["txt", "img"]], "context_length": None,
    "weight_key": "score", "doc_id_key": "id",
}  # fmt: skip
SIDE = ({"title": "txt", "image": "img"}, {"title": 0.3, "image": 0.7})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save({"state_dict": create_model(TINY_MODEL)[0].state_dict(), OURS: {"options": OPTIONS, "step": 7}}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return SearchModel.load(str(checkpoint))


@pytest.fixture
def corpus(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    documents = {
        "1": {"title": "a red shoe", "image": "red.png", "brand": "acme"},
        "2": {"title": "a blue shoe", "image": "blue.png", "brand": "other"},
        "3": {"title": "a <b>hat</b>\x1b[31m\nred", "brand": "acme"},
        "4": {"image": "gone.png", "brand": "acme"},
        "5": {"title": "a blue shoe", "image": "blue.png", "brand": "acme"},
        "6": {"brand": "acme"},
    }
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(documents))
    return path


def unit(draws, *shape, seed):
    """Few distinct coordinates, so that many scores are equal or close."""
    numbers = np.random.default_rng(seed).integers(-draws, draws + 1, shape).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(numbers), dim=-1)


def searcher_of(fields, weights, **columns):
    count = len(next(iter(fields.values())))
    ids = [f"{number:04}" for number in reversed(range(count))]
    kinds = dict.fromkeys(fields, "txt")
    model = SearchModel("none", None, None, None, None, ({"query": "txt"}, {"query": 1.0}), (kinds, weights))
    documents = {key: {name: of[place] for name, of in columns.items()} for place, key in enumerate(ids)}
    return Searcher(model, documents, ids, fields)


WEIGHTS = [None, {"a": 1.0}, {"a": 0.2, "b": 0.8}, {"a": 3.0, "b": 7.0}, {"a": 0.001, "b": 1.0}]


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 9]), st.integers(1, 40), st.booleans(), st.sampled_from(WEIGHTS))
def test_search_is_the_dense_ranking_ties_included(seed, draws, k, filtered, weights):
    fields = {name: unit(draws, 30, 5, seed=seed + place) for place, name in enumerate("ab")}
    for vectors in fields.values():  # some documents lack a field, some both
        vectors[torch.from_numpy(np.random.default_rng(seed).random(30)) < 0.2] = 0
    fields["b"][7], fields["a"][7] = -fields["a"][3], fields["a"][3]
    searcher = searcher_of(fields, {"a": 0.3, "b": 0.7}, colour=[str(number % 3) for number in range(30)])
    query = unit(draws, 5, seed=seed + 9)
    if not query.any():
        return
    hits = searcher.search(query, k, weights=weights, where={"colour": ["0", "2"]} if filtered else None)
    u = weights or {"a": 0.3, "b": 0.7}
    sums = sum(u.get(name, 0.0) / sum(u.values()) * of.double() for name, of in fields.items())
    length = sums.norm(dim=1, keepdim=True)
    vectors = sums / length.clamp_min(1e-12)
    if u in ({"a": 0.3, "b": 0.7}, {"a": 3.0, "b": 7.0}):
        vectors = vectors.float().double()  # as they are kept
    scores = (vectors @ query.double()).float()
    there = (length[:, 0] > 1e-4) & torch.tensor([not filtered or number % 3 != 1 for number in range(30)])
    order = [place for place in torch.sort(scores, descending=True, stable=True).indices.tolist() if there[place]]
    assert [hit.position for hit in hits] == order[:k]
    assert [hit.score for hit in hits] == scores[order[:k]].tolist()
    assert [hit.document_id for hit in hits] == [searcher.document_ids[place] for place in order[:k]]


@pytest.mark.parametrize("at_once", [1, 64, 1 << 24])
@pytest.mark.parametrize("weights", [None, {"a": 0.2, "b": 0.8}])
def test_queries_searched_together_find_what_each_finds_alone(at_once, weights, monkeypatch):
    searcher = searcher_of({name: unit(9, 30, 5, seed=place) for place, name in enumerate("ab")}, {"a": 0.3, "b": 0.7})
    queries, ks = unit(9, 7, 5, seed=3), [1, 2, 30, 50, 3, 4, 5]
    alone = [searcher.search(query, k, weights=weights) for query, k in zip(queries, ks, strict=True)]
    monkeypatch.setattr(searching, "SCORES_AT_ONCE", at_once)
    assert searcher.search_many(queries, ks, weights=weights) == alone
    assert [len(hits) for hits in alone] == [1, 2, 30, 30, 3, 4, 5]
    with pytest.raises(InputError, match="k: expected a number > 0, got 0"):
        searcher.search_many(queries, [*ks[:-1], 0])


def test_equal_documents_of_a_large_corpus_come_in_the_order_of_evaluation():
    vectors = unit(1, 1, 64, seed=0).repeat(5000, 1)
    vectors[::7] = unit(1, 1, 64, seed=1)
    searcher = searcher_of({"title": vectors}, {"title": 1.0})
    query = unit(3, 64, seed=2)
    places, scores = search_all(query[None], searcher.vectors, 900)
    hits = searcher.search(query, 900)
    assert [hit.position for hit in hits] == places[0].tolist()
    assert [hit.score for hit in hits] == scores[0].tolist()


def test_a_corpus_is_embedded_as_in_evaluation(model, corpus, capsys):
    searcher = Searcher.load(model, corpus, columns=["brand"])
    assert searcher.document_ids == ["5", "3", "2", "1"]
    documents = {
        key: {field: searcher.documents[key].get(field, "") for field in SIDE[0]} for key in searcher.documents
    }
    expected = embed_corpus(model.encoder, documents, SIDE)
    assert expected.document_ids == searcher.document_ids
    torch.testing.assert_close(searcher.vectors, expected.embeddings, atol=1e-6, rtol=0)
    assert "1 images could not be read" in capsys.readouterr().out
    assert searcher.title(1).startswith("a <b>hat")
    assert [hit.document_id for hit in searcher.search("a blue shoe", 4)].index("5") + 1 == [
        hit.document_id for hit in searcher.search("a blue shoe", 4)
    ].index("2")


def test_a_query_of_text_and_picture_is_their_weighted_mean(model, corpus):
    path = str(corpus.with_name("red.png"))
    text, image = (
        embed(model.encoder, {"f": [value]}, {"f": kind}, {"f": 1.0})[0]
        for value, kind in (("shoe", "txt"), (path, "img"))
    )
    expected = torch.nn.functional.normalize(0.25 * text + 0.75 * image, dim=0)
    weights = {"text": 1.0, "image": 3.0}
    for picture in (path, Image.open(path).convert("RGB")):
        found = model.embed_query({"text": "shoe", "image": picture}, weights)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.embed_query({"image": path, "query": ""}), image, atol=1e-6, rtol=0)
    for values, words in (
        ("", "a text or an image"),
        ({"titel": "x"}, "fields among"),
        ({"image": "/dev/zero"}, "device"),
    ):
        with pytest.raises(InputError, match=words):
            model.embed_query(values)


def test_threads_get_the_answers_of_one(model, corpus):
    searcher = Searcher.load(model, corpus, columns=["brand"])
    queries = [f"shoe {number}" for number in range(40)]
    answer = lambda query: searcher.search(query, 3, weights={"title": 1.0}, where={"brand": ["acme"]})  # noqa: E731
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, queries))
    assert together == [answer(query) for query in queries]
    assert len({tuple(hits) for hits in together}) > 1


def test_vectors_are_kept_for_the_same_model_and_documents_alone(model, corpus, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(searching, "embed", lambda *a, **o: calls.append(1) or embed(*a, **o))

    def opened():
        del calls[:]
        searcher = Searcher.load(model, corpus, folder=tmp_path / "kept", columns=["brand"])
        return [tuple(hit) for hit in searcher.search("red", 3)], len(calls)

    first, embedded = opened()
    assert embedded == 2
    assert opened() == (first, 0)
    corpus.write_text(corpus.read_text().replace("a red shoe", "another"))
    assert opened()[1] == 2
    assert "made again: tokens, corpus" in capsys.readouterr().out
    Image.new("RGB", (32, 32), "green").save(corpus.with_name("gone.png"))
    assert opened()[1] == 2
    # A half-written file, and somebody else's.
    vectors = tmp_path / "kept" / "field-0.npy"
    vectors.write_bytes(vectors.read_bytes()[:100])
    assert opened()[1] == 2
    (tmp_path / "kept" / "embedded.json").write_text("[]")
    with pytest.raises(InputError, match="another structure"):
        opened()


def run(*argv, capsys):
    try:
        status = main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_ranks_filters_and_shows(checkpoint, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run("red", f"--pretrained={checkpoint}", f"--corpus={corpus}", "--show=brand", capsys=capsys)
    assert (status, err) == (0, "")
    lines = out[out.index("to search)") :].splitlines()[1:]
    assert len(lines) == 4
    assert sorted(lines, reverse=True, key=lambda line: float(line.split()[1])) == lines
    assert "\x1b" not in out, "a title does not steer the terminal"
    hat = next(line for line in lines if "hat" in line)
    assert hat.endswith(r"a <b>hat</b>\x1b[31m\nred  [3]  brand=acme")

    monkeypatch.setattr("sys.stdin", io.StringIO("red shoe\n\nblue\n"))
    status, out, err = run(f"--pretrained={checkpoint}", f"--corpus={corpus}", "--json", "--where=brand=acme",
                           "--weights=title=1", "--top-k=9", capsys=capsys)  # fmt: skip
    assert "4 of" not in err
    assert "3 of 4 documents have brand=acme" in err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["query"] for answer in answers] == [{"query": "red shoe"}, {"query": "blue"}]
    assert {found["id"] for found in answers[0]["results"]} == {"1", "3", "5"}


def test_a_corpus_of_rows_keeps_the_good_ones(checkpoint, corpus, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    table.write_text('title,image,price\na red shoe,red.png,1\n,,5\n"stray,red.png,4\na hat,,7\na hat,,8\n')
    status, out, _ = run("hat", f"--pretrained={checkpoint}", f"--corpus={table}", f"--folder={tmp_path / 'f'}",
                         "--show=price", capsys=capsys)  # fmt: skip
    assert status == 0
    assert f"{table}, line 3: expected a value in at least one of the columns ['title', 'image'], got none" in out
    assert f"{table}, line 4: expected well-formed quotes" in out
    assert sum("a hat" in line for line in out.splitlines()) == 2  # two prices, so two documents


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--where=colour=red"], "expected a field 'colour' in at least one document"),
        (["--where=colour"], "expected NAME=VALUE, got colour"),
        (["--weights=titel=1"], "weights: expected fields among ['title', 'image'], got ['titel']"),
        (["--weights=title=0"], "weights: expected numbers >= 0, not all 0"),
        (["--query-weights=foo=1"], "--query-weights: expected fields among"),
        (["--image=none.png"], "query: expected a readable image, got no file 'none.png'"),
        (["--corpus=none.json"], "expected a readable file"),
        (["--pretrained=none.pt"], "--pretrained: expected a readable file"),
        (["--right-weights=1"], "as many of each"),
    ],
)
def test_faults_are_one_line(checkpoint, corpus, tmp_path, capsys, argv, words):
    status, _, err = run("red", f"--pretrained={checkpoint}", f"--corpus={corpus}", f"--folder={tmp_path / 'kept'}", *argv,
                         capsys=capsys)  # fmt: skip
    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("form", ["npz", "parquet", "faiss", "hnswlib"])
def test_exports_hold_the_vectors(form, checkpoint, model, corpus, tmp_path, capsys):
    module = {"npz": "numpy", "parquet": "pyarrow"}.get(form, form)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    library = indexes.import_faiss() if form == "faiss" else importlib.import_module(module)
    out = tmp_path / f"out.{form}"
    status, said, err = run(f"--pretrained={checkpoint}", f"--corpus={corpus}", f"--export={form}", f"--out={out}",
                            f"--folder={tmp_path / 'kept'}", "--show=brand", capsys=capsys)  # fmt: skip
    assert (status, err) == (0, "")
    assert f"{form}: 4 vectors in {out}" in said
    searcher = Searcher.load(model, corpus)
    vectors, query = searcher.vectors.numpy(), searcher.model.embed_query("hat").numpy()[None]
    best = [hit.document_id for hit in searcher.search("hat", 1)]
    beside = out.with_name(f"{out.name}.ids.json")
    ids = json.loads(beside.read_text()) if beside.exists() else []
    if form == "npz":
        content = np.load(out)
        assert content["ids"].tolist() == searcher.document_ids
        np.testing.assert_array_equal(content["vectors"], vectors)
    elif form == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(out).to_pydict()
        assert table["id"] == searcher.document_ids
        np.testing.assert_array_equal(np.array(table["vector"], np.float32), vectors)
        assert table["brand"] == ["acme", "acme", "other", "acme"]
    elif form == "faiss":
        assert [ids[library.read_index(str(out)).search(query, 1)[1][0, 0]]] == best
    else:
        index = library.Index(space="ip", dim=vectors.shape[1])
        index.load_index(str(out))
        assert [ids[index.knn_query(query, k=1)[0][0, 0]]] == best


@pytest.mark.parametrize("kind", ["faiss", "hnswlib"])
def test_an_index_is_held_against_the_exact_search(kind, tmp_path):
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    searcher = searcher_of({"title": unit(9, 2000, 16, seed=0)}, {"title": 1.0})
    query = unit(9, 16, seed=5)
    exact = searcher.search(query, 10)
    said = []
    recall = searcher.use_index(kind, folder=tmp_path, say=said.append)
    assert recall > 0.9
    assert f"index of {kind}: recall@10 {recall:.3f}" in said[0]
    found = searcher.search(query, 10)
    assert set(found) <= {*exact, *found}
    assert {hit: hit.score for hit in found if hit in exact} == {hit: hit.score for hit in exact if hit in found}
    # Read again, and another's not.
    again = searcher_of(searcher.fields, {"title": 1.0})
    assert again.use_index(kind, folder=tmp_path, say=said.append) == recall
    other = searcher_of({"title": unit(9, 2000, 16, seed=1)}, {"title": 1.0})
    assert other.use_index(kind, folder=tmp_path, say=said.append) > 0.9


def test_an_index_that_is_not_installed_is_named(checkpoint, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(indexes.importlib.util, "find_spec", lambda name: None)
    for option in ("--index=faiss", "--export=faiss"):
        status, _, err = run("red", f"--pretrained={checkpoint}", f"--corpus={corpus}", option, capsys=capsys)
        assert status == 2
        assert err == "faiss: expected the package faiss-cpu, got none: pip install faiss-cpu\n"


def test_a_large_corpus_without_a_library_is_searched_exactly(checkpoint, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(indexes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(search_command, "INDEXED_FROM", 4)
    status, out, _ = run(
        "red", f"--pretrained={checkpoint}", f"--corpus={corpus}", f"--folder={tmp_path}", capsys=capsys
    )
    assert status == 0
    assert "exact search, as neither faiss nor hnswlib is installed" in out


def test_two_models_share_documents(model, corpus):
    first = Searcher.load(model, corpus)
    second = Searcher.of_documents(SearchModel.load(None, model=TINY_MODEL, right_keys=["title"]), first.documents)
    assert second.documents is first.documents
    assert second.document_ids == ["5", "3", "2", "1"]


def test_the_encoder_of_a_plain_open_clip_model_takes_what_the_command_line_says(corpus, monkeypatch):
    model = SearchModel.load(None, model=TINY_MODEL, right_keys=["title"])
    assert isinstance(model.encoder, FieldEncoder)
    assert model.left == ({"text": "txt"}, {"text": 1.0})
    assert len(Searcher.load(model, corpus)) == 4
