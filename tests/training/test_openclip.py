"""open_clip imports and trains here, whatever torchvision this machine has."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from gcl_kernels.training import openclip
from gcl_kernels.training.data import InputError, load_image


def test_the_tiny_model_is_one_of_open_clips(tmp_path):
    model, tokenizer, preprocess = openclip.create_model()
    assert openclip.TINY_MODEL in openclip.import_open_clip().list_models()
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(7.6e6, rel=0.01)
    tokens = tokenizer(["a", "greek small alpha"])
    assert tokens.shape == (2, 16)
    assert model.encode_text(tokens).shape == (2, 128)
    from PIL import Image

    Image.new("RGBA", (50, 40)).save(tmp_path / "image.png")
    image = preprocess(load_image(tmp_path / "image.png"))
    assert image.shape == (3, 32, 32)
    assert model.encode_image(image[None]).shape == (1, 128)


def test_the_context_length_is_the_models_and_the_tokenizers():
    model, tokenizer, _ = openclip.create_model(context_length=9)
    tokens = tokenizer(["one two three four five six seven eight nine ten"])
    assert tokens.shape == (1, 9)
    assert model.encode_text(tokens).shape == (1, 128)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(openclip.create_model()[0])
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert a.equal(b), name


def test_an_unknown_model_is_an_input_error_that_helps():
    with pytest.raises(
        InputError, match=r"^expected a model name of open_clip, got 'ViT-B-33'; close to it: .*ViT-B-32"
    ):
        openclip.create_model("ViT-B-33")


def test_nothing_is_declared_beside_a_torchvision_that_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(openclip, "_declared", [])
    openclip._import_torchvision()
    assert openclip._declared == []


def test_another_fault_of_torchvision_is_not_hidden(monkeypatch):
    def broken(name, *args, **kwargs):
        raise RuntimeError("another fault")

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        openclip._import_torchvision()
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr("builtins.__import__", broken)
    with pytest.raises(RuntimeError, match="another fault"):
        openclip._import_torchvision()
