"""Several processes, and micro-batches, train what one process trains on the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gcl_kernels.training.options import parse_args
from gcl_kernels.training.train import train
from tests.training import children

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    rows = [f"query {n % 5},title {n},{('red.png', 'blue.png', '')[n % 3]},{n}" for n in range(16)]
    (tmp_path / "pairs.csv").write_text("\n".join(["query,title,image,score", *rows]))
    return [f"--train-data={tmp_path / 'pairs.csv'}", "--left-keys=query", "--right-keys=title,image", "--weight-key=score",
            "--steps=3", "--lr=1e-3", "--save-frequency=0", f"--logs-dir={tmp_path}", "--cross-field-loss"]  # fmt: skip


def test_two_processes_of_torchrun_train_what_one_does(options, tmp_path):
    """By what torchrun is a command for, with a function as its program: that saves three imports of torch."""
    argv = [*options, f"--val-data={tmp_path / 'pairs.csv'}", "--name=two", "--batch-size=5"]
    config = LaunchConfig(
        1, 1, 2, run_id="two", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver"
    )
    assert elastic_launch(config, children.rank)(argv, tmp_path) == {0: 0, 1: 0}
    printed = [(tmp_path / f"rank{i}.txt").read_text() for i in range(2)]
    assert printed[0].count("16 pairs, 5 queries, 16 documents") == 2, "once a file"
    assert printed[1] == "", "only the first process prints"
    one = train(parse_args([*options, "--name=one", "--batch-size=10"]))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["loss"] == pytest.approx(one.losses, rel=1e-4)
    (metrics,) = two["metrics"].values()
    assert 0 < metrics["NDCG@10"] <= 1
    expected, got = (
        torch.load(path, weights_only=True)
        for path in (one.checkpoint, tmp_path / "two" / "checkpoints" / "epoch_latest.pt")
    )
    assert len(got["gcl_kernels"]["random"]) == 2
    for name, weight in expected["state_dict"].items():
        # Adam turns rounding of a gradient near 0 into a step; three steps of 1e-3 at most.
        assert (weight - got["state_dict"][name]).abs().double().mean() < 1e-5, name


def test_the_torchrun_command_starts_the_training_command(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "gcl_kernels.training", *options, "--steps=1", "--name=command", "--batch-size=5"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("16 pairs, 5 queries, 16 documents") == 1, "the first process prints"
    assert (tmp_path / "command" / "results.json").exists()


@pytest.mark.parametrize("micro", [["--batch-size=8", "--mini-batch-size=3"], ["--batch-size=2", "--accum-freq=4"]])
def test_gradient_caching_trains_what_the_whole_batch_does(options, micro):
    whole = train(parse_args([*options, "--name=whole", "--batch-size=8"]))
    cached = train(parse_args([*options, "--name=cached", *micro]))
    assert cached.losses == pytest.approx(whole.losses, rel=1e-4)
