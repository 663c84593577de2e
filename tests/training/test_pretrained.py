"""Weights to begin with that are not there, damaged, or of another model: one line each, status 2, before the data is read."""

from __future__ import annotations

import logging
import sys
import zipfile

import pytest
import torch

from gcl_kernels.training.__main__ import main
from gcl_kernels.training.openclip import create_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(create_model()[0].state_dict(), path)
    return path


def make(how, path, weights):
    content = weights.read_bytes()
    if how == "a CSV":
        path.write_text("query,title\na,b\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "damaged":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "a zip archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/weights.bin", b"x" * 100)
    elif how == "another model":
        torch.save({"visual.conv1.weight": torch.zeros(3), "logit_scale": torch.zeros(())}, path)
    elif how == "a list":
        torch.save([torch.zeros(3)], path)
    elif how == "a folder":
        path.mkdir()


FAULTS = {
    "missing": "expected a readable file, or one of open_clip's tags for ViT-Tiny-8-32px (none), got '{path}': No such file",
    "a folder": "expected a file of weights, got the folder '{path}'",
    "a CSV": "expected a whole file of weights of ViT-Tiny-8-32px, got '{path}', a truncated file or another kind of file",
    "empty": "expected a whole file of weights of ViT-Tiny-8-32px, got '{path}', a truncated file or another kind of file",
    "truncated": "expected a whole file of weights of ViT-Tiny-8-32px, got '{path}', a truncated file or another kind of file",
    "damaged": "expected a whole file of weights, got '{path}', which is damaged: wrong checksum in",
    "a zip archive": "expected a file of weights, got '{path}', a zip archive of 1 other files, first 'model/weights.bin'",
    "another model": "expected a whole file of weights of ViT-Tiny-8-32px, got '{path}', weights of another model",
    "a list": "expected a whole file of weights of ViT-Tiny-8-32px, got '{path}', a truncated file or another kind of file",
}


@pytest.mark.parametrize("how", FAULTS)
def test_weights_that_cannot_be_used_are_one_line(tmp_path, capsys, weights, how):
    path = tmp_path / "other.pt"
    make(how, path, weights)
    argv = [
        "--train-data=none.csv",
        "--left-keys=query",
        "--right-keys=title",
        "--weight-key=score",
        f"--logs={tmp_path}",
    ]
    assert main([*argv, f"--pretrained={path}"]) == 2
    out = capsys.readouterr()
    (line,) = out.err.splitlines()
    assert line.startswith("--pretrained: expected ")
    assert FAULTS[how].format(path=path) in line


def test_the_right_weights_are_taken(weights):
    model = create_model(pretrained=str(weights))[0]
    expected = torch.load(weights, weights_only=True)
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


def test_random_weights_that_were_asked_for_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        create_model()
    assert not caplog.records


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_a_tokenizer_that_needs_a_package_says_which(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = [
        "--train-data=none.csv",
        "--left-keys=query",
        "--right-keys=title",
        "--weight-key=score",
        f"--logs={tmp_path}",
    ]
    assert main([*argv, f"--model={model}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("got none: pip install transformers")
