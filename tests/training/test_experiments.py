"""Comparisons of variants: the command line, cells that run, fail or are there already, tables from results.json files."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gcl_kernels.training import experiments
from gcl_kernels.training import options as training_options
from gcl_kernels.training.__main__ import main as train
from gcl_kernels.training.experiment_data import DataSet
from gcl_kernels.training.experiments import main, options_of, parse_args, results_file
from gcl_kernels.training.metrics import NAMES


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A data set of one file, as training and as test set."""
    path, corpus = tmp_path / "pairs.csv", tmp_path / "corpus.json"
    path.write_text("\n".join(["query,title,score", *(f"q{n % 3},t{n},{n}" for n in range(12))]))
    corpus.write_text(json.dumps({f"t{n}": {"title": f"t{n}"} for n in range(12)}))
    options = (
        "--left-keys=query",
        "--right-keys=title",
        "--doc-id-key=title",
        "--weight-key=score",
        "--batch-size=6",
        "--steps=1",
    )
    data = DataSet(lambda source, folder: {"in-domain": (path, corpus)}, options, "made up")
    monkeypatch.setitem(experiments.DATA, "toy", data)
    return ["--data", "toy", f"--out={tmp_path / 'out'}"]


def write_cell(out, variant, seed, values, **more):
    path = results_file(out, "toy", variant, seed)
    path.parent.mkdir(parents=True)
    per_query = {query: dict.fromkeys(NAMES, value) for query, value in values.items()}
    path.write_text(json.dumps({"loss": [2.0] * 9 + [1.0], "per_query": {"elsewhere/pairs.csv": per_query}, **more}))


def test_the_command_line_of_a_comparison(capsys):
    args = parse_args([])
    assert args.compare == [list(experiments.FUNCTIONS)]
    assert (args.data, args.report.name) == ([("glyphs", None)], "results.md")
    args = parse_args(["--data", "glyphs", "chorus=x/y", "--compare", "log", "log+false-negatives=keep", "--lr=1e-3",
                       "--compare", "constant", "log"])  # fmt: skip
    assert [(name, str(folder)) for name, folder in args.data] == [("glyphs", "None"), ("chorus", "x/y")]
    assert args.options == ["--lr=1e-3"]
    assert experiments.variants(args) == ["log", "log+false-negatives=keep", "constant"]
    assert options_of("log+false-negatives=keep+s-max=5") == [
        "--score-to-weight=log",
        "--false-negatives=keep",
        "--s-max=5",
    ]
    for argv, fault in (
        (["--data", "nothing"], "expected one of glyphs, chorus, chorus-minilm, emoji, got nothing"),
        (["--lr", "1e-3"], "expected further options as --NAME=VALUE, got ['1e-3']"),
        (["--compare", "constant", "cubic"], "--score-to-weight: expected one of"),
        (["--compare", "constant", "log+lr=-1"], "--lr: expected a number > 0, got -1"),
        (["--compare", "constant", "log+speed=1"], "unrecognized arguments: --speed=1"),
        (["--speed=1"], "unrecognized arguments: --speed=1"),
    ):
        with pytest.raises(SystemExit):
            parse_args(argv)
        assert fault in capsys.readouterr().err


def test_the_folder_of_a_variant_has_a_name_on_every_platform():
    path = results_file(Path("out"), "toy", "piecewise+knots=1:0.1,50:1,100:5", 3)
    assert path == Path("out/toy/piecewise+knots=1_0.1,50_1,100_5/seed_3/results.json")


@pytest.mark.parametrize("name", ["chorus", "emoji"])
def test_a_data_set_that_is_not_built_in_needs_its_folder(tmp_path, name):
    with pytest.raises(SystemExit, match=f"expected {name}=DIR"):
        main(["--data", name, f"--out={tmp_path}"])


@pytest.fixture
def runs_in_this_process(monkeypatch):
    """Cells whose training begins run here instead of in a process each, which would import torch again; one that fails, does so
    in a process of its own."""
    run_process = subprocess.run

    def run(command, *, stdout, **options):
        assert command[:3] == [sys.executable, "-m", "gcl_kernels.training"]
        if "--model=ViT-X" in command:
            return run_process(command, stdout=stdout, **options)
        with contextlib.redirect_stdout(stdout):
            return subprocess.CompletedProcess(command, train(command[3:]))

    monkeypatch.setattr(experiments.subprocess, "run", run)


