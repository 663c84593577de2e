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
from gcl_kernels.training.run import train
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


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_two_processes_of_torchrun_train_what_one_does(options, tmp_path, loss):
    """By what torchrun is a command for, with a function as its program: that saves three imports of torch."""
    options.append(f"--loss={loss}")
    argv = [*options, f"--val-data={tmp_path / 'pairs.csv'}", "--name=two", "--batch-size=5"]
    assert launch("two", children.rank, argv, tmp_path) == {0: 0, 1: 0}
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


def launch(name, function, *args):
    """What torchrun is a command for, with two processes."""
    config = LaunchConfig(
        1,
        1,
        2,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        max_restarts=0,
    )
    return elastic_launch(config, function)(*args)


def test_no_process_waits_for_another_in_a_collective_that_ends_first(options, tmp_path):
    """Making the model, reading a corpus, evaluating and saving take the first process longer than the group's timeout."""
    corpus = {f"title {n}": {"title": f"title {n}", "image": None} for n in range(16)}
    corpus["title 0"]["image"] = "red.png"
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    argv = [*options, f"--val-data={tmp_path / 'pairs.csv'}", f"--doc-meta={tmp_path / 'corpus.json'}", "--doc-id-key=title",
            "--name=slow", "--batch-size=4", "--steps=2", "--save-steps=1", "--best-metric=NDCG@10"]  # fmt: skip
    assert launch("slow", children.rank_with_slow_work, argv, tmp_path, 1.5, 2) == {0: 0, 1: 0}
    results = json.loads((tmp_path / "slow" / "results.json").read_text())
    assert [line["step"] for line in results["history"]] == [2]


def test_a_signal_to_one_process_stops_all_of_them_after_one_step(options, tmp_path):
    argv = [*options, "--name=stopped", "--batch-size=5", "--steps=40"]
    assert launch("stopped", children.rank_that_is_stopped, argv, tmp_path) == {0: 143, 1: 143}
    said = [(tmp_path / f"rank{i}.err").read_text() for i in range(2)]
    assert said[0].startswith(
        f"stopped by SIGTERM: --logs {tmp_path} --name stopped --resume latest goes on after step "
    )
    assert said[1] == ""
    content = torch.load(tmp_path / "stopped" / "checkpoints" / "epoch_latest.pt", weights_only=True)["gcl_kernels"]
    assert 2 <= content["step"] < 40
    assert len(content["losses"]) == content["step"]


VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
ARCHITECTURES = {
    # Its caption decoder has no part in the embeddings.
    "coca": {
        "embed_dim": 16,
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT | {"mlp_ratio": 2, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    # Its loss would have a bias.
    "sigmoid": {
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_trains_in_several_processes(options, tmp_path, name):
    model = tmp_path / f"{name}.json"
    model.write_text(json.dumps(ARCHITECTURES[name]))
    argv = [*options, f"--model={model}", f"--name={name}"]
    assert launch(name, children.rank, [*argv, "--batch-size=5"], tmp_path) == {0: 0, 1: 0}
    one = train(parse_args([*argv, "--name=one", "--batch-size=10"]))
    assert json.loads((tmp_path / name / "results.json").read_text())["loss"] == pytest.approx(one.losses, rel=1e-4)


def test_a_fault_ends_all_processes_and_is_said_once(options, tmp_path):
    """One that every process meets, and one of the first process alone, for which the others wait."""
    corpus = tmp_path / "corpus.json"
    corpus.write_text("{")
    for name, more, fault in (
        ("all", ["--min-score=99"], "expected a score >= --min-score 99"),
        ("first", [f"--val-data={tmp_path / 'pairs.csv'}", f"--doc-meta={corpus}"], str(corpus)),
    ):
        argv = [*options, "--batch-size=5", f"--name={name}", *more]
        assert launch(name, children.rank, argv, tmp_path) == {0: 2, 1: 2}
        said = "".join((tmp_path / f"rank{i}.err").read_text() for i in range(2))
        assert fault in said
        assert len(said.splitlines()) == 1


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
