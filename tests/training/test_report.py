"""The picture of evaluated runs: drawn from files, with or without images and learning curves."""

from __future__ import annotations

import csv
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given
from matplotlib.text import Text
from PIL import Image

from gcl_kernels.training.examples import drawn, extremes
from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.report import draw_curves, main
from gcl_kernels.training.report_examples import shortened, wrapped


def run_folder(path, values, image=None, about=None):
    path.mkdir()
    with (path / "per_query.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", *NAMES])
        writer.writerows([query, *[value] * len(NAMES)] for query, value in values.items())
    found = [{"id": "1", "grade": 2.5, "gain": 100}, {"id": "2", "grade": None, "gain": 0}]
    content = {
        "kinds": {"title": "txt", "image": "img"},
        "about": {"ground_truth": "g", "lowest_grade": 0.0, "highest_grade": 2.5},
        "documents": {"1": {"title": "costs $5 or $6", "image": image or ""}, "2": {"title": "", "image": ""}},
        "examples": [{"query": query, "text": query, "found": found} for query in values],
    }
    (path / "examples.json").write_text(json.dumps(content))
    (path / "evaluation.json").write_text(json.dumps({"ground_truth": "g", **(about or {})}))
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


ABOUT = {"test_csv": "t.csv", "doc_meta": "c.json", "documents": 9, "model": "ViT", "pretrained": "best.pt", "step": 40,
         "queries_in_file": 99, "queries_are": "drawn by weight", "date": "2031-05-06 07:08"}  # fmt: skip


def texts_of_report(monkeypatch, *argv):
    """Every text in the picture that the command line draws."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: found.extend(figure.findobj(Text)))
    assert main(list(argv)) == 0
    return [text.get_text() for text in found if text.get_text()]


def test_the_picture_says_what_it_is_of_and_shows_original_grades(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "a", {"good": 0.9, "middling": 0.5, "bad": 0.1}, about=ABOUT)
    texts = texts_of_report(monkeypatch, "--runs", str(run), f"--out={tmp_path / 'r.png'}")
    assert any(
        "a: t.csv against c.json (9 documents), 3 queries of 99, drawn by weight; ViT, best.pt, step 40; 2031" in text
        for text in texts
    )
    assert {"best: good", "median: middling", "worst: bad"} <= set(texts)
    assert texts.count("2.5") == texts.count("not judged") == texts.count("costs $5 or $6") == 3
    assert {"grades 0 to 2.5: upper third", "middle third", "lower third", "not judged, counts as 0"} <= set(texts)


def test_queries_are_chosen_by_text_id_or_number(tmp_path, monkeypatch, capsys):
    values = {f"query {number}_{{!@#~}}_": number / 40 for number in range(40)}
    run = run_folder(tmp_path / "a", values, about=ABOUT)
    options = ["--runs", str(run), f"--out={tmp_path / 'r.png'}"]
    shown = texts_of_report(monkeypatch, *options, "--queries", "query 7", "query 31_{!@#~}_")
    assert [text.partition(":")[2] for text in shown if text.startswith("chosen")] == [
        " query 7_{!@#~}_",
        " query 31_{!@#~}_",
    ]
    shown = texts_of_report(monkeypatch, *options, "--queries", "5")
    assert len([text for text in shown if text.startswith("drawn: ")]) == 5
    assert main([*options, "--queries", "query 77"]) == 2
    assert (
        "--queries: expected queries among the 40 that examples.json of every run has, got 'query 77'"
        in capsys.readouterr().err
    )


def test_examples_of_another_ground_truth_are_left_out(tmp_path, monkeypatch, capsys):
    run = run_folder(tmp_path / "a", {"x": 0.2}, about={"ground_truth": "other"})
    texts = texts_of_report(monkeypatch, "--runs", str(run), f"--out={tmp_path / 'r.png'}")
    assert "best: x" not in texts
    assert "of another ground truth than the metrics beside it; left out" in capsys.readouterr().out


@given(st.dictionaries(st.text(), st.sampled_from([0.0, 0.25, 1.0]), min_size=1), st.randoms())
def test_extremes_and_samples_do_not_depend_on_the_order(values, random):
    shuffled = dict(random.sample(list(values.items()), len(values)))
    assert extremes(shuffled) == extremes(values)
    assert drawn(list(shuffled)) == drawn(list(values))
    found = [values[query] for query in extremes(values).values()]
    assert found[0] == max(values.values())
    assert len(values) < 3 or (
        found[2] == min(values.values()) and found[1] == sorted(values.values())[len(values) // 2]
    )
    # In no order that means something: of many queries the first hundred are not those of the alphabet.
    assert drawn([f"{number:04}" for number in range(1000)])[:100] != [f"{number:04}" for number in range(100)]


@given(st.text(st.sampled_from("ab c$-é")), st.integers(2, 30))
def test_nothing_is_cut_without_an_ellipsis_and_words_stay_whole(text, length):
    words = text.split()
    for cut in (shortened(text, length), wrapped(text, length, 2)):
        assert all(len(line) <= length for line in cut.splitlines())
        kept = cut.split()
        if kept != words:
            assert "…" in cut
            assert all(word in words for word in kept if "…" not in word)


def test_a_file_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    run = run_folder(tmp_path / "a", {"x": 0.2})
    for out in (tmp_path / "r.nonsense", tmp_path / "a" / "per_query.csv" / "r.png"):
        assert main(["--runs", str(run), f"--out={out}"]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"--out {out}: ")
        assert len(message.splitlines()) == 1
