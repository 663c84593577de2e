"""What evaluation takes from the checkpoint of a training run, and that both measure the same."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from gcl_kernels.training import run as training
from gcl_kernels.training.evaluate import main
from gcl_kernels.training.evaluate_options import parse_args
from gcl_kernels.training.options import parse_args as parse_training

COLOURS = ("red", "blue", "green", "white", "black", "yellow")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: its folder, and the metrics of its own evaluation."""
    folder = tmp_path_factory.mktemp("run")
    corpus = {}
    for number, name in enumerate(COLOURS):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
        corpus[f"d{number}"] = {"title": f"a {name} square", "picture_image": f"{name}.png"}
    # Two with one title, and one that is judged and has nothing: it can never be found.
    corpus |= {"e": {"title": "a red square"}, "f": {"title": "a red square"}, "nothing": {"title": None}}
    (folder / "corpus.json").write_text(json.dumps(corpus))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "doc", "title", "picture_image", "clicks"])
        for query, name in enumerate(COLOURS):
            for number, (identity, cells) in enumerate(corpus.items()):
                if (query + number) % 3 or identity == "nothing":
                    row = [cells.get("title") or "", cells.get("picture_image") or ""]
                    writer.writerow([f"a {name} thing", identity, *row, (7 * query + 3 * number) % 11])
    options = [
        f"--train-data={folder / 'pairs.csv'}", "--left-keys=query", "--right-keys=title,picture_image", "--weight-key=clicks",
        "--right-weights=0.3,0.7", "--doc-id-key=doc", "--context-length=8", "--batch-size=8", "--steps=2", "--workers=1",
        "--skip-bad-rows", f"--val-data={folder / 'pairs.csv'}", f"--doc-meta={folder / 'corpus.json'}", f"--logs={folder}",
    ]  # fmt: skip
    (evaluation,) = training.train(parse_training([*options, "--name=logs"])).evaluations.values()
    return folder, evaluation


def evaluate(folder, *more, out="out"):
    return main(
        [f"--val-data={folder / 'pairs.csv'}", f"--doc-meta={folder / 'corpus.json'}", f"--output-dir={folder / out}",
         f"--pretrained={folder / 'logs' / 'checkpoints' / 'epoch_latest.pt'}", *more]
    )  # fmt: skip


def test_evaluation_measures_what_training_measured_without_another_word(run, capsys):
    folder, evaluation = run
    assert evaluate(folder) == 0
    out = capsys.readouterr().out
    assert "as trained, --left-keys query, --left-weights 1.0, --right-keys title,picture_image, " in out
    assert "other than trained" not in out
    with (folder / "out" / "per_query.csv").open() as file:
        ours = {row.pop("query"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    assert ours.keys() == evaluation.rows().keys()
    for query, of_query in evaluation.rows().items():
        assert ours[query] == pytest.approx(of_query, abs=1e-9)
    # A judged document that has nothing counts as not found in both: every row of the file is in the ground truth.
    assert int((evaluation.judged > 0).sum()) == len((folder / "pairs.csv").read_text().splitlines()) - 1
    about = json.loads((folder / "out" / "evaluation.json").read_text())
    assert (about["step"], about["model"], about["queries_in_file"]) == (2, "ViT-Tiny-8-32px", 6)


def test_the_order_of_the_files_changes_no_result(run):
    folder, _ = run
    assert evaluate(folder) == 0
    before = (folder / "pairs.csv").read_text(), (folder / "corpus.json").read_text()
    header, *rows = before[0].splitlines()
    try:
        (folder / "pairs.csv").write_text("\n".join([header, *sorted(rows, key=lambda row: row[::-1])]) + "\n")
        (folder / "corpus.json").write_text(json.dumps(dict(reversed(list(json.loads(before[1]).items())))))
        assert evaluate(folder, out="other") == 0
    finally:
        (folder / "pairs.csv").write_text(before[0])
        (folder / "corpus.json").write_text(before[1])
    for name in ("output.json", "per_query.csv", "gt_results.json", "retrieval.json"):
        assert (folder / "out" / name).read_text() == (folder / "other" / name).read_text()


def test_what_is_given_wins_and_is_said_in_one_line(run, capsys):
    folder, _ = run
    given = ["--right-keys=title", "--context_length=16", "--weight-key=", "--left-weights=2"]
    assert evaluate(folder, *given, out="given") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "other than trained" in line]
    assert line.endswith("other than trained, --right-keys title (trained with title,picture_image), --context-length 16 "
                         "(trained with 8), --weight-key  (trained with clicks)")  # fmt: skip
    assert evaluate(folder, "--right-weights=3,7", out="same") == 0
    assert "other than trained" not in capsys.readouterr().out


def options(*more):
    return parse_args(["--test_csv=t", "--doc_meta=d", "--output_dir=o", *more])


def test_the_default_weights_are_those_of_the_default_keys_alone(run):
    alone = options()
    assert (alone.right_keys, alone.right_weights) == (["image_local", "title"], [0.9, 0.1])
    assert (alone.left_keys, alone.left_weights, alone.img_or_txt) == (["text"], [1.0], [["txt"], ["img", "txt"]])
    assert (alone.model_name, alone.doc_id_key, alone.weight_key) == ("ViT-B-32", "product_id", None)
    other = options("--right-keys=abstract,cover_image")
    assert (other.right_weights, other.img_or_txt[1]) == ([1.0, 1.0], ["txt", "img"])
    folder, _ = run
    trained = f"--pretrained={folder / 'logs' / 'checkpoints' / 'epoch_latest.pt'}"
    turned = options(trained, "--right-keys=picture_image,title")
    assert (turned.right_weights, turned.img_or_txt[1]) == ([0.7, 0.3], ["img", "txt"])
    unknown = options(trained, "--right-keys=title,abstract")
    assert unknown.right_weights == [1.0, 1.0]


def test_both_spellings_and_the_authors_flags_with_values():
    a = options(
        "--model_name=M", "--weight_key=s_x", "--num_workers=0", "--overwrite-feature", "True", "--metric_only=False"
    )
    b = options("--model=M", "--weight-key", "s_x", "--workers", "0", "--overwrite_feature")
    assert {**vars(a), "given": 0} == {**vars(b), "given": 0}
    assert (a.weight_key, a.overwrite_feature, a.metric_only) == ("s_x", True, False)
