"""How many operations that launch something a small step issues on the Triton backend."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import launches

# (a step, a forward without gradients), at most
BOUNDS = {
    "ClipLoss": (12, 4),
    "weights": (12, 4),
    "ids": (20, 7),
    "labels (N,)": (17, 6),
    "limits": (20, 7),
    "one direction": (12, 4),
    "false_negative_margin": (20, 11),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_a_step_issues_few_operations(case):
    loss = launches.forwards()[case]
    counts = [launches.counted(loss), launches.counted(loss, gradient=False)]
    assert all(count.total() <= bound for count, bound in zip(counts, BOUNDS[case], strict=True)), counts
    assert counts[0]["backward_tile (Triton)"] + counts[0]["forward_tile (Triton)"] == 2
