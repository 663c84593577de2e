"""The examples run and do what they say."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "gcl_from_python.py"


@pytest.mark.parametrize("own", [False, True])
def test_gcl_from_python_finds_what_was_asked_for(tmp_path, own):
    """The best document of each query is the one with its words, from the toy table and from a file of it."""
    example = runpy.run_path(str(EXAMPLE))
    argv = [f"--out={tmp_path / 'logs'}", "--steps=30"]
    if own:
        rows = example["toy_rows"]()
        with (tmp_path / "own.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["words", "name", "clicks"])
            writer.writeheader()
            writer.writerows(dict(zip(("words", "name", "clicks"), row.values(), strict=True)) for row in rows)
        argv += [f"--csv={tmp_path / 'own.csv'}", "--left-keys=words", "--right-keys=name", "--weight-key=clicks"]
    found = example["main"](argv)
    assert len(found) == 5
    for query, documents in found.items():
        assert documents[0].startswith(f"a {query}")
