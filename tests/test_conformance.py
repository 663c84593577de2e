"""check_loss passes our losses, and fails broken ones where they are broken."""

import subprocess
import sys

import pytest
import torch

from gcl_kernels import ClipLoss, SigLipLoss, testing
from gcl_kernels.testing.conformance import clip


def failed(function, against="clip"):
    return {row.name for row in testing.check_loss(function, against).rows if not row.passed}


@pytest.mark.parametrize(("loss", "against"), [(ClipLoss(), "clip"), (SigLipLoss(), "siglip")])
def test_ours_pass(loss, against):
    report = testing.check_loss(loss, against)
    assert report.passed, str(report)


def modifies(lhs, rhs, scale):
    value = clip(lhs, rhs, scale)
    lhs.data.add_(1)
    return value


def columns_only(lhs, rhs, scale):
    return torch.nn.functional.cross_entropy(scale * rhs @ lhs.T, torch.arange(len(lhs)))


def float32_only(lhs, rhs, scale):
    if lhs.dtype != torch.float32:
        raise TypeError("float32 only")
    return clip(lhs, rhs, scale)


def test_broken_losses_fail():
    assert "inputs unmodified" in failed(modifies)
    assert "swap symmetry" in failed(columns_only)
    assert failed(float32_only) == {f"accuracy, {t}" for t in ("float64", "bfloat16", "float16")}


def without_scale(lhs, rhs, scale):
    return clip(lhs, rhs, scale.detach() if isinstance(scale, torch.Tensor) else scale)


def nan_on_duplicates(lhs, rhs, scale):
    return clip(lhs, rhs, scale) * (float("nan") if len(lhs.unique(dim=0)) < len(lhs) else 1.0)


def wrong_in_bfloat16(lhs, rhs, scale):
    return clip(lhs, rhs, scale) * (1.5 if lhs.dtype == torch.bfloat16 else 1.0)


def nondeterministic(lhs, rhs, scale):
    return clip(lhs, rhs, scale) * (1 + 1e-5 * torch.rand(()))


def test_a_fault_fails_its_rows():
    assert failed(nan_on_duplicates) == {"duplicated rows"}
    assert failed(wrong_in_bfloat16) == {"accuracy, bfloat16"}
    assert "determinism" in failed(nondeterministic)
    assert "accuracy, float32" in failed(without_scale)


def test_against_is_named():
    with pytest.raises(ValueError, match="against: expected"):
        testing.check_loss(clip, "other")


@pytest.mark.parametrize(
    ("name", "status"), [("gcl_kernels:ClipLoss", 0), ("tests.test_conformance:columns_only", 1), ("no_module:f", 2)]
)
def test_command_line(name, status):
    command = [sys.executable, "-m", "gcl_kernels.testing", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert ("| swap symmetry | fail |" in done.stdout) == (status == 1)
    assert len(done.stderr.splitlines()) == (status == 2)
