"""The notebook runs from its first cell to its last at toy size, and what is stored in it is a whole run's output."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def printed(cells):
    """All that code cells have printed, as one text."""
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def pictures(cells):
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def check(said, largest):
    """What a run says is true of any run: equal losses, less memory, losses that fall."""
    dense, ours, difference = re.search(
        r"dense ([\d.]+), ClipLoss ([\d.]+); gradients differ by (\S+) of", said
    ).groups()
    assert float(ours) == pytest.approx(float(dense), rel=1e-6, abs=2e-6)
    assert float(difference) < 1e-5
    peaks = dict(re.findall(rf"^(.+), N = {largest}: (\d+) MiB$", said, re.MULTILINE))
    of_dense, *of_ours = map(float, peaks.values())
    assert len(of_ours) == 2
    assert of_dense == pytest.approx(4 * largest**2 * 4 / 2**20, rel=0.1)  # four N x N matrices
    assert max(of_ours) < of_dense
    falls = re.findall(r"^weights \w+: loss ([\d.]+) at first, ([\d.]+) at last$", said, re.MULTILINE)
    assert len(falls) == 2
    assert all(float(last) < 0.95 * float(first) for first, last in falls)
    return [float(ndcg) for ndcg in re.findall(r"NDCG@8 ([\d.]+)", said)]


def test_the_notebook_runs(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    sizes = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) =", sizes.source, re.MULTILINE) == ["SIZES", "STEPS"]
    sizes.source = "SIZES = (256, 1024)\nSTEPS = 60"
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    ndcg = check(printed(notebook.cells), 1024)
    assert len(ndcg) == 2
    assert min(ndcg) > 0.4  # a random order has 0.17
    assert pictures(notebook.cells) == 3


def test_what_is_stored_is_one_whole_run():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert pictures(code) == 3
    said = printed(code)
    check(said, 8192)
    assert not re.search(r"/(home|tmp|work|Users|root)/|File \"", said)  # nobody's machine
