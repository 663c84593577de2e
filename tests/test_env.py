"""``python -m gcl_kernels.env``."""

import subprocess
import sys

import pytest
import torch

from gcl_kernels import backends, env


def test_reports_versions_devices_and_settings(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "17")
    lines = list(env.report())
    assert f"torch {torch.__version__}" in lines
    assert "workspace 17 MiB" in lines
    assert "GCL_KERNELS_WORKSPACE_MIB=17" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("cpu: "))
    assert lines[start + 2] == "    float32: backend torch: the device is not CUDA or HIP"


@pytest.mark.parametrize(
    ("dtype", "has_triton", "reason"),
    [(torch.float64, True, "float32"), (torch.bfloat16, False, "cannot be imported"), (torch.bfloat16, True, "sm_90")],
)
def test_says_why_a_backend_is_chosen(dtype, has_triton, reason, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
    monkeypatch.setattr(backends, "architecture", lambda device: (9, 0))
    assert reason in env.choice(torch.device("cuda"), dtype)


def test_a_package_that_is_absent_is_named():
    assert env.version("no_such_package_of_this_name") == "not installed"


def test_runs_as_a_command_without_triton_and_numpy():
    block = "import runpy, sys; sys.modules.update(triton=None, numpy=None); "
    start = "runpy.run_module('gcl_kernels.env', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", block + start], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "cpu: " in result.stdout
