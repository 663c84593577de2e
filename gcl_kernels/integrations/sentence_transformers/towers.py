"""Models of open_clip in sentence-transformers: the towers of any of them, and text towers of transformers as its own modules."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer import modules


class OpenCLIP(InputModule):
    """Both towers of an open_clip model, from a folder that open_clip loads as `local-dir:FOLDER`.

    Inputs are texts or pictures (PIL). `SentenceTransformer(PATH, trust_remote_code=True)` loads a
    model with it: sentence-transformers asks for that wherever a module is not one of its own.
    """

    FOLDER = "open_clip"

    def __init__(self, folder: str) -> None:
        super().__init__()
        from gcl_kernels.integrations import importing

        open_clip = importing.import_open_clip()
        self.folder = folder
        self.model, self.preprocess_image = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **options: Any) -> dict[str, Any]:
        # A batch holds one kind alone: sentence-transformers refuses mixed ones.
        if inputs and isinstance(inputs[0], Image.Image):
            return {"pixel_values": torch.stack([self.preprocess_image(each.convert("RGB")) for each in inputs])}
        return {"input_ids": self.tokenizer([(prompt or "") + text for text in inputs])}

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        if "pixel_values" in features:
            return features | {"sentence_embedding": self.model.encode_image(features["pixel_values"])}
        return features | {"sentence_embedding": self.model.encode_text(features["input_ids"])}

    def get_embedding_dimension(self) -> int:
        return int(self.model.visual.output_dim)

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        target = Path(output_path, self.FOLDER)
        if target.resolve() != Path(self.folder).resolve():
            shutil.copytree(self.folder, target, dirs_exist_ok=True)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> OpenCLIP:
        where = {key: options.get(key) for key in ("token", "cache_folder", "revision")}
        local = bool(options.get("local_files_only", False))
        folder = cls.load_dir_path(
            model_name_or_path, str(Path(subfolder, cls.FOLDER)), local_files_only=local, **where
        )
        if folder is None:
            raise ValueError(f"{model_name_or_path}: expected a folder '{cls.FOLDER}', got none")
        return cls(str(folder))


def of_text_tower(tower: Any, tokenizer: Any) -> SentenceTransformer:
    """open_clip's `HFTextEncoder` and `HFTokenizer` as sentence-transformers' own modules: Transformer, Pooling, Dense.

    Raises:
        ValueError: a pooling or a projection that these modules do not have.
    """
    pooling: Any = {"MeanPooler": "mean", "MaxPooler": "max", "ClsLastHiddenStatePooler": "cls"}.get(
        type(tower.pooler).__name__
    )
    if pooling is None:
        raise ValueError(f"expected a mean, max or cls_last_hidden_state pooler, got {type(tower.pooler).__name__}")
    with tempfile.TemporaryDirectory() as folder:
        tower.transformer.save_pretrained(folder)
        tokenizer.tokenizer.save_pretrained(folder)
        transformer = modules.Transformer(folder, max_seq_length=tokenizer.context_length)
    parts: list[torch.nn.Module] = [transformer, modules.Pooling(tower.config.hidden_size, pooling_mode=pooling)]
    for layer in [tower.proj] if isinstance(tower.proj, torch.nn.Linear) else tower.proj.children():
        if isinstance(layer, torch.nn.Linear):
            dense = modules.Dense(
                layer.in_features, layer.out_features, bias=False, activation_function=torch.nn.Identity()
            )
            dense.linear.load_state_dict(layer.state_dict())
            parts.append(dense)
        elif isinstance(layer, torch.nn.GELU):
            parts[-1].activation_function = torch.nn.GELU()
        else:
            raise ValueError(f"expected a projection of linear layers, got {type(layer).__name__}")
    return SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu")
