"""The kernels' tests run where the kernels can: on a GPU, or on CPU tensors in Triton's interpreter.

Triton decides for its interpreter when it is first imported, from `TRITON_INTERPRET`; the compiler's tests need it off. So
without a GPU the files in `KERNEL_TESTS` are run by `test_interpreter.py`, each in a process of its own with it set.
By hand: `TRITON_INTERPRET=1 pytest tests/triton`.
"""

import os

import pytest
import torch
from hypothesis import Phase, settings

KERNEL_TESTS = (
    "test_accuracy.py",
    "test_sigmoid.py",
    "test_launch.py",
    "test_loss_of_lines.py",
    "test_tape.py",
    "test_branches.py",
    "test_operators.py",
    "test_strips.py",
    "test_fields.py",
    "test_parts.py",
)
COMPILER_TESTS = ("test_aot.py", "test_interpreter.py", "test_config.py", "test_jit.py")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:  # at a quarter of a second a case, shrinking one takes longer than reading it
    settings.register_profile("interpreted", settings(), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("interpreted")


def pytest_ignore_collect(collection_path):
    if collection_path.name in COMPILER_TESTS:
        return INTERPRETED or None
    if collection_path.name in KERNEL_TESTS:
        return not (INTERPRETED or torch.cuda.is_available()) or None
    return None


@pytest.fixture
def device():
    return DEVICE
