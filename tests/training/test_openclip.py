"""open_clip imports and trains here, whatever torchvision this machine has."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path

import pytest
import torch

from gcl_kernels.training import openclip
from gcl_kernels.training.data import load_image
from gcl_kernels.training.errors import InputError


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


def test_a_configuration_of_ones_own_is_a_model_by_the_path_of_its_file(tmp_path):
    path = tmp_path / "Own-Model.json"
    config = json.loads(Path(openclip.__file__).with_name(f"{openclip.TINY_MODEL}.json").read_text())
    path.write_text(json.dumps(config | {"embed_dim": 24}))
    model, tokenizer, _ = openclip.create_model(str(path))
    assert model.encode_text(tokenizer(["a"])).shape == (1, 24)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "expected a model configuration of open_clip in JSON, got .*No such file"),
        ("{", "expected a model configuration of open_clip in JSON, got 'Expecting property name"),
        (
            '{"embed_dim": 3}',
            "expected a model configuration of open_clip, with embed_dim, vision_cfg and text_cfg, got another",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_an_input_error_and_spoils_nothing(tmp_path, content, fault):
    path = tmp_path / "Bad-Model.json"
    if content:
        path.write_text(content)
    with pytest.raises(InputError, match=f"^{path}: {fault}"):
        openclip.create_model(str(path))
    openclip.create_model()
    assert "Bad-Model" not in openclip.import_open_clip().list_models()


def test_a_hugging_face_text_tower_needs_transformers(monkeypatch):
    without = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(openclip, "importlib", without)
    with pytest.raises(
        InputError, match=r"^expected the package transformers for 'xlm-roberta-base', got none: pip install"
    ):
        openclip.create_model("xlm-roberta-base-ViT-B-32")


def test_a_hugging_face_text_tower_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 8,
    }
    transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "arrow", "alpha"])
    )
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_proj_type": None,
            "hf_pooler_type": "mean_pooler"}  # fmt: skip
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
    path = tmp_path / "Own-BERT.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    model, tokenizer, _ = openclip.create_model(str(path), context_length=6)
    tokens = tokenizer(["left arrow", "alpha"])
    assert tokens.tolist() == [[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0]]
    assert model.encode_text(tokens).shape == (2, 16)


def test_what_is_frozen_stays_in_evaluation_mode():
    model = torch.nn.ModuleDict(
        {
            "locked": torch.nn.Sequential(
                torch.nn.Linear(3, 3),
                torch.nn.BatchNorm1d(3),
                torch.nn.BatchNorm1d(3, affine=False),
                torch.nn.Dropout(),
            ),
            "partly": torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)),
            "no weights": torch.nn.Dropout(),
        }
    )
    model["locked"].requires_grad_(False)
    model["partly"][1].requires_grad_(False)
    openclip.hold_frozen(model)
    copied = copy.deepcopy(model)
    for some in (model, copied):
        some.train()
        modes = {name: module.training for name, module in some.named_modules()}
        assert {name for name, mode in modes.items() if not mode} == {
            "locked",
            "partly.1",
            *(f"locked.{k}" for k in range(4)),
        }
        before = copy.deepcopy(some["locked"].state_dict())
        x = torch.randn(5, 3)
        assert some["locked"](x).equal(some["locked"](x))
        torch.testing.assert_close(some["locked"].state_dict(), before, rtol=0, atol=0)
        some.eval()
        assert not any(module.training for module in some.modules())
    copied["locked"].eval().train()
    assert copied["locked"].train() is copied["locked"]
