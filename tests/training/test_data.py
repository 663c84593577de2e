"""Reading CSV and JSON: what is wrong is said by file and physical line number, and nothing good is lost."""

from __future__ import annotations

import csv
import io
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from gcl_kernels.training.data import KEY_END, load_image, read_documents, read_pairs
from gcl_kernels.training.errors import DataError

LEFT, RIGHT = {"query": "txt"}, {"title": "txt", "image": "img"}
HEADER = "query,title,image,score"


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return tmp_path


def write(folder, *lines, name="pairs.csv", ending="\n"):
    path = folder / name
    path.write_bytes(ending.join([*lines, ""]).encode())
    return path


def read(path, **options):
    return read_pairs(path, LEFT, RIGHT, "score", **options)


def message(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def test_good_rows_are_read_as_they_are(folder):
    path = write(folder, HEADER, 'a,"A, or ""a""",red.png,1.5', "", "b,,red.png,0", "c,Cé,,3e1")
    pairs = read(path)
    assert pairs.left == {"query": ["a", "b", "c"]}
    assert pairs.right["title"] == ['A, or "a"', "", "Cé"]
    assert pairs.right["image"] == [str(folder / "red.png"), str(folder / "red.png"), ""]
    assert pairs.scores == [1.5, 0.0, 30.0]
    assert pairs.query_ids == ["a" + KEY_END, "b" + KEY_END, "c" + KEY_END]
    assert len(set(pairs.document_ids)) == len(pairs) == 3
    assert pairs.bad_rows == []


def test_id_columns_and_separators(folder):
    lines = ["id\tquery\ttitle\timage\tscore", "7\ta\tA, B\t\t1"]
    pairs = read(write(folder, *lines, name="pairs.tsv"), query_id_key="id", document_id_key="title")
    assert (pairs.query_ids, pairs.document_ids) == (["7"], ["A, B"])
    assert read(write(folder, *lines), separator="\t").right["title"] == ["A, B"]


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(folder):
    path = write(folder, "\ufeff" + HEADER, "a,A,,1", "b,B,,x", ending="\r\n")
    assert message(path) == f"{path}, line 3: expected a finite number >= 0 in column 'score', got 'x'"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("a,A,", "expected 4 cells as in the header, got 3"),
        ("a,A,,1,2", "expected 4 cells as in the header, got 5"),
        ("a,A,,nan", "expected a finite number >= 0 in column 'score', got 'nan'"),
        ("a,A,,inf", "expected a finite number >= 0 in column 'score', got 'inf'"),
        ("a,A,,-1", "expected a finite number >= 0 in column 'score', got '-1'"),
        ("a,A,,high", "expected a finite number >= 0 in column 'score', got 'high'"),
        ("a,A,,", "expected a finite number >= 0 in column 'score', got ''"),
        (",A,,1", "expected a value in at least one of the columns ['query'], got none"),
        ("a,, ,1", "expected a value in at least one of the columns ['title', 'image'], got none"),
        ("a,A,none.png,1", "expected a readable image in column 'image', got no file '{folder}/none.png'"),
        ("a,A,broken.png,1", "expected a readable image in column 'image', got a file that cannot be decoded, "
         "'{folder}/broken.png'"),
        ("a,A,pairs.csv,1", "expected a readable image in column 'image', got a file that cannot be decoded, "
         "'{folder}/pairs.csv'"),
        (",A,,-1", "expected a finite number >= 0 in column 'score', got '-1'; expected a value in at least one of the "
         "columns ['query'], got none"),
        ('a,"A,,1', "expected well-formed quotes, got a quoted cell that never ends"),
        ('a,"A"x,,1', "expected well-formed quotes, got ',' expected after '\"'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_file_line_and_expectation(folder, row, fault):
    path = write(folder, HEADER, "a,A,red.png,1", row)
    assert message(path) == f"{path}, line 3: {fault.format(folder=folder)}"


def test_an_empty_id_is_a_bad_row(folder):
    path = write(folder, HEADER + ",id", "a,A,,1,", "b,B,,1,7")
    assert message(path, query_id_key="id") == f"{path}, line 2: expected an id in column 'id', got an empty cell"


def test_bytes_that_are_no_utf8_are_a_bad_row(folder):
    path = folder / "pairs.csv"
    path.write_bytes(f"{HEADER}\na,A,,1\nb,\xe9,,1\n".encode("latin-1"))
    assert message(path) == f"{path}, line 3: expected UTF-8 text, got the byte 0xe9, 'é' in Latin-1"
    assert read(path, skip_bad_rows=True).left["query"] == ["a"]


def test_a_missing_column_an_empty_file_and_a_header_alone(folder):
    path = write(folder, "query,title,score", "a,A,1")
    assert message(path) == (
        f"{path}, line 1: expected one column 'image', got 0 among the columns ['query', 'title', 'score']"
    )
    path = write(folder, HEADER + ",score", "a,A,,1,1")
    assert "line 1: expected one column 'score', got 2" in message(path)
    path.write_bytes(b"")
    assert message(path) == (
        f"{path}, line 1: expected a header with the columns ['query', 'title', 'image', 'score'], got an empty file"
    )
    path = write(folder, HEADER)
    assert message(path) == f"{path}, line 2: expected at least one row after the header, got none"
    # A missing column is missing for every row, so skipping rows cannot help.
    assert "line 1" in message(write(folder, "query,score", "a,1"), skip_bad_rows=True)


def test_a_file_that_is_not_there(folder):
    assert message(folder / "none.csv") == (
        f"{folder / 'none.csv'}: expected a readable file, got 'No such file or directory'"
    )


def test_line_numbers_are_physical_lines(folder):
    path = write(folder, HEADER, 'a,"A\nof\nthree lines",,1', "", "b,B,,nan", '"c\n",C,,1', 'd,"D\n",,-1', "e,E")
    assert [line.split(":")[0] for line in message(path).splitlines()] == [f"{path}, line {n}" for n in (6, 9, 11)]
    pairs = read(path, skip_bad_rows=True)
    assert pairs.right["title"] == ["A\nof\nthree lines", "C"]


def test_all_bad_rows_are_reported_up_to_ten_and_counted(folder):
    path = write(folder, HEADER, *["a,A,,1", "a,A"] * 13)
    lines = message(path).splitlines()
    assert lines[:10] == [f"{path}, line {n}: expected 4 cells as in the header, got 2" for n in range(3, 23, 2)]
    assert lines[10:] == ["and 3 more bad rows"]


def test_only_bad_rows_are_an_error_even_when_skipped(folder):
    path = write(folder, HEADER, "a,A")
    assert message(path, skip_bad_rows=True).splitlines() == [
        f"{path}: expected at least one good row, got none",
        f"{path}, line 2: expected 4 cells as in the header, got 2",
    ]


def test_a_stray_quote_costs_its_own_line_only(folder):
    path = write(folder, HEADER, "a,A,,1", 'b,"B,,1', "c,C,,1", 'd,"D,,1', "e,E,,1", "f,F,,1", 'g,"G,,1', "h,H,,1")
    pairs = read(path, skip_bad_rows=True)
    assert pairs.left["query"] == ["a", "c", "e", "f", "h"]
    assert [line.split(":")[0] for line in pairs.bad_rows] == [f"{path}, line {n}" for n in (3, 5, 8)]


def test_a_quoted_row_of_several_lines_with_too_few_cells_is_one_bad_row(folder):
    path = write(folder, HEADER, '"a\nb\nc",A', "d,D,,1")
    pairs = read(path, skip_bad_rows=True)
    assert pairs.left["query"] == ["d"]
    assert pairs.bad_rows == [f"{path}, line 2: expected 4 cells as in the header, got 2"]


CELL = st.text(st.sampled_from('ab ,"\n\r\té'), max_size=6).map(str.strip).filter(bool)
BAD = st.sampled_from(["x", "a,b", "q,t,,nan", "q,t,,-3", ",t,,1", "q,,,1", "q,t,none.png,1", "1,2,3,4,5"])


@given(st.data())
def test_skipping_keeps_every_good_row_and_names_every_bad_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("rows") / "pairs.csv"
    text, line = HEADER + "\n", 2
    good, bad = [], []
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            query, title, score = data.draw(CELL), data.draw(CELL), data.draw(st.floats(0, 1e6))
            buffer = io.StringIO()
            csv.writer(buffer, lineterminator="\r\n").writerow([query, title, "", score])
            row = buffer.getvalue()
            good.append((query, title, score))
        else:
            row = data.draw(BAD) + "\n"
            bad.append(line)
        text += row
        line += len(io.StringIO(row, newline="").readlines())
    path.write_bytes(text.encode())
    if not good:
        with pytest.raises(DataError, match="expected at least one good row"):
            read(path, skip_bad_rows=True)
        return
    pairs = read(path, skip_bad_rows=True)
    assert list(zip(pairs.left["query"], pairs.right["title"], pairs.scores, strict=True)) == good
    assert [int(fault.split(", line ")[1].split(":")[0]) for fault in pairs.bad_rows] == bad
    if bad:
        with pytest.raises(DataError):
            read(path)


def test_document_metadata(folder):
    path = folder / "corpus.json"
    path.write_text(json.dumps({"1": {"title": "A", "image": "red.png"}, "2": {"title": None}, "3": {"other": "x"}}))
    assert read_documents(path, RIGHT) == {
        "1": {"title": "A", "image": str(folder / "red.png")},
        "2": {"title": "", "image": ""},
        "3": {"title": "", "image": ""},
    }


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"1": {}\n,}', ", line 2: expected JSON, got "),
        ("[1]", ", line 1: expected a JSON object {document id: {field: value}}, got another structure"),
        (
            '{"1": {"image": "broken.png"}}',
            ", document '1': expected a readable image in field 'image', got a file that",
        ),
        ("\udcff", ": expected UTF-8 text, got the byte 0xff"),
    ],
)
def test_bad_document_metadata(folder, content, fault):
    path = folder / "corpus.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_documents(path, RIGHT)
    assert str(caught.value).startswith(f"{path}{fault}")
    assert "\n" not in str(caught.value)


def test_transparent_images_are_on_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "image.png")
    loaded = load_image(tmp_path / "image.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)]
