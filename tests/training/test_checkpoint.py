"""Runs that are killed and go on, and checkpoints that cannot be used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from gcl_kernels.training import checkpoint, learner, preparing
from gcl_kernels.training import run as training
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import write_atomically
from gcl_kernels.training.openclip import TINY_MODEL
from gcl_kernels.training.options import parse_args
from tests.training.children import run_killed, with_dropout


@pytest.fixture
def options(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rows = [f"query {n % 4},title {n},{'red.png' if n % 3 else ''},{n}" for n in range(14)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,image,score", *rows]))
    return [f"--train-data={path}", "--left-keys=query", "--right-keys=title,image", "--weight-key=score", "--batch-size=4",
            "--steps=8", "--save-frequency=0", f"--logs={tmp_path}", "--lr=1e-3", "--grad-clip-norm=1"]  # fmt: skip


def test_a_run_killed_and_resumed_is_the_run_that_was_never_killed(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparing, "create_model", with_dropout(preparing.create_model))
    whole = training.train(parse_args([*options, "--name=whole"]))
    again = [*options, "--name=killed", "--save-steps=2", "--resume=latest"]
    # In the 4th step, one after a checkpoint; while the second checkpoint after that is written.
    for where, count in (("step", 4), ("write", 2)):
        assert run_killed(where, count, again) == -signal.SIGKILL
    capsys.readouterr()
    resumed = training.train(parse_args(again))
    assert "epoch_latest.pt at step 4 of 8" in capsys.readouterr().out
    assert resumed.losses == whole.losses
    expected, got = (torch.load(run.checkpoint, weights_only=True) for run in (whole, resumed))
    assert_equal(expected["state_dict"], got["state_dict"])
    assert_equal(expected["optimizer"], got["optimizer"])
    assert_equal(expected["gcl_kernels"]["random"], got["gcl_kernels"]["random"])
    assert got["optimizer"]["param_groups"][0]["fused"]


def test_a_run_killed_before_its_results_are_written_evaluates_once(options, tmp_path):
    data = options[0].removeprefix("--train-data=")
    argv = [*options, "--name=run", "--steps=2", f"--val-data={data}", "--val-steps=1"]
    results = tmp_path / "run" / "results.json"
    training.train(parse_args(argv))
    whole = json.loads(results.read_text())
    results.unlink()
    training.train(parse_args([*argv, "--resume=latest"]))
    again = json.loads(results.read_text())
    assert [line["step"] for line in whole["history"]] == [1, 2]
    for key in ("loss", "history", "metrics", "per_query"):
        assert again[key] == whole[key]


def test_a_run_goes_on_with_the_optimiser_that_it_was_begun_with(options, monkeypatch):
    """Former versions updated weight by weight, which rounds otherwise than one kernel for all."""
    options = [*options, "--precision=amp", "--steps=2", "--keep-last=0"]
    with monkeypatch.context() as patch:
        patch.setattr(learner, "FUSED", ())
        before = training.train(parse_args([*options, "--name=before", "--save-steps=1"]))
    resumed = training.train(
        parse_args([*options, "--name=now", f"--resume={before.checkpoint.with_name('step_1.pt')}"])
    )
    assert resumed.losses == before.losses
    expected, got = (torch.load(run.checkpoint, weights_only=True) for run in (before, resumed))
    assert_equal(expected["state_dict"], got["state_dict"])
    assert_equal(expected["optimizer"], got["optimizer"])


def assert_equal(expected, got):
    if isinstance(expected, torch.Tensor):
        assert expected.equal(got)
    elif isinstance(expected, dict):
        assert expected.keys() == got.keys()
        for key in expected:
            assert_equal(expected[key], got[key])
    elif isinstance(expected, list):
        for a, b in zip(expected, got, strict=True):
            assert_equal(a, b)
    else:
        assert expected == got


def small(**more):
    return {"epoch": 1, "state_dict": {"weight": torch.arange(1000.0)}, "gcl_kernels": {"step": 3}} | more


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        place = content.index(torch.arange(1000.0).numpy().tobytes()) + 100
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "text":
        path.write_text("not a checkpoint")
    elif how == "foreign":
        torch.save({"epoch": 1, "state_dict": {}}, path)
    elif how == "pickle":
        torch.save({"gcl_kernels": subprocess.Popen}, path)


FAULTS = {
    "truncated": "expected a whole checkpoint, got a truncated file or another kind of file",
    "empty": "expected a whole checkpoint, got a truncated file or another kind of file",
    "flipped": "expected a whole checkpoint, got a damaged file: wrong checksum in",
    "text": "expected a whole checkpoint, got a truncated file or another kind of file",
    "foreign": "expected a checkpoint of this harness, got one without what a resume needs",
    "pickle": "expected a whole checkpoint, got a truncated file or another kind of file",
}


@pytest.mark.parametrize("how", FAULTS)
def test_what_is_no_checkpoint_is_refused_in_one_line_and_the_one_before_is_used_if_asked(tmp_path, capsys, how):
    for step in (2, 4):
        checkpoint.save(tmp_path / f"step_{step}.pt", small(epoch=step))
    damage(tmp_path / "step_4.pt", how)
    for resume_from in ("latest", str(tmp_path / "step_4.pt")):
        with pytest.raises(InputError) as caught:
            checkpoint.resume(resume_from, tmp_path)
        assert FAULTS[how] in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    found = checkpoint.resume("last-good", tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["epoch"]) == ("step_2.pt", 2)
    assert f"passed over: {tmp_path / 'step_4.pt'}: expected" in capsys.readouterr().out


def test_with_no_good_checkpoint_at_all_every_reason_is_said(tmp_path):
    checkpoint.save(tmp_path / "epoch_1.pt", small())
    damage(tmp_path / "epoch_1.pt", "truncated")
    with pytest.raises(InputError, match=r"epoch_latest.pt: expected a whole") as caught:
        checkpoint.resume("last-good", tmp_path)
    assert "epoch_1.pt: expected a whole" in str(caught.value)
    assert checkpoint.resume("latest", tmp_path / "none") is None
    with pytest.raises(InputError, match="expected a checkpoint, got 'No such file or directory'"):
        checkpoint.resume(str(tmp_path / "none.pt"), tmp_path)


def test_the_newest_are_kept_and_the_second_names_outlive_them(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path / f"step_{step}.pt", small(epoch=step))
        if step == 2:
            checkpoint.also(tmp_path / "step_2.pt", checkpoint.BEST)
        checkpoint.keep_last(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "epoch_latest.pt", "step_4.pt", "step_5.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["epoch"] == 2
    assert checkpoint.load(tmp_path / "epoch_latest.pt")["epoch"] == 5


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "epoch_1.pt"
    checkpoint.save(path, small())

    def fail(new):
        new.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert checkpoint.load(path)["epoch"] == 1


def test_the_best_and_the_last_checkpoints_of_a_run_are_kept(options, tmp_path):
    data = options[0].removeprefix("--train-data=")
    training.train(parse_args([*options, "--name=best", f"--val-data={data}", "--val-steps=1", "--best-metric=NDCG@10",
                            "--save-steps=2", "--keep-last=1", "--steps=4", "--report-to=tensorboard"]))  # fmt: skip
    folder = tmp_path / "best" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {
        "best.pt",
        "epoch_latest.pt",
        "epoch_1.pt",
        f"{TINY_MODEL}.json",
    }
    content = checkpoint.load(folder / "epoch_latest.pt")["gcl_kernels"]
    history = content["history"]
    assert [line["step"] for line in history] == [1, 2, 3, 4]
    best = checkpoint.load(folder / "best.pt")["gcl_kernels"]
    first_best = max(history, key=lambda line: (line["NDCG@10"], -line["step"]))
    assert (best["step"], best["best"]) == (first_best["step"], first_best["NDCG@10"])
    assert list((tmp_path / "best" / "tensorboard").iterdir())


def test_a_resumed_run_goes_on_with_its_curves(options, tmp_path, monkeypatch):
    """In Weights & Biases, by what its package is called with."""
    runs = []

    class Run:
        def __init__(self, **given):
            self.given, self.id = given, given["id"] or f"run{len(runs)}"
            self.logged, self.finished = [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run))
    data = options[0].removeprefix("--train-data=")
    argv = [*options, "--name=first", f"--val-data={data}", "--report-to=wandb", "--log-every-n-steps=1"]
    run = training.train(parse_args([*argv, "--steps=2"]))
    training.train(parse_args([*argv, "--steps=3", "--resume=latest"]))
    training.train(parse_args([*argv, "--steps=1", "--name=other"]))
    assert [made.id for made in runs] == ["run0", "run0", "run2"]
    assert all(made.finished for made in runs)
    assert (runs[0].given["name"], runs[0].given["config"]["steps"]) == ("first", 2)
    losses = [(step, values["loss"]) for step, values in runs[0].logged if "loss" in values]
    assert losses == [(1, run.losses[0]), (2, run.losses[1])]
    assert [step for step, values in runs[1].logged if "loss" in values] == [3]
    of_test = {name: value for _, values in runs[0].logged for name, value in values.items() if "/" in name}
    assert of_test[f"{Path(data).stem}/NDCG@10"] == run.evaluations[data].means["NDCG@10"]


def test_resuming_with_other_options_says_so_and_other_weights_are_refused(options, tmp_path, capsys):
    run = training.train(parse_args([*options, "--name=first", "--steps=1"]))
    training.train(parse_args([*options, "--name=second", "--steps=2", "--seed=5", f"--resume={run.checkpoint}"]))
    assert "differs from the one that was begun: --steps 1 -> 2, --seed 0 -> 5" in capsys.readouterr().out
    content = torch.load(run.checkpoint, weights_only=True)
    del content["state_dict"]["logit_scale"]
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(
        InputError, match=r"other.pt: expected a checkpoint of ViT-Tiny-8-32px, got other weights"
    ) as caught:
        training.train(parse_args([*options, f"--resume={tmp_path / 'other.pt'}"]))
    assert len(str(caught.value).splitlines()) == 1
