"""What a value is does not depend on the type of the file that it comes from."""

from __future__ import annotations

import json
import math

import pytest

from gcl_kernels.training.data import read_documents, read_pairs
from gcl_kernels.training.data.values import LONGEST_CELL, text_of
from gcl_kernels.training.errors import DataError
from tests.training.files import write_csv, write_parquet, write_samples, write_tar

GOOD = {"query": "q", "title": "T", "score": 1}


def titles_of_samples(folder, values):
    path = write_samples(folder / "a.tar", [GOOD, *({**GOOD, "title": value} for value in values)])
    return titles(path)


def titles_of_parquet(folder, values):
    return titles(write_parquet(folder / "a.parquet", [{**GOOD, "title": value} for value in values]))


def titles_of_documents(folder, values):
    path = folder / "a.json"
    path.write_text(json.dumps({str(number): {"title": value} for number, value in enumerate(values)}))
    return [document["title"] for document in read_documents(path, {"title": "txt"}).values()]


def titles(path, **options):
    """With the query as a second field of the document, so that a missing title is no bad row."""
    return read_pairs(path, {"query": "txt"}, {"title": "txt", "query": "txt"}, "score", **options).right["title"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (["A", None, " B "], ["A", "", "B"]),
        ([math.nan, 3.0, 0.1, 1e300], ["", "3.0", "0.1", "1e+300"]),
        ([3, None, -7], ["3", "", "-7"]),
        (["nan", "None", "null", "x" * 200_000], ["nan", "None", "null", "x" * 200_000]),
        (["\0", "a\nb", "é"], ["\0", "a\nb", "é"]),
    ],
    ids=["null", "floats", "integers", "words", "characters"],
)
def test_texts_and_numbers_are_the_same_from_every_type(tmp_path, values, texts):
    assert titles_of_samples(tmp_path, values)[1:] == texts
    assert titles_of_parquet(tmp_path, values) == texts
    assert titles_of_documents(tmp_path, values) == texts


def test_a_table_is_the_same_from_every_type(tmp_path):
    pandas_like = [{"query": "q", "title": title, "score": score} for title, score in [("A", 1), ("3.0", 2.5), ("", 3)]]
    expected = ["A", "3.0", ""]
    assert titles(write_csv(tmp_path / "a.csv", pandas_like)) == expected
    assert titles(write_csv(tmp_path / "a.tsv", pandas_like)) == expected
    assert titles(write_parquet(tmp_path / "a.parquet", pandas_like)) == expected
    assert titles(write_samples(tmp_path / "a.tar", pandas_like)) == expected


def test_a_single_precision_number_is_its_shortest_notation(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    columns = {"query": ["a", "b", "c"], "title": pa.array([0.1, None, math.nan], pa.float32()), "score": [1, 2, 3]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert titles(tmp_path / "a.parquet") == ["0.1", "", ""]


@pytest.mark.parametrize(
    ("value", "kind"),
    [(["a", "b"], "list"), ({"en": "x"}, "dict"), (True, "bool"), ([], "list"), ({"a": None}, "dict")],
)
@pytest.mark.parametrize("column", ["title", "image", "score", "query", "id"])
def test_what_is_neither_text_nor_a_number_is_a_bad_row(tmp_path, value, kind, column):
    good = {**GOOD, "image": "", "id": "7"}
    fault = f"expected text or a number in column '{column}', got {kind}"
    samples = write_samples(tmp_path / "a.tar", [good, {**good, column: value}])
    rows = write_parquet(
        tmp_path / "a.parquet", [{**good, column: None if column == "title" else value}, good | {column: value}]
    )
    options = {"document_id_key": "id", "check_images": "none"}
    for path, place in ((samples, "sample '1'"), (rows, "row 2")):
        with pytest.raises(DataError) as caught:
            read_pairs(path, {"query": "txt"}, {"title": "txt", "image": "img"}, "score", **options)
        assert str(caught.value).splitlines()[-1] == f"{path}, {place}: {fault}"


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"title": ["a", "b"]}, "expected text or a number in field 'title', got list"),
        ({"title": {"en": "x"}}, "expected text or a number in field 'title', got dict"),
        ({"title": True}, "expected text or a number in field 'title', got bool"),
        ({"image": ["a.png"]}, "expected text or a number in field 'image', got list"),
        ({"title": math.inf}, "expected text or a finite number in field 'title', got inf"),
        ({"title": "t \ud83d"}, "expected UTF-8 text, got half a surrogate pair, \\ud83d"),
    ],
)
def test_bad_values_of_documents_are_named(tmp_path, capsys, document, fault):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({"a": {"title": "A", "image": ""}, "b": document, "c": {"title": math.nan}}))
    fields = {"title": "txt", "image": "img"}
    with pytest.raises(DataError) as caught:
        read_documents(path, fields)
    assert str(caught.value) == f"{path}, document 'b': {fault}"
    assert read_documents(path, fields, skip_bad_rows=True).keys() == {"a", "c"}
    assert capsys.readouterr().out == f"{path}: 1 bad documents skipped:\n  {path}, document 'b': {fault}\n"


