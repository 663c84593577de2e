"""Exports: each form is loaded by its own library, and embeds as the model does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from gcl_kernels.training import checkpoint, exporting, openclip
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.export import main
from gcl_kernels.training.search_model import SearchModel

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
OPTIONS = {
    "left_keys": ["query"], "right_keys": ["title", "image"], "left_weights": [1.0], "right_weights": [0.3, 0.7],
    "img_or_txt": [["txt"], ["txt", "img"]], "context_length": 9, "weight_key": "score",
}  # fmt: skip
TEXTS = ["red shoe", "left arrow", "a text of more words than the context of this small model holds"]


def saved(folder, config, name, **options):
    """A checkpoint of a model whose configuration is no longer where it was."""
    source = folder / "elsewhere" / f"{name}.json"
    source.parent.mkdir()
    source.write_text(json.dumps(config))
    torch.manual_seed(0)
    model = openclip.create_model(str(source), context_length=9, **options)[0]
    content = {
        "state_dict": model.state_dict(),
        "gcl_kernels": {"options": {**OPTIONS, "model": str(source)}, "step": 3},
    }
    checkpoint.save(folder / "epoch_1.pt", content)
    source.unlink()
    return folder / "epoch_1.pt"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return saved(folder, {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "Own-CLIP", biased=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("bert")
    tower = folder / "tower"
    tower.mkdir()
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 8,
    }
    transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(tower)
    (tower / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "arrow", "red"]))
    transformers.BertTokenizerFast(str(tower / "vocab.txt")).save_pretrained(tower)
    text = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": str(tower),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    }
    return saved(folder, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text}, "Own-BERT")


def of_texts(path):
    model = SearchModel.load(str(path))
    with torch.inference_mode():
        return normalize(model.encoder.model.eval().encode_text(model.tokenizer(TEXTS)), dim=1).numpy()


def test_the_configuration_travels_with_the_checkpoint(clip, monkeypatch):
    """open_clip, which knows nothing of the model, makes it from the file beside the checkpoint."""
    open_clip = openclip.import_open_clip()
    expected = of_texts(clip)
    monkeypatch.delitem(open_clip.factory._MODEL_CONFIGS, "Own-CLIP")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    assert open_clip.get_model_config("Own-CLIP") is None
    open_clip.add_model_config(clip.with_name("Own-CLIP.json"))
    model = open_clip.create_model("Own-CLIP", pretrained=str(clip)).eval()
    with torch.inference_mode():
        found = normalize(model.encode_text(open_clip.get_tokenizer("Own-CLIP")(TEXTS)), dim=1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("form", exporting.FORMS)
def test_a_clip_model_is_loaded_back(form, clip, tmp_path, capsys):
    for package in {
        "sentence_transformers": ["sentence_transformers"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
    }.get(form, ["safetensors"]):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assert main([f"--pretrained={clip}", f"--out={tmp_path}", f"--to={form}"]) == 0
    assert "loaded back, embeddings equal to" in capsys.readouterr().out
    expected, open_clip = of_texts(clip), openclip.import_open_clip()
    with torch.inference_mode():
        if form == "safetensors":
            found = open_clip.create_model("Own-CLIP", pretrained=str(tmp_path / "Own-CLIP.safetensors")).eval()
            assert "logit_bias" in dict(found.named_parameters())
            found = found.encode_text(open_clip.get_tokenizer("Own-CLIP")(TEXTS))
        elif form == "open_clip":
            name = f"local-dir:{tmp_path / 'open_clip'}"
            found = open_clip.create_model(name).eval().encode_text(open_clip.get_tokenizer(name)(TEXTS))
            assert "| document | image | image | 0.7 |" in (tmp_path / "open_clip" / "README.md").read_text()
        elif form == "sentence_transformers":
            from sentence_transformers import SentenceTransformer

            path = tmp_path / "sentence_transformers"
            model = SentenceTransformer(str(path), trust_remote_code=True, device="cpu")
            found = torch.from_numpy(model.encode(TEXTS))
            assert "| document | image | image | 0.7 |" in (path / "README.md").read_text()
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "text.onnx"))
            found = torch.from_numpy(
                session.run(None, {"text": SearchModel.load(str(clip)).tokenizer(TEXTS).numpy()})[0]
            )
    np.testing.assert_allclose(normalize(found, dim=1).numpy(), expected, atol=1e-5)


def test_the_tokenizer_of_the_folder_is_the_models(clip, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = SearchModel.load(str(clip))
    exporting.write_clip_tokenizer(model.tokenizer, tmp_path)
    tokens = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))(TEXTS[:2])["input_ids"]
    assert [row[: len(mine)] for row, mine in zip(model.tokenizer(TEXTS[:2]).tolist(), tokens, strict=True)] == tokens


def test_a_text_tower_of_transformers_becomes_modules_of_sentence_transformers(bert, tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    assert main([f"--pretrained={bert}", f"--out={tmp_path}", "--to=sentence-transformers,open_clip"]) == 0
    assert "the text tower: loaded back" in capsys.readouterr().out
    model = library.SentenceTransformer(str(tmp_path / "sentence_transformers"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    np.testing.assert_allclose(model.encode(TEXTS), of_texts(bert), atol=1e-6)
    # The folder of open_clip has the text tower's configuration with it.
    for path in bert.with_name("tower").iterdir():
        path.unlink()
    name = f"local-dir:{tmp_path / 'open_clip'}"
    open_clip = openclip.import_open_clip()
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.inference_mode():
        found = normalize(open_clip.create_model(name).eval().encode_text(tokens), dim=1)
    assert tokens.shape[1] == 9
    np.testing.assert_allclose(found.numpy(), np.asarray(model.encode(TEXTS)), atol=1e-6)


def test_a_difference_is_an_error(clip):
    reference = exporting.Reference(SearchModel.load(str(clip)))
    other = reference.of_texts.clone()
    other[1, 2] += 0.01
    with pytest.raises(InputError, match=r"x: expected the model's own embeddings, got others, by up to 0.01"):
        reference.check("x", other)
    other[1, 2] = torch.nan
    with pytest.raises(InputError, match="nan"):
        reference.check("x", other)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to=pickle"], "expected some of safetensors, open_clip"),
        (["--pretrained=none.pt"], "--pretrained: expected a readable file"),
        (["--to=onnx"], "--to onnx: expected the package onnx, got none: pip install onnx"),
    ],
)
def test_faults_are_one_line(clip, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.setitem(sys.modules, "onnx", None)
    try:
        status = main([f"--pretrained={clip}", f"--out={tmp_path / 'out'}", *argv])
    except SystemExit as end:
        status = end.code
    assert status == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
    assert Path(tmp_path).exists()
