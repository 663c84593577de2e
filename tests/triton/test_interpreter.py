"""Without a GPU: the kernels' tests on CPU tensors, in Triton's interpreter, in processes of their own (see conftest)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .conftest import KERNEL_TESTS

HERE = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs the kernels' tests on its GPU")


@pytest.fixture(scope="module")
def runs():
    """All files at once, each in its own process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header"]
    started = {
        name: subprocess.Popen(
            [*command, str(HERE / name)],
            cwd=HERE.parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in KERNEL_TESTS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", KERNEL_TESTS)
def test_in_the_interpreter(runs, name):
    output, _ = runs[name].communicate(timeout=600)
    assert runs[name].returncode == 0, output[-20_000:]
    assert " passed" in output
