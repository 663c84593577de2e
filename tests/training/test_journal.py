"""What a run says without a terminal, and in out.log."""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys

import pytest

from gcl_kernels.training import TrainOptions, journal, loop
from gcl_kernels.training.folder import RunFolder
from gcl_kernels.training.journal import Journal, clock
from gcl_kernels.training.loop import update
from gcl_kernels.training.options import Parser, parse_args, program
from gcl_kernels.training.run import train
from gcl_kernels.training.validation import TABLE_METRICS


class Clock:
    """Time that passes as told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(journal.time, "perf_counter", lambda: self.now)


def steps(lines):
    return [int(match[1]) for line in lines if (match := re.search(r"step (\d+)/", line))]


@pytest.mark.parametrize(
    ("every", "seconds", "expected"),
    [
        (None, 1.0, [1, 11, 21, 31, 41, 51, 60]),  # 10 s apart
        (
            None,
            25.0,
            [*range(1, 51), 52, 54, 56, 58, 60],
        ),  # slow steps; from the 51st on 2% of the time are more than one
        (None, 0.01, [1, 60]),
        (7, 0.01, [1, 7, 14, 21, 28, 35, 42, 49, 56, 60]),
    ],
)
def test_lines_come_at_sane_intervals(tmp_path, monkeypatch, capsys, every, seconds, expected):
    time = Clock(monkeypatch)
    said = Journal(tmp_path / "out.log", every=every)
    for step, _ in enumerate(said.over(range(60), "run", first_step=0, steps=60, rows=8), 1):
        time.now += seconds
        said.after(step, 2.5, {"logit_scale": 14.3, "logit_bias": -9.5}, 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert steps(lines) == expected
    assert steps((tmp_path / "out.log").read_text(encoding="utf-8").splitlines()) == expected
    assert f"loss 2.5000  lr 1.00e-03  logit scale 14.30  logit bias -9.50  {8 / seconds:.0f} rows/s  " in lines[1]
    assert lines[0].endswith(f"{clock(59 * seconds)} to go")


def test_a_long_run_says_less_often(monkeypatch, capsys):
    time = Clock(monkeypatch)
    said = Journal(None, every=None)
    for step, _ in enumerate(said.over(range(100_000), "run", first_step=0, steps=100_000, rows=8), 1):
        time.now += 1
        said.after(step, 2.5, {"logit_scale": 14.3}, 1e-3)
    found = steps(capsys.readouterr().out.splitlines())
    assert len(found) < 600
    assert max(b - a for a, b in itertools.pairwise(found)) <= 301


def test_other_processes_say_nothing(tmp_path, capsys):
    said = Journal(tmp_path / "out.log", every=1, silent=True)
    for step, _ in enumerate(said.over(range(3), "run", first_step=0, steps=3, rows=8), 1):
        said.after(step, 2.5, {"logit_scale": 14.3}, 1e-3)
    said.say("a word")
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "out.log").exists()


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    Journal(tmp_path, every=1).say("a word")
    assert capsys.readouterr().out == "a word\n"


def test_a_run_says_how_it_goes_and_its_table_which_step_it_is_of(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,score", *(f"query {n},title {n},{n}" for n in range(16))]))
    run = train(parse_args([f"--train-data={path}", f"--val-data={path}", "--left-keys=query", "--right-keys=title",
                            "--weight-key=score", "--batch-size=8", "--steps=6", "--val-steps=1", "--lr=1e-1", "--warmup=0",
                            f"--logs={tmp_path}", "--name=run", "--best-metric=NDCG@10",
                            "--log-every-n-steps=2"]))  # fmt: skip
    out = capsys.readouterr().out
    assert steps(out.splitlines()) == [1, 2, 4, 6]
    assert (tmp_path / "run" / "out.log").read_text(encoding="utf-8").count("to go") == 4
    best = max(range(1, 7), key=lambda step: (float(re.search(rf"step {step}  .*NDCG@10 (\S+)", out)[1]), -step))
    assert best < 6, "a learning rate that breaks what was learnt"
    assert f"best NDCG@10, step {best}, best.pt" in run.table
    assert out.count(run.table) == 1
    (last,) = [line for line in run.table.splitlines() if "log, step 6" in line]
    assert last.split()[-3:] == [f"{run.evaluations[str(path)].means[name]:.3f}" for name in TABLE_METRICS]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("/usr/bin/gcl-train", "gcl-train"),
        ("gcl-train.exe", "gcl-train"),
        ("/x/gcl_kernels/training/__main__.py", "python -m gcl_kernels.training"),
        ("/usr/bin/pytest", "python -m gcl_kernels.training"),
    ],
)
def test_a_command_bears_the_name_that_it_was_called_by(monkeypatch, argument, expected):
    monkeypatch.setattr("sys.argv", [argument])
    assert program("gcl_kernels.training") == expected


def test_what_is_missing_is_one_line(capsys):
    for parse in (parse_args, lambda argv: Parser("m").parse_args(["--x"])):
        with pytest.raises(SystemExit) as caught:
            parse([])
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_speaks_through_logging(tmp_path, monkeypatch, capsys, caplog):
    logger, name = logging.getLogger("gcl_kernels.training"), "gcl_kernels.training.run"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])  # as open_clip leaves it
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    said = Journal(tmp_path / "out.log", every=1)
    said.say("a word")
    said.warn("take care")
    heard = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert heard == [(name, "INFO", "a word"), (name, "WARNING", "warning: take care")]
    assert capsys.readouterr() == ("a word\nwarning: take care\n", "")
    assert re.fullmatch(
        r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  .*\n){2}", (tmp_path / "out.log").read_text(encoding="utf-8")
    )
    # A level that the caller has set counts, and a handler of the caller's on the screen is not doubled.
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(sys.stdout)])
    said = Journal(None, every=1)
    said.say("a word")
    said.warn("take care")
    assert capsys.readouterr() == ("warning: take care\n", "")


def test_results_are_written_as_the_run_goes(tmp_path, monkeypatch):
    results, seen = tmp_path / "run" / "results.json", []

    def looking(run, step, batch):
        content = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
        seen.append(content and (content["finished"], content["step"], content["steps"], len(content["loss"])))
        return update(run, step, batch)

    monkeypatch.setattr(loop, "update", looking)
    rows = [{"query": f"q{n}", "title": f"t{n}", "score": n} for n in range(8)]
    options = TrainOptions(left_keys=["query"], right_keys=["title"], weight_key="score", logs=tmp_path, name="run",
                           batch_size=4, steps=4, log_every_n_steps=2)  # fmt: skip
    run = train(options, rows)
    assert seen == [None, (False, 1, 4, 1), (False, 2, 4, 2), (False, 2, 4, 2)]
    content = json.loads(results.read_text(encoding="utf-8"))
    assert (content["finished"], content["step"], content["loss"]) == (True, 4, run.losses)


def test_a_run_without_a_checkpoint_leaves_its_name_free(tmp_path):
    results = tmp_path / "run" / "results.json"
    results.parent.mkdir()
    for state, taken in (("false", False), ("true", True)):
        results.write_text(f'{{\n "finished": {state},\n "step": 3}}', encoding="utf-8")
        assert RunFolder(str(tmp_path), "run").used is taken
    results.write_text('{"options": {}}', encoding="utf-8")  # as written by former versions, at the end alone
    assert RunFolder(str(tmp_path), "run").used
