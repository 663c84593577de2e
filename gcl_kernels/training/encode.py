"""From cells to embeddings: one encoder for training and evaluation, for text and images, for queries and documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from gcl_kernels.training.data import LINES_SHOWN, image_fault, load_image

CACHE_BYTES = 1 << 30
"""Preprocessed images kept in memory: 1 GiB is some 87,000 of 32 x 32 pixels, or 1,800 of 224 x 224."""

TEXTS_KEPT = 200_000
"""Texts whose token ids are kept in memory, some 100 MB."""

Inputs = dict[str, tuple[Tensor, Tensor | None]]
"""`{field: (V inputs of the encoder, the place among them of each of N rows)}`; no places: V is N, row by row."""


class TwoTower(nn.Module):
    """An open_clip model whose `forward` encodes every field of both sides, as DistributedDataParallel wants it.

    `forward(left, right, ...)` of `Inputs` returns the same mapping of `{field: (N, D)}`, not normalised, and last the
    logit scale and, if `biased`, the logit bias, both 0-d. What a field is follows from its shape: token ids are
    (V, context), images (V, 3, H, W).
    """

    def __init__(self, model: Any, *, biased: bool = False) -> None:
        super().__init__()
        self.model, self.biased = model, biased

    def forward(self, *sides: Inputs) -> tuple[Any, ...]:
        of_logits = [self.model.logit_scale.exp().reshape(())]
        if self.biased:
            of_logits.append(self.model.logit_bias.reshape(()))
        return *(self.encode(side) for side in sides), *of_logits

    def encode(self, side: Inputs) -> dict[str, Tensor]:
        """Each distinct value is encoded once, however many rows hold it."""
        embeddings = {}
        for key, (values, places) in side.items():
            encoded = self.model.encode_image(values) if values.ndim == 4 else self.model.encode_text(values)
            embeddings[key] = encoded if places is None else encoded[places]
        return embeddings


class FieldEncoder:
    """Turns cells into inputs of an open_clip model, and into embeddings.

    Token ids are kept for `TEXTS_KEPT` texts and preprocessed images up to `CACHE_BYTES`. An image that cannot be read is
    a missing value; `lost` holds the paths of those met so far, and `say` is told of the first ones.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Callable[[Any], Tensor],
        *,
        workers: int = 4,
        say: Callable[[str], None] = tqdm.write,
    ) -> None:
        self.model = model
        self.lost: dict[str, str] = {}
        self._say = say
        self._towers = TwoTower(model)
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._device = next(model.parameters()).device
        self._tokens: dict[str, bytes] = {}
        self._images: dict[str, Tensor] = {}
        self._image_bytes = 0
        # Threads are enough: Pillow lets go of the interpreter lock while it decodes and resizes.
        self._pool = ThreadPoolExecutor(max(workers, 1))

    def __call__(
        self, fields: Mapping[str, Sequence[str]], kinds: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Encode N rows given as `{field: N cells}` with `kinds` `{field: "txt" or "img"}`.

        Returns `{field: (N, D)}`, not normalised, and the mask (N, F), bool, of the values that are there. A missing
        value "" has an embedding too, of no meaning: the mask must go wherever the embeddings go.
        """
        inputs, mask = self.prepare(fields, kinds)
        return self._towers.encode(self.to_device(inputs)), mask.to(self._device)

    def of_picture(self, picture: Image) -> Tensor:
        """(1, D), not normalised, of a picture in memory, RGB."""
        return self.model.encode_image(self._preprocess(picture)[None].to(self._device))

    def prepare(
        self, fields: Mapping[str, Sequence[str]], kinds: Mapping[str, str], *, distinct: bool = True
    ) -> tuple[Inputs, Tensor]:
        """The inputs of `TwoTower` for N rows and the mask (N, F), all on the CPU.

        With `distinct` each distinct value is there once, beside its places; without, there is one for each row, so that
        the rows can be cut into micro-batches.
        """
        inputs: Inputs = {}
        present = []
        for key, cells in fields.items():
            place = {value: number for number, value in enumerate(dict.fromkeys(cells))}
            values = self._images_of(list(place)) if kinds[key] == "img" else self._tokens_of(list(place))
            places = torch.tensor([place[cell] for cell in cells])
            inputs[key] = (values, places) if distinct else (values[places], None)
            present.append([bool(cell) and not (kinds[key] == "img" and cell in self.lost) for cell in cells])
        return inputs, torch.tensor(present).T

    def to_device(self, inputs: Inputs) -> Inputs:
        device = self._device
        return {
            key: (values.to(device), None if places is None else places.to(device))
            for key, (values, places) in inputs.items()
        }

    def _tokens_of(self, texts: list[str]) -> Tensor:
        if len(self._tokens) > TEXTS_KEPT:
            self._tokens.clear()
        new = [text for text in texts if text not in self._tokens]
        if new:
            # As bytes: Python keeps small objects in blocks of their own, while small tensors that stay would lie between
            # the large ones that come and go, and hold the heap open at its largest.
            tokens = self._tokenizer(new).int().numpy()
            self._tokens.update((text, row.tobytes()) for text, row in zip(new, tokens, strict=True))
        rows = bytearray().join(self._tokens[text] for text in texts)
        return torch.frombuffer(rows, dtype=torch.int32).view(len(texts), -1).long()

    def _images_of(self, paths: list[str]) -> Tensor:
        return torch.stack(list(self._pool.map(self._load, paths)))

    def _load(self, path: str) -> Tensor:
        image = self._images.get(path)
        if image is None:
            image = self._read(path) if path else self._blank()
            if self._image_bytes + image.nbytes <= CACHE_BYTES:
                self._images[path] = image
                self._image_bytes += image.nbytes
        return image

    def _read(self, path: str) -> Tensor:
        try:
            return self._preprocess(load_image(path))
        except Exception:
            fault = image_fault(path)
            if fault is None:
                raise
            self.lost[path] = fault
            if len(self.lost) <= LINES_SHOWN:
                self._say(f"expected a readable image, got {fault}; a missing value from now on")
            return self._blank()

    def _blank(self) -> Tensor:
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(3, height, width)