@pytest.mark.usefixtures("runs_in_this_process")
def test_cells_run_once_and_one_that_fails_is_named(toy, tmp_path, capsys):
    argv = [*toy, "--seeds=1", "--compare", "constant", "log+min-score=3", "log+model=ViT-X"]
    assert main(argv) == 1
    folder = tmp_path / "out" / "toy" / "log+model=ViT-X" / "seed_0"
    assert capsys.readouterr().err.splitlines()[-1] == f"failed: see {folder / 'log.txt'}"
    assert "expected a model name of open_clip, got 'ViT-X'" in (folder / "log.txt").read_text()
    cells = {variant: results_file(tmp_path / "out", "toy", variant, 0) for variant in ("constant", "log+min-score=3")}
    options = {variant: json.loads(path.read_text())["options"] for variant, path in cells.items()}
    different = {key for key in options["constant"] if options["constant"][key] != options["log+min-score=3"].get(key)}
    assert different == {"score_to_weight", "logs"}
    assert options["log+min-score=3"]["min_score"] == 3
    assert not list(folder.parent.parent.rglob("*.pt"))

    with pytest.raises(
        SystemExit, match=r"seed_0/results.json: expected options as when it ran, --lr 0.0005, got 0.002; another --out"
    ):
        main([*toy, "--seeds=1", "--compare", "constant", "log+min-score=3", "--lr=2e-3"])
    times = {path: path.stat().st_mtime_ns for path in cells.values()}
    assert main([*toy, "--seeds=1", "--compare", "constant", "log+min-score=3"]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in cells.values()}

    pairs = tmp_path / "pairs.csv"
    pairs.write_text(pairs.read_text().replace("q0,t3,3", "q0,t3,4"))
    with pytest.raises(
        SystemExit, match=r"seed_0/results.json: expected files as when it ran, got others: in-domain pairs;"
    ):
        main([*toy, "--seeds=1", "--compare", "constant", "log+min-score=3"])


def test_the_tables_are_there_after_each_seed(toy, tmp_path, monkeypatch):
    report = tmp_path / "out" / "results.md"
    before = []

    def run_cell(args, name, variant, seed, files):
        before.append((seed, variant, "| toy, in-domain |" in report.read_text() if report.exists() else False))
        write_cell(args.out, variant, seed, {"q": 0.5})
        return True

    monkeypatch.setattr(experiments, "run_cell", run_cell)
    assert main([*toy, "--seeds=2", "--compare", "constant", "log"]) == 0
    assert before == [(0, "constant", False), (0, "log", False), (1, "constant", True), (1, "log", True)]
    assert "| toy, in-domain | 0.500 (2) | +0.0% (2) |" in report.read_text()
    written, write_report = [], experiments.write_report
    monkeypatch.setattr(experiments, "write_report", lambda *_: (written.append(True), write_report(*_)))
    assert main([*toy, "--seeds=2", "--compare", "constant", "log"]) == 0
    assert len(written) == 1, "once where every cell was there"


def test_the_tables_are_paired_by_query_and_seed(toy, tmp_path):
    out = tmp_path / "out"
    queries = [f"q{n}" for n in range(8)]
    level = {query: n / 64 for n, query in enumerate(queries)}
    for seed in range(2):
        write_cell(out, "constant", seed, {query: 0.25 - 7 / 128 + seed / 4 + level[query] for query in queries})
        cell = {query: 0.5 - 7 / 128 + seed / 4 + level[query] for query in reversed(queries)}
        write_cell(out, "log", seed, cell, logit_scale=20.0)
    # Without the same seed of the baseline a cell tells nothing, and without a cell there is no row.
    write_cell(out, "linear", 3, dict.fromkeys(queries, 1.0))
    report = out / "results.md"
    assert main([*toy, "--report-only"]) == 0
    lines = report.read_text().splitlines()
    assert "| toy, in-domain | 0.375 (2) |  |  |  | **+66.7%** (2) |" in lines
    assert "| constant | 2 | 0.375 ± 0.177 | 0.375 ± 0.177 | 0.375 ± 0.177 | 0.375 ± 0.177 |  | |  |" in lines
    (row,) = (line for line in lines if line.startswith("| log | 2 |"))
    assert row.endswith("| +0.250 [+0.250, +0.250] | +66.7% | 0.0078 |")
    assert not any(line.startswith("| linear | 1") for line in lines)
    assert "| constant | 6 | 6 | 0% | 0.00 | 1.00 |  |" in lines
    assert any(line.startswith("| log | 6 | ") and line.endswith("| 0.00 | 1.00 | 20.0 |") for line in lines)
    assert ("`python -m gcl_kernels.training.experiments --data toy --seeds 2 --compare constant linear log`"
            in lines)  # fmt: skip


