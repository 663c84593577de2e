"""Ids of texts and pictures from what the model gets, so that equal ones are known without their strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ranking import TextIds

MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values")  # pictures, films, sounds
OFFSETS = ("offsets", "cu_seq_lens_q")  # of texts written one after the other


def ids_of(columns: Sequence[Mapping[str, Any]]) -> TextIds:
    """Of queries and documents.

    Raises:
        ValueError: a column's features do not say which of their values belong to which row.
    """
    queries, *docs = (_ids_of_column(k, features) for k, features in enumerate(columns))
    return TextIds(queries, docs)


def _ids_of_column(k: int, features: Mapping[str, Any]) -> Tensor:
    ids = features.get("input_ids")
    parts = []
    if isinstance(ids, Tensor):
        parts.append(_of_tokens(ids, features))
    for name in MEDIA:  # no others: a model adds its results to its features
        x = features.get(name)
        if isinstance(x, Tensor):
            if parts and len(x) != len(parts[0]):
                raise ValueError(
                    f"hide_duplicates: expected {name} of column {k} to have a row for each of {len(parts[0])} texts, "
                    f"got shape {tuple(x.shape)}"
                )
            parts.append(_of_values(x))
    if not parts:
        raise ValueError(
            f"hide_duplicates: expected input_ids or one of {', '.join(MEDIA)} in column {k}, got {sorted(features)}"
        )
    total = parts[0]
    for part in parts[1:]:
        total = _mixed(total) + part
    return _mixed(total) & (2**63 - 1)


def _of_tokens(ids: Tensor, features: Mapping[str, Any]) -> Tensor:
    """(N,), of tokens and their places in the text; padding on either side does not count."""
    for name in OFFSETS:
        starts = features.get(name)
        if isinstance(starts, Tensor):
            tokens, starts = ids.reshape(-1), starts.long()
            count = len(starts) - (name == "cu_seq_lens_q")
            places = torch.arange(len(tokens), device=ids.device)
            row = torch.searchsorted(starts[:count].contiguous(), places, right=True) - 1
            hashed = _mixed(tokens.long() + _mixed(places - starts[row] + 1))
            return torch.zeros(count, dtype=torch.long, device=ids.device).index_add_(0, row, hashed)
    mask = features.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    seen = mask.bool().long()
    return (_mixed(ids.long() + _mixed(seen.cumsum(dim=1))) * seen).sum(dim=1)


def _of_values(x: Tensor) -> Tensor:
    """(N,), of the numbers themselves."""
    x = x.detach().reshape(len(x), -1)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    places = _mixed(torch.arange(x.shape[1], device=x.device))
    return _mixed(x.contiguous().view(integers).long() + places).sum(dim=1)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the int64 (splitmix64's), whose overflow is meant."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
