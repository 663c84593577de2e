"""Parquet and webdataset give what the same CSV gives; rows are read again where they are."""

from __future__ import annotations

import csv
import io
import itertools
import json
import tarfile

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from gcl_kernels.training.data import Columns, PairFile, load_image, read_documents, read_pairs
from gcl_kernels.training.errors import DataError
from tests.training.files import write_csv, write_parquet, write_tar

LEFT, RIGHT = {"query": "txt"}, {"title": "txt", "image": "img"}
ROWS = [
    {"query": "a", "title": 'A, "quoted"\nline', "image": "red.png", "score": 3},
    {"query": "b", "title": None, "image": "red.png", "score": 1.5},
    {"query": "é", "title": "C", "image": None, "score": 0},
]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    return tmp_path


def columns_of(pairs):
    return pairs.left, pairs.right, pairs.scores, pairs.query_ids, pairs.document_ids


def test_parquet_is_read_as_the_same_csv(folder):
    expected = read_pairs(write_csv(folder / "pairs.csv", ROWS), LEFT, RIGHT, "score")
    got = read_pairs(write_parquet(folder / "pairs.parquet", ROWS), LEFT, RIGHT, "score")
    assert columns_of(got) == columns_of(expected)
    assert expected.right["title"] == ['A, "quoted"\nline', "", "C"]


def test_bad_rows_of_parquet_are_named_by_their_number(folder):
    rows = [*ROWS, {"query": "d", "title": "D", "image": "none.png", "score": -1}]
    path = write_parquet(folder / "pairs.parquet", rows)
    with pytest.raises(DataError) as caught:
        read_pairs(path, LEFT, RIGHT, "score")
    assert str(caught.value) == (
        f"{path}, row 4: expected a finite number >= 0 in column 'score', got '-1.0'; "
        f"expected a readable image in column 'image', got no file '{folder / 'none.png'}'"
    )
    assert len(read_pairs(path, LEFT, RIGHT, "score", skip_bad_rows=True)) == 3
    with pytest.raises(DataError, match="expected one column 'price', got 0 among the columns"):
        read_pairs(path, LEFT, RIGHT, "price")
    path.write_bytes(b"PAR1 not")
    with pytest.raises(DataError, match="expected a readable Parquet file, got"):
        read_pairs(path, LEFT, RIGHT, "score")


def test_webdataset_samples_are_rows_and_their_images_are_read_from_the_tar_file(folder):
    image = (folder / "red.png").read_bytes()
    describe = lambda **row: json.dumps(row).encode()  # noqa: E731
    write_tar(folder / "pairs-0.tar", [("0.json", describe(query="a", title="A", score=2)), ("0.png", image)])
    write_tar(folder / "pairs-1.tar", [("x/1.png", image), ("x/1.json", describe(query="b", score=1)), ("x/1.txt", b"B"),
                                       ("x/2.json", b"{"), ("x/3.json", describe(query="c", score=1)),
                                       ("x/3.png", image[:50])])  # fmt: skip
    right = {"title": "txt", "txt": "txt", "png": "img"}
    for path in (folder / "pairs-*.tar", folder):
        pairs = read_pairs(path, {"query": "txt"}, right, "score", dataset_type="webdataset", skip_bad_rows=True)
        assert pairs.left["query"] == ["a", "b"]
        assert (pairs.right["title"], pairs.right["txt"], pairs.scores) == (["A", ""], ["", "B"], [2.0, 1.0])
        assert [load_image(path).getpixel((0, 0)) for path in pairs.right["png"]] == [(255, 0, 0)] * 2
        assert pairs.bad_count == 2
        assert "sample 'x/3': expected a readable image in column 'png', got a file that cannot" in pairs.bad_rows[1]
        assert pairs.bad_rows[0].startswith(f"{folder / 'pairs-1.tar'}, sample 'x/2': expected JSON in its json member")


