"""`python -m gcl_kernels.env`."""

import subprocess
import sys

import pytest
import torch

from gcl_kernels import backends, env
from gcl_kernels.backends import choice


def test_reports_versions_devices_and_settings(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "17")
    lines = list(env.report())
    assert f"torch {torch.__version__}" in lines
    assert "workspace 17 MiB" in lines
    assert "GCL_KERNELS_WORKSPACE_MIB=17" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("cpu: "))
    assert lines[start + 2] == "    float32: backend torch: the device is not CUDA or HIP"


@pytest.mark.parametrize(
    ("dtype", "broken", "expected"),
    [
        (torch.float64, None, "torch: its tiles are float32"),
        (torch.bfloat16, "it is broken", "torch: it is broken"),
        (torch.bfloat16, None, "triton: the device is CUDA or HIP; launch configuration of sm_90"),
    ],
)
def test_says_why_a_backend_is_chosen(dtype, broken, expected, monkeypatch):
    monkeypatch.setattr(choice, "why_not_triton", lambda: broken)
    monkeypatch.setattr(backends, "architecture", lambda device: (9, 0))
    assert env.choice(torch.device("cuda"), dtype).startswith(expected)


def test_a_refused_variable_is_reported(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_CPU_BFLOAT16", "quick")
    assert "GCL_KERNELS_CPU_BFLOAT16: expected 'widen' or 'native', got 'quick'" in env.describe(torch.device("cpu"))


def test_a_package_that_is_absent_is_named():
    assert env.version("no_such_package_of_this_name") == "not installed"


def test_runs_as_a_command_without_triton_and_numpy():
    block = "import runpy, sys; sys.modules.update(triton=None, numpy=None); "
    start = "runpy.run_module('gcl_kernels.env', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", block + start], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "cpu: " in result.stdout
