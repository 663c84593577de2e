"""What an earlier run left is used again for the same things alone, and what is not the evaluator's is never overwritten."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

from gcl_kernels.training import evaluate as evaluate_module
from gcl_kernels.training.evaluate import main
from gcl_kernels.training.openclip import TINY_MODEL, create_model
from tests.training.evaluating import evaluate, rewrite


@pytest.fixture
def embedded(monkeypatch):
    """How often a corpus has been embedded."""
    calls = []
    original = evaluate_module.embed_corpus
    monkeypatch.setattr(evaluate_module, "embed_corpus", lambda *a, **o: calls.append(1) or original(*a, **o))
    return calls


def test_features_are_used_again_only_for_the_same_model_and_corpus(files, capsys, embedded):
    assert evaluate(files) == 0
    first = (files / "out" / "output.json").read_text()
    assert evaluate(files) == 0
    assert len(embedded) == 1
    out = capsys.readouterr().out
    assert f"{files / 'out' / 'features.pt'}: used again, 3 documents" in out
    assert out.count("1 images could not be read") == 2, "what was lost then is missing still"
    assert (files / "out" / "output.json").read_text() == first


def save_weights(path, seed):
    torch.manual_seed(seed)
    torch.save(create_model(TINY_MODEL)[0].state_dict(), path)


CHANGES = {
    "weights of the fields": lambda files: ["--right-weights=[0.5,0.5]"],
    "kinds": lambda files: ["--img-or-txt=txt;txt,txt"],
    "fewer fields": lambda files: ["--right-keys=title", "--right-weights=1", "--img-or-txt=txt;txt"],
    "context": lambda files: ["--context-length=12"],
    "checkpoint overwritten": lambda files: save_weights(files / "model.pt", 1),
    "document": lambda files: rewrite(files / "corpus.json", "a blue square", "a blue circle"),
    "image": lambda files: Image.new("RGB", (32, 32), "yellow").save(files / "blue.png"),
    "image gone": lambda files: (files / "blue.png").unlink(),
    "image that can be read now": lambda files: Image.new("RGB", (32, 32), "yellow").save(files / "broken.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_gives_what_a_fresh_directory_gives(files, capsys, embedded, change):
    save_weights(files / "model.pt", 0)
    given = f"--pretrained={files / 'model.pt'}"
    assert evaluate(files, given) == 0
    options = CHANGES[change](files)
    options = options if isinstance(options, list) else []
    capsys.readouterr()
    assert evaluate(files, given, *options) == 0
    assert "features.pt: made again: " in capsys.readouterr().out
    assert evaluate(files, given, *options, out="fresh") == 0
    assert len(embedded) == 3
    for name in ("output.json", "retrieval.json", "gt_results.json", "per_query.csv"):
        assert (files / "out" / name).read_text() == (files / "fresh" / name).read_text()


def test_an_image_that_could_not_be_read_for_a_while_is_found_when_it_can(files, capsys, embedded, monkeypatch):
    image = files / "blue.png"
    status = image.stat()
    good = image.read_bytes()
    image.write_bytes(b"x" * len(good))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert evaluate(files) == 0
    image.write_bytes(good)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert evaluate(files) == 0
    assert "features.pt: made again: 1 images that can be read now" in capsys.readouterr().out
    assert len(embedded) == 2


def test_a_configuration_of_the_same_name_with_another_content_is_another_model(files, capsys, embedded):
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
              "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}}  # fmt: skip
    path = files / "own-config.json"
    for quick in (False, True):
        path.write_text(json.dumps({**config, "quick_gelu": quick}))
        assert evaluate(files, f"--model={path}") == 0
    assert "features.pt: made again: model" in capsys.readouterr().out
    assert len(embedded) == 2


def other_scores(files):
    rewrite(files / "test.csv", "red thing,2,50", "red thing,2,100")
    rewrite(files / "test.csv", "red thing,1,100", "red thing,1,11")
    return []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: ["--weight_key=other"], "--weight-key (score_linear then, other now)"),
        (lambda files: ["--weight-key="], "--weight-key (score_linear then, none now)"),
        (lambda files: ["--top-q=1"], "--top-q (2000 then, 1 now)"),
        (lambda files: ["--top-k=1"], "--top-k (1000 then, 1 now)"),
        (other_scores, "judged pairs"),
    ],
)
def test_the_ground_truth_of_an_earlier_run_never_wins(files, capsys, change, said):
    text = (files / "test.csv").read_text().splitlines()
    other = ["other", 5, 70, 60, 1, 2, 3]
    (files / "test.csv").write_text("".join(f"{line},{more}\n" for line, more in zip(text, other, strict=True)))
    assert evaluate(files) == 0
    options = change(files)
    capsys.readouterr()
    assert evaluate(files, *options) == 0
    out = capsys.readouterr().out
    assert "gt_results.json: made again, as " in out
    assert said in out
    assert evaluate(files, *options, out="fresh") == 0
    for name in ("output.json", "gt_results.json", "per_query.csv", "retrieval.json"):
        assert (files / "out" / name).read_text() == (files / "fresh" / name).read_text()


def test_a_ground_truth_written_elsewhere_for_other_scores_is_refused_and_stays(files, capsys):
    path = files / "gt.json"
    assert evaluate(files, f"--gt_results_path={path}") == 0
    before = path.read_bytes()
    assert evaluate(files, f"--gt_results_path={path}", out="b") == 0
    assert "ground truth as given, 3 queries; the grades of " in capsys.readouterr().out
    assert evaluate(files, f"--gt_results_path={path}", "--weight-key=", out="b") == 2
    message = capsys.readouterr().err
    assert message.startswith(
        f"{path}: expected a ground truth of the same pairs and options, got one that differs in --weight-key"
    )
    assert path.read_bytes() == before


def test_a_ground_truth_of_others_is_not_overwritten(files, capsys):
    (files / "out").mkdir()
    path = files / "out" / "gt_results.json"
    path.write_text('{"red thing_{!@#~}_": {"2": 7}}')
    assert evaluate(files) == 2
    assert capsys.readouterr().err.startswith(f"{path}: expected a ground truth that this evaluator wrote")
    assert path.read_text() == '{"red thing_{!@#~}_": {"2": 7}}'
    assert evaluate(files, f"--gt_results_path={path}") == 0
    assert "1 have other grades than" in capsys.readouterr().out


@pytest.mark.parametrize("given", [True, False])
def test_features_of_others_are_overwritten_only_on_demand(files, capsys, given):
    path = files / ("mine.pt" if given else "out/features.pt")
    path.parent.mkdir(exist_ok=True)
    torch.save([torch.eye(3)], path)  # as the authors write them
    before = path.read_bytes()
    options = [f"--features-path={path}"] if given else []
    assert evaluate(files, *options) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{path}: expected features of this evaluator, got a file that it cannot read")
    assert len(message.splitlines()) == 1
    assert path.read_bytes() == before
    assert evaluate(files, *options, "--overwrite-feature", "True") == 0
    assert evaluate(files, *options) == 0
    assert f"{path}: used again" in capsys.readouterr().out


def test_given_features_of_another_model_are_refused_and_stay(files, capsys):
    given = f"--features-path={files / 'mine.pt'}"
    assert evaluate(files, given) == 0
    before = (files / "mine.pt").read_bytes()
    assert evaluate(files, given, "--context-length=12", out="b") == 2
    assert "mine.pt: expected features of the same model and corpus, got others: " in capsys.readouterr().err
    assert (files / "mine.pt").read_bytes() == before


def test_metrics_alone_are_refused_for_what_the_files_were_not_made_from(files, capsys):
    assert evaluate(files) == 0
    assert evaluate(files, "--metric-only") == 0
    for other in (["--weight-key="], ["--context-length=12"], other_scores(files)):
        assert evaluate(files, "--metric-only", *other) == 2
        assert "retrieval.json: expected a ranking made from the same things" in capsys.readouterr().err
    # A ground truth of another run beside the ranking.
    assert evaluate(files, "--weight-key=", out="b") == 0
    for name in ("gt_results.json", "gt_results.json.made-from.json"):
        (files / "out" / name).write_bytes((files / "b" / name).read_bytes())
    assert main([f"--output-dir={files / 'out'}", "--metric-only"]) == 2
    assert "expected the ground truth that retrieval.json was made with" in capsys.readouterr().err
