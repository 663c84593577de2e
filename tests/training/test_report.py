"""The picture of evaluated runs: drawn from files, with or without images and learning curves."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.report import draw_curves, main


def run_folder(path, values, image=None):
    path.mkdir()
    with (path / "per_query.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", *NAMES])
        writer.writerows([query, *[value] * len(NAMES)] for query, value in values.items())
    found = [
        {"id": "1", "grade": 100, "title": "costs $5 or $6", "image": image or ""},
        {"id": "2", "grade": 0, "title": ""},
    ]
    examples = [{"query": query, "text": query, "found": found} for query in values]
    (path / "examples.json").write_text(json.dumps({"kinds": {"title": "txt", "image": "img"}, "examples": examples}))
    return path


def test_two_runs_with_images_and_curves_are_drawn(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 255)).save(tmp_path / "pink.png")
    a = run_folder(tmp_path / "a", {"x": 0.2, "y": 0.5, "z": 0.1}, str(tmp_path / "pink.png"))
    b = run_folder(tmp_path / "b", {"x": 0.4, "y": 0.4, "w": 0.1}, str(tmp_path / "none.png"))
    for name in ("clip", "gcl"):
        (tmp_path / name).mkdir()
        history = [{"step": step, "NDCG@10": step / 10} for step in (1, 2, 2)]
        (tmp_path / name / "results.json").write_text(json.dumps({"loss": [3.0, 2.0, 1.0], "history": history}))
    out = tmp_path / "report.png"
    assert (
        main(["--runs", str(a), str(b), "--training", str(tmp_path / "clip"), str(tmp_path / "gcl"), f"--out={out}"])
        == 0
    )
    with Image.open(out) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width > 1000
        assert (255, 0, 255) in colours, "the retrieved image is in the picture"
        assert {(0x1A, 0x7F, 0x37), (0xC9, 0x44, 0x3E)} <= colours, "a query won and a query lost"


def test_one_run_without_anything_else_is_drawn(tmp_path):
    run = run_folder(tmp_path / "a", {"x": 0.2})
    (run / "examples.json").unlink()
    assert main(["--runs", str(run), f"--out={tmp_path / 'report.png'}"]) == 0
    assert (tmp_path / "report.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "expected a readable file, got 'No such file or directory'"),
        ("a,b\n1,2\n", "expected a per_query.csv of this"),
    ],
)
def test_what_is_no_run_is_one_line_and_status_2(tmp_path, capsys, content, fault):
    if content:
        (tmp_path / "per_query.csv").write_text(content)
    assert main(["--runs", str(tmp_path)]) == 2
    assert fault in capsys.readouterr().err


def test_evaluations_are_a_curve_where_there_are_several_steps():
    from matplotlib.figure import Figure

    for steps, axes in (([8, 8], 1), ([4, 4, 8, 8], 2)):
        figure = Figure()
        history = [{"step": step, "NDCG@10": 0.1} for step in steps]
        draw_curves(figure.subplots(), {"run": {"loss": [2.0, 1.0], "history": history}})
        assert len(figure.axes) == axes
