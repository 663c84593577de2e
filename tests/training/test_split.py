"""The split command: the four sets from one file, their corpora, and what is said of bad rows."""

from __future__ import annotations

import csv
import json
import random
import shlex

import pytest
from PIL import Image

from gcl_kernels.training import evaluate
from gcl_kernels.training.__main__ import main as train
from gcl_kernels.training.split import main
from tests.training.files import write_csv, write_parquet

ROWS = [
    {
        "query": f"query {q}",
        "product_id": f"p{d}",
        "title": f"title {d}",
        "brand": f"b{d % 3}",
        "score": str(q * d % 7 + 0.5),
    }
    for q in range(20)
    for d in range(0, 30, 1 + q % 3)
]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def content(folder):
    return {path.name: read(path) for path in folder.glob("*.csv")}


@pytest.fixture
def pairs(tmp_path):
    return write_csv(tmp_path / "pairs.csv", ROWS)


def test_the_sets_part_queries_and_documents(pairs, tmp_path, capsys):
    assert main([str(pairs), f"--out={tmp_path / 'out'}"]) == 0
    sets = content(tmp_path / "out")
    assert sorted(sets) == [
        "in_domain.csv", "novel_document.csv", "novel_query.csv", "validation_novel_document.csv",
        "validation_novel_query.csv", "validation_zero_shot.csv", "zero_shot.csv",
    ]  # fmt: skip
    # Every pair is in one file, as it was.
    key = lambda row: sorted(row.items())  # noqa: E731
    assert sorted((row for rows in sets.values() for row in rows), key=key) == sorted(ROWS, key=key)
    queries = {name: {row["query"] for row in rows} for name, rows in sets.items()}
    documents = {name: {row["product_id"] for row in rows} for name, rows in sets.items()}
    trained = queries["in_domain.csv"]
    assert len(trained) == 16
    assert len(documents["in_domain.csv"]) == 15
    for name in sets:
        if "novel_query" in name or "zero_shot" in name:
            assert not queries[name] & trained
        if name.startswith("validation"):
            assert queries[name]
            assert not queries[name] & queries[name.removeprefix("validation_")]
        new = "document" in name or "zero_shot" in name
        assert documents[name] <= set(
            json.loads((tmp_path / "out" / f"{'novel' if new else 'train'}_documents.json").read_text())
        )
    assert not documents["in_domain.csv"] & documents["zero_shot.csv"]
    # A query is for validation or for the test, whatever its documents.
    assert queries["validation_zero_shot.csv"] == queries["validation_novel_query.csv"]
    said = capsys.readouterr().out
    assert f"in-domain (training){len(sets['in_domain.csv']):>18}{16:>10}{15:>11}" in said
    manifest = json.loads((tmp_path / "out" / "split.json").read_text())
    assert manifest["sets"]["zero-shot"]["rows"] == len(sets["zero_shot.csv"])


def test_the_draw_is_of_the_ids_and_the_seed(pairs, tmp_path):
    other = list(ROWS)
    random.Random(1).shuffle(other)
    shuffled = write_parquet(tmp_path / "shuffled.parquet", other)
    for path, out, seed in ((pairs, "a", 0), (shuffled, "b", 0), (pairs, "c", 1)):
        assert main([str(path), f"--out={tmp_path / out}", f"--seed={seed}"]) == 0
    a, b, c = ({row["query"] for row in read(tmp_path / out / "in_domain.csv")} for out in "abc")
    assert a == b != c
    corpora = [json.loads((tmp_path / out / "novel_documents.json").read_text()) for out in "ab"]
    assert corpora[0] == corpora[1]


def test_a_split_that_replaces_another_leaves_none_of_its_files(pairs, tmp_path):
    assert main([str(pairs), f"--out={tmp_path / 'out'}"]) == 0
    assert main([str(pairs), f"--out={tmp_path / 'out'}", "--overwrite", "--validation=0"]) == 0
    sets = content(tmp_path / "out")
    assert sorted(sets) == ["in_domain.csv", "novel_document.csv", "novel_query.csv", "zero_shot.csv"]
    assert sum(map(len, sets.values())) == len(ROWS)


def test_what_is_written_is_trained_on_and_evaluated(tmp_path, capsys, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (32, 32), (50 * number, 90, 0)).save(tmp_path / "pictures" / f"{number}.png")
    rows = [
        {"query": f"query {q}", "title": f"title {d}", "image": f"pictures/{d % 5}.png", "score": str(q * d % 7)}
        for q in range(15)
        for d in range(12)
    ]
    rows[7] |= {"image": "pictures/none.png"}
    rows[9] |= {"score": "80%"}
    pairs = write_csv(tmp_path / "pairs.csv", rows)
    out = tmp_path / "elsewhere" / "out"
    assert main([str(pairs), f"--out={out}"]) == 0
    said = capsys.readouterr().out
    assert "2 bad rows left out" in said
    assert f"{pairs}, line 9: expected a readable image in column 'image', got no file" in said
    assert f"{pairs}, line 11: expected a finite number >= 0 in column 'score', got '80%'" in said
    monkeypatch.chdir(tmp_path)
    lines = dict(line.split(":", 1) for line in said.splitlines() if line.startswith(("train:", "evaluate:")))
    argv = shlex.split(lines["train"])
    assert argv[0] == "gcl-train"
    assert train([*argv[1:], "--steps=1", "--batch-size=16"]) == 0
    argv = shlex.split(lines["evaluate"])
    assert argv[0] == "gcl-evaluate"
    assert evaluate.main(argv[1:]) == 0
    assert "not in the corpus" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["no.csv", "--out=none"], "expected a readable file"),
        (["pairs.csv", "--left-keys=quarry", "--out=none"], "expected one column 'quarry', got 0"),
        (
            ["other.csv", "--out=none"],
            "expected --left-keys, or a column 'query', got the columns ['q', 'title', 'score']",
        ),
        (["pairs.csv", "--out=split"], "--overwrite replaces it"),
        (["pairs.csv", "--train-queries=1.5"], "expected a share >= 0 and < 1, got 1.5"),
        (["pairs.csv", "--train-documents=0", "--out=none"], "expected rows for the training set, got none"),
    ],
)
def test_faults_are_one_line(pairs, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "other.csv", [{"q": "a", "title": "b", "score": "1"}])
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "split.json").write_text("{}")
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
