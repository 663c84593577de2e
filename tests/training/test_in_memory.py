"""Rows in memory in the place of files: what a table means is what a file of it means."""

from __future__ import annotations

import csv
import decimal

import numpy as np
import pytest
from PIL import Image

from gcl_kernels.training import TrainOptions, train
from gcl_kernels.training.data import Columns, PairFile, read_documents
from gcl_kernels.training.errors import DataError, InputError

pd = pytest.importorskip("pandas", reason="pandas is not installed")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

COLUMNS = Columns({"query": "txt"}, {"title": "txt", "image": "img"}, "score")
ROWS = [
    {"query": f"query {n % 4}", "title": f"title {n}", "image": "red.png" if n % 3 else None, "score": n / 4 + 0.1}
    for n in range(10)
]
TABLES = {
    "pandas": pd.DataFrame,
    "pandas of Arrow's types": lambda rows: pd.DataFrame(rows).convert_dtypes(dtype_backend="pyarrow"),
    "categories": lambda rows: pd.DataFrame(rows).astype({"query": "category"}),
    "pyarrow": pa.Table.from_pylist,
    "dictionaries": list,
    "a generator": iter,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pictures" / "red.png")
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_as_a_file_of_its_rows(folder, kind):
    root = folder / "pictures"
    expected = PairFile(folder / "pairs.csv", COLUMNS, image_root=root)
    got = PairFile("table", COLUMNS, image_root=root, table=TABLES[kind](ROWS))
    assert expected.query_numbers.equal(got.query_numbers)
    assert expected.document_numbers.equal(got.document_numbers)
    rows = [7, 0, 3]
    for name in ("left", "right", "scores", "query_ids", "document_ids"):
        assert getattr(expected.take(rows), name) == getattr(got.take(rows), name)


def test_numbers_are_written_as_they_are_meant():
    columns = Columns({"query": "txt"}, {"title": "txt"}, "score")
    values = [3, 3.5, np.int64(7), np.float32(0.1), decimal.Decimal("1.10"), " text ", np.str_("words")]
    rows = [{"query": value, "title": "t", "score": 1} for value in values]
    expected = ["3", "3.5", "7", "0.1", "1.10", "text", "words"]
    assert PairFile("table", columns, table=rows).take().left["query"] == expected
    assert PairFile("table", columns, table=pd.DataFrame(rows)).take().left["query"] == expected
    single = pd.DataFrame({"query": np.array([0.1, 2], np.float32), "title": "t", "score": 1})
    assert PairFile("table", columns, table=single).take().left["query"] == ["0.1", "2.0"]


@pytest.mark.parametrize("kind", ["pandas", "pyarrow", "dictionaries"])
def test_bad_rows_are_named_and_lose_no_good_ones(folder, kind):
    rows = [*ROWS, {**ROWS[0], "score": -1.0}, {**ROWS[0], "query": None}, {**ROWS[1], "image": "none.png"}]
    found = PairFile("table", COLUMNS, image_root=folder / "pictures", table=TABLES[kind](rows), skip_bad_rows=True)
    assert (len(found), found.bad_count) == (10, 3)
    assert [line.partition(":")[0] for line in found.bad_rows] == ["table, row 11", "table, row 12", "table, row 13"]
    with pytest.raises(DataError, match="table, row 11: expected a finite number >= 0 in column 'score'"):
        PairFile("table", COLUMNS, image_root=folder / "pictures", table=TABLES[kind](rows))


@pytest.mark.parametrize("kind", ["pandas", "pyarrow", "dictionaries"])
def test_a_column_that_is_not_there_is_named(kind):
    with pytest.raises(DataError, match=r"table: expected one column 'image', got 0 among the columns .*'query'"):
        PairFile("table", COLUMNS, table=TABLES[kind]([{"query": "q", "title": "t", "score": 1.0}]))


def test_what_is_no_table_is_refused():
    with pytest.raises(
        TypeError, match="table: expected a DataFrame, an Arrow table or an iterable of mappings, got int"
    ):
        PairFile("table", COLUMNS, table=3)
    with pytest.raises(DataError, match=r"table, row 1: expected a mapping .column: value., got 'q'"):
        PairFile("table", COLUMNS, table=["q"])
    with pytest.raises(DataError, match="table: expected at least one row, got none"):
        PairFile("table", COLUMNS, table=[])


def test_a_run_on_tables_is_the_run_on_their_files(folder):
    common = {"left_keys": ["query"], "right_keys": ["title", "image"], "weight_key": "score", "batch_size": 4, "steps": 2,
              "logs": folder / "logs", "image_root": folder / "pictures"}  # fmt: skip
    file = folder / "pairs.csv"
    of_files = train(TrainOptions(train_data=file, val_data=[file], name="files", **common))
    of_tables = train(
        TrainOptions(val_data=["held out"], name="tables", **common), pd.DataFrame(ROWS), {"held out": ROWS}
    )
    assert of_tables.losses == of_files.losses
    assert of_tables.evaluations["held out"].means == of_files.evaluations[str(file)].means
    with pytest.raises(InputError, match=r"tests: expected names in val_data, \[\], got \['held out'\]"):
        train(TrainOptions(**common), ROWS, {"held out": ROWS})
    with pytest.raises(InputError, match="tests: expected other names than that of the training rows, got 'pairs'"):
        train(TrainOptions(val_data=["pairs"], **common), ROWS, {"pairs": ROWS})
    with pytest.raises(InputError, match="train_data: expected a file, or pairs beside the options, got neither"):
        train(TrainOptions(**common))


def test_pictures_of_a_corpus_start_from_the_root(folder):
    (folder / "corpus.json").write_text('{"1": {"image": "red.png"}}')
    root = folder / "pictures"
    assert read_documents(folder / "corpus.json", {"image": "img"}, image_root=root) == {
        "1": {"image": str(root / "red.png")}
    }
    with pytest.raises(DataError, match="no file"):
        read_documents(folder / "corpus.json", {"image": "img"})
