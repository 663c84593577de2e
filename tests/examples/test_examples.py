"""Every example runs as its docstring says, at toy size, and prints what the docstring promises."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def output(script, *arguments, launcher=()):
    command = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def skip_without(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def falls(text, steps, below):
    """The losses that were printed, from step 0 to the last, end below a part of the first."""
    losses = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss ([\d.]+)", text, re.MULTILINE)}
    assert min(losses) == 0
    assert max(losses) == steps - 1
    assert losses[steps - 1] < below * losses[0]


def equal_in_first_batch(text, names):
    line = re.search(r"^first batch: (.*)$", text, re.MULTILINE)[1]
    said = re.fullmatch(rf"{names[0]} ([\d.]+), {names[1]} ([\d.]+)", line)
    ours, theirs = map(float, said.groups())
    assert ours > 1
    assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)  # printed to six decimals


def test_plain_loop():
    said = output("plain_loop.py", "--rows", "128", "--steps", "30")
    equal_in_first_batch(said, ("ClipLoss", "dense formula"))
    falls(said, 30, 0.3)
    assert int(re.search(r"of 256 new pairs, (\d+) find each other first", said)[1]) > 128


def test_torchrun_ring():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = output("torchrun_ring.py", "--rows", "48", "--steps", "20", launcher=torchrun)
    equal_in_first_batch(said, ("2 ranks on a ring", "one process"))
    falls(said, 20, 0.3)


def test_million_rows():
    """The line about memory is arithmetic: 300 * 300 numbers of 4 bytes."""
    said = output("million_rows.py", "--rows", "300", "--steps", "4", "--micro-batch", "128")
    assert "N = 300: one N x N matrix of torch.float32 takes 352 KiB,\na dense loss 1.37 MiB" in said
    falls(said, 4, 0.5)


def test_open_clip_apply():
    skip_without("open_clip")
    said = output("open_clip_apply.py", "--rows", "32", "--steps", "8")
    assert "open_clip.create_loss made a gcl_kernels.clip.ClipLoss" in said
    assert re.search(r"^replaced: .*open_clip\.factory\.ClipLoss", said, re.MULTILINE)
    equal_in_first_batch(said, ("ours", "open_clip's"))
    falls(said, 8, 0.8)


def test_sentence_transformers_gcl():
    skip_without("sentence_transformers", "datasets", "accelerate")
    said = output("sentence_transformers_gcl.py", "--rows", "36", "--steps", "30")
    equal_in_first_batch(said, ("GCLLoss without scores", "MultipleNegativesRankingLoss"))
    falls(said, 30, 0.3)
    assert said.count("crimson sneaker") == 3  # the query's own offers


def test_every_script_is_listed_and_says_how_to_run_it():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in sorted(EXAMPLES.glob("*.py")):
        assert f"examples/{script.name}" in ast.get_docstring(ast.parse(script.read_text())), script.name
        assert f"({script.name})" in listed, script.name
    for target in re.findall(r"\]\(([^)]+)\)", listed):
        assert (EXAMPLES / target).exists(), target
