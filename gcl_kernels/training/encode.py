"""From cells to embeddings: one encoder for training and evaluation, for text and images, for queries and documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.training.data import load_image

CACHE_BYTES = 1 << 30
"""Preprocessed images kept in memory: 1 GiB is some 87,000 of 32 x 32 pixels, or 1,800 of 224 x 224."""


class FieldEncoder:
    """Encode the fields of one side with an open_clip model.

    Within a batch each distinct value is encoded once, however many rows hold it. Token ids are kept for every text seen
    and preprocessed images up to ``CACHE_BYTES``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Callable[[Any], Tensor],
        *,
        workers: int = 4,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._device = next(model.parameters()).device
        self._tokens: dict[str, Tensor] = {}
        self._images: dict[str, Tensor] = {}
        self._image_bytes = 0
        # Threads are enough: Pillow lets go of the interpreter lock while it decodes and resizes.
        self._pool = ThreadPoolExecutor(max(workers, 1))

    def __call__(
        self, fields: Mapping[str, Sequence[str]], kinds: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Encode N rows given as ``{field: N cells}`` with ``kinds`` ``{field: "txt" or "img"}``.

        Returns ``{field: (N, D)}``, not normalised, and the mask (N, F), bool, of the values that are there. A missing
        value "" has an embedding too, of no meaning: the mask must go wherever the embeddings go.
        """
        embeddings = {}
        for key, cells in fields.items():
            place = {value: number for number, value in enumerate(dict.fromkeys(cells))}
            encode = self._encode_images if kinds[key] == "img" else self._encode_texts
            rows = torch.tensor([place[cell] for cell in cells], device=self._device)
            embeddings[key] = encode(list(place))[rows]
        present = [[bool(cell) for cell in cells] for cells in fields.values()]
        return embeddings, torch.tensor(present, device=self._device).T

    def _encode_texts(self, texts: list[str]) -> Tensor:
        new = [text for text in texts if text not in self._tokens]
        if new:
            # int32 halves the table; the vocabulary is far smaller.
            self._tokens.update(zip(new, self._tokenizer(new).int(), strict=True))
        tokens = torch.stack([self._tokens[text] for text in texts])
        return self.model.encode_text(tokens.to(self._device, torch.int64))

    def _encode_images(self, paths: list[str]) -> Tensor:
        images = torch.stack(list(self._pool.map(self._load, paths)))
        return self.model.encode_image(images.to(self._device))

    def _load(self, path: str) -> Tensor:
        image = self._images.get(path)
        if image is None:
            image = self._preprocess(load_image(path)) if path else self._blank()
            if self._image_bytes + image.nbytes <= CACHE_BYTES:
                self._images[path] = image
                self._image_bytes += image.nbytes
        return image

    def _blank(self) -> Tensor:
        size = self.model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(3, height, width)