def test_only_the_tables_of_a_report_are_written_anew(toy, tmp_path):
    report = tmp_path / "report.md"
    for variant in ("constant", "log"):
        write_cell(tmp_path / "out", variant, 0, {"q": 0.5})
    report.write_text(f"# Ours\n\nWords.\n\n{experiments.BEGIN}\nstale\n{experiments.END}\n\nMore words.\n")
    assert main([*toy, "--report-only", f"--report={report}"]) == 0
    text = report.read_text()
    assert text.startswith(f"# Ours\n\nWords.\n\n{experiments.BEGIN}\n")
    assert text.endswith(f"\n{experiments.END}\n\nMore words.\n")
    assert "stale" not in text
    assert "| toy, in-domain | 0.500 (1) |  |  |  | +0.0% (1) |" in text
    assert main([*toy, "--report-only", f"--report={report}"]) == 0
    assert report.read_text() == text


def test_several_commands_write_a_section_each_of_one_report(toy, tmp_path, capsys):
    report = tmp_path / "report.md"
    report.write_text(f"# Ours\n\n{experiments.BEGIN}\nother\n{experiments.END}\n")
    variants = ["log", "log+loss=sigmoid"]
    for variant, more in zip(variants, ({"logit_scale": 14.0}, {"logit_scale": 10.0, "logit_bias": -9.5}), strict=True):
        write_cell(tmp_path / "out", variant, 0, {"q": 0.5}, **more)
    argv = [*toy, "--seeds=1", "--report-only", f"--report={report}", "--compare", *variants]
    for _ in range(2):
        assert main([*argv, "--section=sigmoid"]) == 0
        text = report.read_text()
        assert text.startswith(f"# Ours\n\n{experiments.BEGIN}\nother\n{experiments.END}\n")
        assert text.count("<!-- experiments: sigmoid -->") == text.count("<!-- end experiments: sigmoid -->") == 1
    assert "--loss=sigmoid" not in text
    assert "`constant+loss=sigmoid` is SigLIP's" in text
    (first, second) = (line for line in text.splitlines() if line.startswith(("| log | 6", "| log+loss=sigmoid | 6")))
    assert first.endswith("| 14.0 |  |")
    assert second.endswith("| 10.0 | -9.5 |")
    assert main(argv) == 0
    assert "\nother\n" not in report.read_text()
    assert "<!-- experiments: sigmoid -->" in report.read_text()
    with pytest.raises(SystemExit):
        parse_args(["--section=a-->b"])
    assert "--section: expected a word, got a-->b" in capsys.readouterr().err


def test_the_data_sets_are_trained_on_with_options_that_exist():
    for name, data in experiments.DATA.items():
        files = {"in-domain": (Path("pairs.csv"), Path("corpus.json"))}
        args = parse_args(["--data", name])
        run = training_options.parse_args(experiments.run_argv(args, name, "log", 3, files))
        assert (run.seed, run.score_to_weight, run.name) == (3, "log", "seed_3"), data


def test_the_words_that_training_has_seen_are_counted(toy, tmp_path):
    def file(name, *rows):
        path = tmp_path / name
        path.write_text("\n".join(["query,title,score", *rows]))
        return path, path

    files = {
        "in-domain": file("a.csv", "red Shoe,a boot,1"),
        "novel query": file("b.csv", "shoe boot,x,1", "blue sock,y,1"),
    }
    line = experiments.novelty(parse_args(toy), "toy", files)
    assert line == ("Of the different words of the novel queries, 25% are in training queries, 50% in training queries or "
                    "documents.")  # fmt: skip
    assert experiments.novelty(parse_args(toy), "toy", {"in-domain": files["in-domain"]}) == ""
