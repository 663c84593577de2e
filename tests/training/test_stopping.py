"""Runs that a signal ends: what is saved, what is said, and that they go on to the same numbers."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from gcl_kernels.training import preparing, validation
from gcl_kernels.training import run as training
from gcl_kernels.training.__main__ import main
from gcl_kernels.training.openclip import TINY_MODEL
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.stopping import Stopped, Stopper
from tests.training.children import with_dropout


@pytest.fixture
def options(tmp_path):
    rows = [f"query {n},title {n},{n}" for n in range(14)]
    (tmp_path / "pairs.csv").write_text("\n".join(["query,title,score", *rows]))
    return [f"--train-data={tmp_path / 'pairs.csv'}", "--left-keys=query", "--right-keys=title", "--weight-key=score",
            "--batch-size=4", "--steps=6", f"--logs={tmp_path}", "--name=run", "--save-frequency=0"]  # fmt: skip


def raising(function, count, name, monkeypatch, where):
    """`function` of `where`, in whose `count`-th call this process sends itself a signal."""
    calls = 0
    original = getattr(where, function)

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            signal.raise_signal(getattr(signal, name))
        return original(*args, **options)

    monkeypatch.setattr(where, function, call)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_that_is_stopped_saves_and_goes_on_to_the_same_numbers(
    options, tmp_path, monkeypatch, capsys, name, status
):
    monkeypatch.setattr(preparing, "create_model", with_dropout(preparing.create_model))
    whole = training.train(parse_args([*options, "--name=whole"]))
    with monkeypatch.context() as patch:
        raising("step", 2, name, patch, torch.optim.AdamW)
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        assert main(options) == status
    assert {number: signal.getsignal(number) for number in before} == before
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped by {name}: --logs {tmp_path} --name run --resume latest goes on after step 2"
    )
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {"step_2.pt", "epoch_latest.pt", f"{TINY_MODEL}.json"}
    resumed = training.train(parse_args([*options, "--resume=latest"]))
    assert resumed.losses == whole.losses
    assert "resumed from" in (tmp_path / "run" / "out.log").read_text(encoding="utf-8")


def test_a_run_stopped_in_its_evaluation_has_saved_before_and_evaluates_when_it_goes_on(
    options, tmp_path, monkeypatch, capsys
):
    argv = [
        *options,
        f"--val-data={tmp_path / 'pairs.csv'}",
        "--val-steps=2",
        "--save-steps=2",
        "--best-metric=NDCG@10",
    ]
    whole = training.train(parse_args([*argv, "--name=whole"]))
    with monkeypatch.context() as patch:
        raising("evaluate", 2, "SIGINT", patch, validation)
        assert main(argv) == 130
    assert "--resume latest goes on after step 4" in capsys.readouterr().err
    training.train(parse_args([*argv, "--resume=latest"]))
    contents = [
        torch.load(tmp_path / name / "checkpoints" / "epoch_latest.pt", weights_only=True)["gcl_kernels"]
        for name in ("run", "whole")
    ]
    assert [line["step"] for line in contents[0]["history"]] == [2, 4, 6]
    assert contents[0]["history"] == contents[1]["history"]
    assert contents[0]["best"] == contents[1]["best"]
    assert contents[0]["losses"].tolist() == whole.losses


def test_before_the_first_step_there_is_nothing_to_go_on_from(options, tmp_path, monkeypatch, capsys):
    raising("create_model", 1, "SIGTERM", monkeypatch, preparing)
    assert main(options) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: nothing is saved yet\n"
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_has_lost_no_step(options, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(validation, "evaluate", fail)
    with pytest.raises(MemoryError):
        training.train(parse_args([*options, f"--val-data={tmp_path / 'pairs.csv'}"]))
    content = torch.load(tmp_path / "run" / "checkpoints" / "epoch_latest.pt", weights_only=True)
    assert content["gcl_kernels"]["step"] == 6


def test_what_must_not_be_broken_off_is_ended_first_and_insisting_breaks_it_off():
    with Stopper() as stopper:
        with stopper.later():
            signal.raise_signal(signal.SIGINT)
            assert stopper.asked == signal.SIGINT
            signal.raise_signal(signal.SIGINT)  # at once: the same wish, sent by a terminal and by a launcher
            stopper._since -= 3
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped), stopper.now():
            pytest.fail("what may be broken off is not begun")


def test_a_platform_without_some_signals_and_a_thread_that_may_not_set_them(monkeypatch):
    monkeypatch.delattr(signal, "SIGTERM")
    before = signal.getsignal(signal.SIGINT)
    with Stopper():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    entered = []
    thread = threading.Thread(target=lambda: entered.append(Stopper().__enter__()))
    thread.start()
    thread.join()
    assert len(entered) == 1
    assert signal.getsignal(signal.SIGINT) == before
