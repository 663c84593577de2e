"""A trained model with what a search needs to know of its training: the fields of both sides, their kinds and weights."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor

import gcl_kernels
from gcl_kernels.training.data import ImageError, load_image
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.ranking import Side
from gcl_kernels.training.trained import fill_in, longest, training_of

GENERIC = {"text": "txt", "image": "img"}
"""Fields that every query may have, whatever the model was trained with."""


@dataclass
class SearchModel:
    """An open_clip model that embeds queries and documents, one thread at a time.

    `left` and `right` are the (kinds, weights) of the query's and of the document's fields; `notes` says in lines what
    the checkpoint has decided and where the caller differs from it; `step` is that of training, None where it is not known.
    `tokenizer` and `preprocess` are open_clip's.
    """

    name: str
    pretrained: str | None
    encoder: FieldEncoder
    tokenizer: object
    preprocess: object
    left: Side
    right: Side
    document_id_key: str | None = None
    context_length: int | None = None
    step: int | None = None
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def load(
        cls,
        pretrained: str | None,
        *,
        model: str | None = None,
        left_keys: Sequence[str] | None = None,
        right_keys: Sequence[str] | None = None,
        left_weights: Sequence[float] | None = None,
        right_weights: Sequence[float] | None = None,
        img_or_txt: Sequence[Sequence[str]] | None = None,
        context_length: int | None = None,
        workers: int = 4,
    ) -> SearchModel:
        """Load a checkpoint file or one of open_clip's tags; what is not given is as the checkpoint was trained.

        Raises:
            InputError: as `create_model`; keys, weights and kinds of unequal number.
        """
        training = training_of(pretrained)
        args = argparse.Namespace(
            pretrained=pretrained, model_name=model, left_keys=left_keys, right_keys=right_keys, left_weights=left_weights,
            right_weights=right_weights, img_or_txt=img_or_txt, context_length=context_length and [context_length],
            weight_key=None, doc_id_key=None, query_id_key=None, score_scaling=None,
        )  # fmt: skip
        notes = fill_in(args, training.get("options", {}))
        sides: list[Side] = []
        for side, kinds in zip(("left", "right"), args.img_or_txt, strict=True):
            keys, weights = getattr(args, f"{side}_keys"), getattr(args, f"{side}_weights")
            if not len(set(keys)) == len(keys) == len(weights) == len(kinds):
                raise InputError(f"--{side}-keys, --{side}-weights and --img-or-txt: expected different names and as many of "
                                 f"each, got {keys}, {weights} and {kinds}")  # fmt: skip
            sides.append((dict(zip(keys, kinds, strict=True)), dict(zip(keys, weights, strict=True))))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)  # random weights are at least the same ones each time
        length = longest(args.context_length)
        made, tokenizer, preprocess = create_model(
            args.model_name, pretrained=pretrained, context_length=length, device=device
        )
        made.eval()
        encoder = FieldEncoder(made, tokenizer, preprocess, workers=workers)
        trained = training.get("options", {})
        return cls(
            args.model_name, pretrained, encoder, tokenizer, preprocess, sides[0], sides[1],
            trained.get("doc_id_key"), length, training.get("step"), notes,
        )  # fmt: skip

    @property
    def query_keys(self) -> dict[str, str]:
        """The query's field that `"text"` and `"image"` mean: the model's first of that kind, where it has one."""
        kinds = self.left[0]
        return {name: next((key for key in kinds if kinds[key] == kind), name) for name, kind in GENERIC.items()}

    @torch.inference_mode()
    def embed_query(
        self, values: str | Mapping[str, str | Image], weights: Mapping[str, float] | None = None
    ) -> Tensor:
        """The embedding (D,) of one query, float32 of unit length, on the CPU.

        Args:
            values: a text; or `{field: value}`, where a field is one of the query's, or `"text"` or `"image"`. An image is a
                path, or a picture in memory. "" is a missing value.
            weights: of each field; default: as trained, and 1 for a field that was not.

        Raises:
            InputError: no value, an unknown field, weights that leave nothing, an image that cannot be read.
        """
        kinds, trained = self.left
        if isinstance(values, str):
            values = {self.query_keys["text"]: values}
        if unknown := [key for key in values if key not in kinds and key not in GENERIC]:
            raise InputError(f"query: expected fields among {[*kinds, *GENERIC]}, got {unknown}")
        given = {key: value for key, value in values.items() if not isinstance(value, str) or value.strip()}
        if not given:
            raise InputError("query: expected a text or an image, got none")
        chosen = {key: (weights or {}).get(key, trained.get(key, 1.0)) for key in given}
        if not all(0 <= weight < torch.inf for weight in chosen.values()) or not any(chosen.values()):
            raise InputError(f"query: expected weights >= 0, not all 0, got {chosen}")
        encoded = {}
        with self.lock:  # tokenizers and the encoder's memory are not made for several threads
            for key, value in given.items():
                if isinstance(value, str) and (kinds.get(key) or GENERIC[key]) == "img":
                    try:
                        value = load_image(value)
                    except ImageError as error:
                        raise InputError(f"query: expected a readable image, got {error}") from None
                if isinstance(value, str):
                    encoded |= self.encoder({key: [value.strip()]}, {key: "txt"})[0]
                else:
                    encoded[key] = self.encoder.of_picture(value)
        vector = gcl_kernels.aggregate_fields(encoded, chosen)[0].float().cpu()
        if not vector.isfinite().all():
            raise InputError("query: expected a finite embedding, got NaN or infinity: training has probably diverged")
        return vector