def test_a_truncated_or_compressed_tar_file_costs_its_own_rows(folder):
    rows = [(f"{n}.json", json.dumps({"query": "a", "title": f"T{n}", "score": 1}).encode()) for n in range(3)]
    whole = write_tar(folder / "a.tar", rows).read_bytes()
    (folder / "b.tar").write_bytes(whole[:700])
    with tarfile.open(folder / "c.tar", "w:gz") as archive:
        archive.add(folder / "red.png")
    pairs = read_pairs(folder, LEFT, {"title": "txt"}, "score", skip_bad_rows=True)
    assert pairs.right["title"][:3] == ["T0", "T1", "T2"]
    assert [line.split(":")[0] for line in pairs.bad_rows] == [str(folder / "b.tar"), str(folder / "c.tar")]
    with pytest.raises(DataError, match="expected webdataset tar files, got none"):
        read_pairs(folder / "none-*.tar", LEFT, RIGHT, "score", dataset_type="webdataset")


CELL = st.text(st.sampled_from('ab,"\n\ré '), min_size=1, max_size=6).map(str.strip).filter(bool)


@given(st.lists(st.tuples(CELL, CELL, st.floats(0, 9)), min_size=1, max_size=8), st.booleans(), st.data())
def test_any_rows_in_any_order_are_those_of_the_file(tmp_path_factory, rows, marked, data):
    path = tmp_path_factory.mktemp("rows") / "pairs.csv"
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("query", "title", "score"), *rows])
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + buffer.getvalue().encode())
    file = PairFile(path, Columns(LEFT, {"title": "txt"}, "score"))
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    pairs = file.take(order)
    assert list(zip(pairs.left["query"], pairs.right["title"], pairs.scores, strict=True)) == [rows[n] for n in order]
    assert file.scores.tolist() == [score for _, _, score in rows]
    same = [[a[0] == b[0] for b in rows] for a in rows]
    assert (file.query_numbers[:, None] == file.query_numbers).tolist() == same
    assert (file.query_numbers >= 0).all()


def test_the_gcl_authors_layout(folder):
    row = {"query": "q", "product_id": "7", "position": 1, "title": "T", "pair_id": "p", "score_linear": 100,
           "score_reciprocal": 1.0, "no_score": 1, "query_id": "9", "image_local": "red.png"}  # fmt: skip
    path = write_csv(folder / "query_0_product_id_0.csv", [row, row | {"product_id": "8", "score_linear": 1}])
    fields = {"image_local": "img", "title": "txt"}
    pairs = read_pairs(path, LEFT, fields, "score_linear", query_id_key="query_id", document_id_key="product_id")
    assert (pairs.query_ids, pairs.document_ids, pairs.scores) == (["9", "9"], ["7", "8"], [100.0, 1.0])


def test_document_ids_that_come_twice_are_counted(folder, capsys):
    """In whatever order they come, the fullest counts, and of equally full ones that with the smallest values."""
    path = folder / "corpus.json"
    for same in itertools.permutations(('"1": {"title": "A"}', '"1": {"title": ""}', '"1": {"title": "C"}')):
        path.write_text(f'{{"2": {{"title": "B"}}, {", ".join(same)}}}')
        assert read_documents(path, {"title": "txt"}) == {"2": {"title": "B"}, "1": {"title": "A"}}
        assert "got 2 ids again" in capsys.readouterr().out
    path.write_text('{"1": {"title": "A"}, "2": {"title": "B"}, "1": {"title": "C"}}')
    assert read_documents(path, {"title": "txt"})["1"] == {"title": "A"}
    assert capsys.readouterr().out == (
        f"{path}: expected each document id once, got 1 ids again, first '1'; the fullest document of an id counts\n"
    )


def test_images_may_go_unchecked(folder):
    (folder / "broken.png").write_bytes(b"x")
    path = write_csv(
        folder / "pairs.csv", [ROWS[0] | {"image": name} for name in ("none.png", "broken.png", "red.png")]
    )
    bad = {
        check: read_pairs(path, LEFT, RIGHT, "score", check_images=check, skip_bad_rows=True).bad_count
        for check in ("decode", "exists", "none")
    }
    assert bad == {"decode": 2, "exists": 1, "none": 0}
