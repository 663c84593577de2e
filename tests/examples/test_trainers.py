"""The examples inside other libraries' trainers: the losses that they print equal the known ones at first, and fall."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

from gcl_kernels.integrations.importing import import_torchvision

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 12

# What the libraries warn of is not these scripts' to act on; in one process they are imported once.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def lines(monkeypatch, capsys):
    """A function that runs the example of a library and gives what it prints."""

    def run(library, rows):
        if importlib.util.find_spec("torchvision"):
            import_torchvision()  # beside a CPU-only torch the libraries' import of it fails otherwise
        pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
        monkeypatch.setattr(sys, "argv", ["example", "--rows", str(rows), "--steps", str(STEPS)])
        runpy.run_path(str(EXAMPLES / f"{library}_clip.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("library", "rows"), [("transformers", 48), ("lightning", 48), ("accelerate", 48)])
def test_losses_are_equal_at_first_and_fall(library, rows, lines):
    said = lines(library, rows)
    ours, theirs = map(float, re.search(r"^first batch: .* ([\d.]+), .* ([\d.]+)$", said, re.MULTILINE).groups())
    assert ours > 1
    assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)  # printed to six decimals
    losses = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss ([\d.]+)$", said, re.MULTILINE)}
    assert list(losses) == list(range(STEPS))
    assert losses[STEPS - 1] < 0.9 * losses[0]
