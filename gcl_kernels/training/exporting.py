"""A trained model in the forms that other libraries load: each is loaded back and held against the model itself.

| form | what is written | loaded by |
|---|---|---|
| safetensors | MODEL.safetensors, MODEL.json | `open_clip.add_model_config`, `open_clip.create_model(MODEL, pretrained=FILE)` |
| open_clip | open_clip/, as the Hugging Face Hub has it, with the tokenizer | `open_clip.create_model("local-dir:PATH")` |
| sentence_transformers | sentence_transformers/ | `SentenceTransformer(PATH)` |
| onnx | onnx/text.onnx, onnx/image.onnx | onnxruntime and others |
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import write_atomically, write_json_atomically
from gcl_kernels.training.openclip import configuration, import_open_clip
from gcl_kernels.training.pretrained import first_line
from gcl_kernels.training.search_model import SearchModel

TEXTS = [
    "red shoe",
    "",
    "a much longer text, with more words than a short context holds " * 3,
    "größe Ω 靴",
    "Left ARROW!",
]
"""Texts whose embeddings are compared."""

TOLERANCE = 1e-4
"""Largest difference of a coordinate of two embeddings of unit length that still are the same: other kernels round otherwise."""


def pictures() -> list[Image.Image]:
    """Pictures whose embeddings are compared: noise of several sizes."""
    sizes = ((40, 56), (224, 224), (31, 90))
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


class Reference:
    """What the model itself makes of `TEXTS` and `pictures()`: rows of unit length, float32."""

    def __init__(self, model: SearchModel) -> None:
        self.tokenizer: Any = model.tokenizer
        self.preprocess: Any = model.preprocess
        tower = model.encoder.model.cpu().eval()
        self.tokens = self.tokenizer(TEXTS)
        self.images = torch.stack([self.preprocess(picture) for picture in pictures()])
        with torch.inference_mode():
            self.of_texts, self.of_images = of_model(tower, self.tokens, self.images)

    def check(self, what: str, texts: Any, images: Any = None) -> str:
        """How far others are from it, in words.

        Raises:
            InputError: farther than `TOLERANCE`.
        """
        pairs = [(self.of_texts, texts)] + ([(self.of_images, images)] if images is not None else [])
        worst = max((right - torch.as_tensor(np.asarray(other))).abs().max().item() for right, other in pairs)
        if not worst <= TOLERANCE:
            raise InputError(f"{what}: expected the model's own embeddings, got others, by up to {worst:.3g}")
        return f"loaded back, embeddings equal to {worst:.1g}"


def of_model(model: Any, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    return normalize(model.encode_text(tokens), dim=-1), normalize(model.encode_image(images), dim=-1)


def weights_of(model: SearchModel) -> dict[str, Tensor]:
    """The weights, none of which shares memory with another, as safetensors wants them."""
    return {
        name: weight.detach().cpu().clone().contiguous() for name, weight in model.encoder.model.state_dict().items()
    }


def configuration_of(model: SearchModel) -> dict[str, Any]:
    """The configuration that makes the same model, a bias of the sigmoid loss included."""
    bias = getattr(model.encoder.model, "logit_bias", None)
    config = configuration(model.name, model.context_length, bias)
    if config is None:
        raise InputError(f"--model: expected a model of open_clip or a configuration of one's own, got '{model.name}'")
    return config


def base_name(model: SearchModel) -> str:
    return Path(model.name.removeprefix("local-dir:")).name.removesuffix(".json")


def needs(package: str) -> Any:
    """Import a package that only one form needs."""
    try:
        return __import__(package)
    except ImportError:
        raise InputError(f"expected the package {package}, got none: pip install {package}") from None


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    needs("safetensors")
    from safetensors.torch import save_file

    def write(new: Path) -> None:
        new.touch()
        mode = new.stat().st_mode
        save_file(weights, new, metadata={"format": "pt"})
        new.chmod(mode)  # safetensors lets nobody else read its files

    write_atomically(path, write)


def write_safetensors(model: SearchModel, reference: Reference, folder: Path) -> list[str]:
    name = base_name(model)
    path, config = folder / f"{name}.safetensors", folder / f"{name}.json"
    write_weights(path, weights_of(model))
    write_json_atomically(config, configuration_of(model), indent=4)
    open_clip = import_open_clip()
    open_clip.add_model_config(config)
    with quietly():
        made = open_clip.create_model(name, pretrained=str(path)).eval()
    with torch.inference_mode():
        said = reference.check(str(path), *of_model(made, reference.tokens, reference.images))
    return [f"{path}, {config.name}: {said}"]


def write_open_clip(model: SearchModel, reference: Reference, folder: Path) -> list[str]:
    folder = folder / "open_clip"
    write_open_clip_files(model, folder)
    open_clip = import_open_clip()
    with quietly():
        made, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        images = torch.stack([preprocess(picture) for picture in pictures()])
        said = reference.check(str(folder), *of_model(made.eval(), tokenizer(TEXTS), images))
    lines = [f"{folder}: {said}"]
    if is_hugging_face(model):
        lines.append(f"{folder}: open_clip_config.json names the text tower's configuration, config.json, by hf_model_name: once "
                     f"it is uploaded, that has to be the repository's name")  # fmt: skip
    return lines


def is_hugging_face(model: SearchModel) -> bool:
    """Whether the text tower is one of transformers."""
    return hasattr(getattr(model.encoder.model, "text", None), "transformer") and hasattr(
        model.encoder.model.text, "config"
    )


def write_open_clip_files(model: SearchModel, folder: Path) -> None:
    """What open_clip loads as `local-dir:FOLDER`."""
    folder.mkdir(parents=True, exist_ok=True)
    config, tower = configuration_of(model), model.encoder.model
    tokenizer: Any = model.tokenizer
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif hasattr(tokenizer, "bpe_ranks"):
        write_clip_tokenizer(tokenizer, folder)
    if is_hugging_face(model):
        tower.text.config.save_pretrained(folder)
        if Path(config["text_cfg"]["hf_model_name"]).is_dir():  # a folder of this machine
            config["text_cfg"] |= {"hf_model_name": str(folder.resolve()), "hf_tokenizer_name": str(folder.resolve())}
    from open_clip.push_to_hf_hub import save_config_for_hf

    save_config_for_hf(tower, folder / "open_clip_config.json", model_config=config)  # pyright: ignore[reportArgumentType]
    write_weights(folder / "open_clip_model.safetensors", weights_of(model))
    card = card_of(model, library="open_clip", loading=[
        "model, preprocess = open_clip.create_model_from_pretrained('hf-hub:OWNER/NAME')  # or local-dir:PATH",
        "tokenizer = open_clip.get_tokenizer('hf-hub:OWNER/NAME')",
    ], imported="import open_clip")  # fmt: skip
    write_atomically(folder / "README.md", lambda new: new.write_text(card, encoding="utf-8"))


def write_clip_tokenizer(tokenizer: Any, folder: Path) -> None:
    """open_clip's own tokenizer in the files of transformers' CLIPTokenizer; open_clip itself does not read them."""
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    vocabulary = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token): number
        for token, number in tokenizer.encoder.items()
    }
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    content = {
        "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": tokenizer.context_length,
        "pad_token": "!", **special,
    }  # fmt: skip
    write_json_atomically(folder / "vocab.json", vocabulary)
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    write_atomically(folder / "merges.txt", lambda new: new.write_text(text, encoding="utf-8"))
    write_json_atomically(folder / "tokenizer_config.json", content, indent=1)


def write_sentence_transformers(model: SearchModel, reference: Reference, folder: Path) -> list[str]:
    needs("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    from gcl_kernels.integrations.sentence_transformers import towers

    folder, native = folder / "sentence_transformers", False
    with quietly():
        if is_hugging_face(model):
            # With a pooling or projection that sentence-transformers has not, both towers go as open_clip has them.
            with contextlib.suppress(ValueError):
                made, native = towers.of_text_tower(model.encoder.model.text, model.tokenizer), True
        if not native:
            write_open_clip_files(model, folder / "open_clip")
            made = SentenceTransformer(modules=[towers.OpenCLIP(str(folder / "open_clip"))], device="cpu")
        made.save_pretrained(str(folder), create_model_card=False)
        trust = "" if native else ", trust_remote_code=True"
        card = card_of(model, library="sentence-transformers", loading=[f"model = SentenceTransformer('PATH'{trust})"],
                       imported="from sentence_transformers import SentenceTransformer" + (
                           "" if native else "  # needs the package gcl_kernels as well"))  # fmt: skip
        write_atomically(folder / "README.md", lambda new: new.write_text(card, encoding="utf-8"))
        made = SentenceTransformer(str(folder), device="cpu", trust_remote_code=not native, local_files_only=True)
        texts = made.encode(TEXTS, normalize_embeddings=True)
        images = None if native else made.encode(pictures(), normalize_embeddings=True)
    what = "the text tower" if native else "both towers"
    return [f"{folder}, {what}: {reference.check(str(folder), texts, images)}"]


class _Tower(nn.Module):
    """One tower, its embeddings of unit length: what goes into an ONNX file."""

    def __init__(self, encode: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return normalize(self.encode(inputs), dim=-1)


def write_onnx(model: SearchModel, reference: Reference, folder: Path) -> list[str]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needs(package)
    import onnxruntime  # pyright: ignore[reportMissingImports]

    folder = folder / "onnx"
    folder.mkdir(parents=True, exist_ok=True)
    tower = model.encoder.model
    inputs = {"text": (tower.encode_text, reference.tokens), "image": (tower.encode_image, reference.images)}
    found = []
    for name, (encode, example) in inputs.items():
        try:
            with quietly(), torch.no_grad():
                program = torch.onnx.export(
                    _Tower(encode, tower).eval(), (example[:2],), dynamo=True, input_names=[name], verbose=False,
                    output_names=["embeddings"], dynamic_shapes=({0: torch.export.Dim("rows")},),
                )  # fmt: skip
        except Exception as error:  # the exporter raises many kinds, with pages of text
            raise InputError(f"{name} tower: cannot be exported, {first_line(error)}") from None
        path = folder / f"{name}.onnx"
        program.save(path, external_data=False)  # pyright: ignore[reportOptionalMemberAccess]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        # Another number of rows than the example had.
        found.append(session.run(None, {name: example.numpy()})[0])
    write_json_atomically(
        folder / "configuration.json", configuration_of(model) | {"fields": fields_of(model)}, indent=4
    )
    return [f"{folder}, text.onnx and image.onnx: {reference.check(str(folder), *found)}"]


FORMS: dict[str, Callable[[SearchModel, Reference, Path], list[str]]] = {
    "safetensors": write_safetensors,
    "open_clip": write_open_clip,
    "sentence_transformers": write_sentence_transformers,
    "onnx": write_onnx,
}
"""Each writes into a folder and returns lines that say what was written and how it compares."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the remarks of libraries, about which nobody who exports a model can do anything."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def fields_of(model: SearchModel) -> dict[str, Any]:
    """`{"query": {field: {"kind", "weight"}}, "document": ...}`."""
    return {
        side: {key: {"kind": kind, "weight": weights[key]} for key, kind in kinds.items()}
        for side, (kinds, weights) in (("query", model.left), ("document", model.right))
    }


def card_of(model: SearchModel, *, library: str, loading: list[str], imported: str) -> str:
    """A model card: how it is loaded, and how the fields of a side make one embedding."""
    rows = [
        f"| {side} | {key.replace('|', ' ')} | {'text' if of['kind'] == 'txt' else 'image'} | {of['weight']:g} |"
        for side, fields in fields_of(model).items()
        for key, of in fields.items()
    ]
    head = ["---", f"library_name: {library}", "tags:", "- gcl_kernels", "- feature-extraction", "---", ""]
    words = (
        "Query and document have these fields. The embedding of a side is the sum of its fields' embeddings, each made of unit "
        "length, times their weights; of the fields that are missing nothing is added. It is made of unit length again, and "
        "similarity is the inner product."
    )
    title = f"# {base_name(model)}, trained by generalized contrastive learning"
    table = ["| side | field | kind | weight |", "|---|---|---|---|", *rows]
    code = ["```python", imported, "", *loading, "```"]
    as_json = ["```json", json.dumps(fields_of(model), ensure_ascii=False), "```"]
    return "\n".join([*head, title, "", *code, "", words, "", *table, "", *as_json, ""])