def test_ids_of_documents_follow_the_rules_of_text(tmp_path):
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({"a": {"t": "A"}, " b ": {"t": "B"}, "c\ud800\n": {"t": "C"}, "": {"t": "D"}}))
    with pytest.raises(DataError) as caught:
        read_documents(path, {"t": "txt"})
    assert str(caught.value).splitlines() == [
        f"{path}, document 'c\\ud800': expected UTF-8 text, got half a surrogate pair, \\ud800",
        f"{path}, document '': expected an id, got none",
    ]
    assert read_documents(path, {"t": "txt"}, skip_bad_rows=True) == {"a": {"t": "A"}, "b": {"t": "B"}}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"1": {"a": "x", "b": "y"}}', ": expected a field 'title' in at least one document, got the fields ['a', 'b']"),
        ('{"1": {"title": "A", "title": "B"}}', ", document '1': expected each field once, got 'title' again"),
        ('{"1": {"title": ' + "1" * 5000 + "}}", ": expected JSON that can be read, got "),
        ("[" * 100_000, ": expected JSON that can be read, got "),
        ("", ", line 1: expected JSON, got 'Expecting value'"),
        ('{"1": {"title": "A"}}\n{"2": {}}', ", line 2: expected JSON, got 'Extra data'"),
        ('{"1": 5}', ", line 1: expected a JSON object {document id: {field: value}}, got another structure"),
    ],
    ids=["no such field", "repeated", "long number", "deep", "empty", "lines", "structure"],
)  # fmt: skip
def test_documents_of_another_form_are_refused_in_one_line(tmp_path, content, fault):
    path = tmp_path / "corpus.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_documents(path, {"title": "txt"})
    assert str(caught.value).startswith(f"{path}{fault}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("member", ["json", "txt"])
def test_text_that_utf8_cannot_hold_is_a_bad_row(tmp_path, member):
    bad, words = {
        "json": (b'{"query": "q \\ud83d", "txt": "T", "score": 1}', "half a surrogate pair, \\ud83d"),
        "txt": (b"T \xe9", "the byte 0xe9, 'é' in Latin-1"),
    }[member]
    good = json.dumps({"query": "q", "score": 1}).encode()
    members = {"json": good, "txt": b"T"}
    path = write_tar(tmp_path / "a.tar", [*((f"a.{key}", value) for key, value in members.items()),
                                          *((f"b.{key}", value) for key, value in {**members, member: bad}.items())])  # fmt: skip
    pairs = read_pairs(path, {"query": "txt"}, {"txt": "txt"}, "score", skip_bad_rows=True)
    assert pairs.right["txt"] == ["T"]
    assert pairs.bad_rows == [f"{path}, sample 'b': expected UTF-8 text, got {words}"]


def test_bytes_of_a_parquet_text_that_are_no_utf8_are_a_bad_row(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    broken = pa.array([b"A", b"B \xff", None, b"D"]).view(pa.string())
    columns = {"query": list("abcd"), "title": broken, "score": [1, 2, 3, 4]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs = read_pairs(
        tmp_path / "a.parquet", {"query": "txt"}, {"title": "txt", "query": "txt"}, "score", skip_bad_rows=True
    )
    assert pairs.right["title"] == ["A", "", "D"]
    assert pairs.bad_rows == [
        f"{tmp_path / 'a.parquet'}, row 2: expected UTF-8 text, got the byte 0xff, 'ÿ' in Latin-1"
    ]


@pytest.mark.parametrize(
    ("score", "number"), [("1e2", 100), ("0", 0), ("-0", 0), ("1e308", 1e308), ("+3.5", 3.5), (" 7 ", 7), (".5", 0.5)]
)
def test_scores(tmp_path, score, number):
    rows = [{**GOOD, "score": score}]
    for path in (write_csv(tmp_path / "a.csv", rows), write_samples(tmp_path / "a.tar", rows)):
        assert read_pairs(path, {"query": "txt"}, {"title": "txt"}, "score").scores == [number]


@pytest.mark.parametrize(
    "score",
    ["1,5", "inf", "-inf", "nan", "1e400", "-1", "True", "1_000", "12%", "0x10", "1 000", "", "a\nb", "9" * 400, "٣٫٥"],
)
def test_scores_that_are_no_finite_number_from_zero_up(tmp_path, score):
    rows = [{**GOOD, "score": score}]
    for path in (write_csv(tmp_path / "a.csv", rows), write_samples(tmp_path / "a.tar", rows)):
        with pytest.raises(DataError, match="expected a finite number >= 0 in column 'score', got '") as caught:
            read_pairs(path, {"query": "txt"}, {"title": "txt"}, "score")
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 600


def test_the_longest_cell_is_the_same_for_every_type(monkeypatch):
    assert text_of("x" * LONGEST_CELL, "column 'a'")[1] is None
    assert (
        text_of("x" * (LONGEST_CELL + 1), "column 'a'")[1]
        == "expected at most 33,554,432 characters in column 'a', got more"
    )
    assert text_of(3, "") == ("3", None)
    assert text_of(10**400, "")[0] == "1" + "0" * 400


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "tar"])
def test_a_long_cell_is_read_and_read_again(tmp_path, ending):
    long = "word " * 300_000 + "end"
    rows = [{**GOOD, "title": title} for title in ("A", long, "C")]
    write = {"parquet": write_parquet, "tar": write_samples}.get(ending, write_csv)
    assert titles(write(tmp_path / f"a.{ending}", rows)) == ["A", long, "C"]
