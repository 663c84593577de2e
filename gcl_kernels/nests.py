"""Nested arguments and results of an encoder: what a container holds, and the same container with other contents."""

from __future__ import annotations

import copy
import dataclasses
import enum
import numbers
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), str, bytes, numbers.Number, enum.Enum, type, torch.Size, torch.dtype, torch.device)
KNOWN = "tensors, numpy arrays, plain values, tuples, lists, mappings, dataclasses, attrs objects and SimpleNamespace"


def is_array(x: object) -> bool:
    numpy = sys.modules.get("numpy")  # imported by whoever has made an array
    return numpy is not None and isinstance(x, numpy.ndarray)


def is_plain(x: object) -> bool:
    """Whether x is one value, without parts that a gradient could need."""
    numpy = sys.modules.get("numpy")
    return isinstance(x, PLAIN) or (numpy is not None and isinstance(x, numpy.generic))


def has_rows(x: object) -> bool:
    """Whether x has a first dimension that can be the batch's: a tensor or an array that is not 0-d."""
    return (isinstance(x, Tensor) or is_array(x)) and x.ndim > 0  # pyright: ignore[reportAttributeAccessIssue]


def children(x: object) -> list[tuple[str, Any]] | None:
    """(how it is written after x, value) of everything that x holds, in order; None where x is no container that is known."""
    if isinstance(x, (Tensor, torch.nn.Module, *PLAIN)):
        return None
    if isinstance(x, Mapping):
        items = [(f"[{key!r}]", value) for key, value in x.items()]
    elif isinstance(x, (list, tuple)):
        names = getattr(x, "_fields", None) if isinstance(x, tuple) else None
        items = [(f"[{k}]" if names is None else f".{names[k]}", value) for k, value in enumerate(x)]
    elif _is_record(x):
        items = []
    else:
        return None
    return items + [(f".{name}", value) for name, value in _attributes(x, [value for _, value in items])]


def rebuilt(x: Any, values: list[Any]) -> Any:
    """A container like x that holds `values` instead of `children(x)`; a mapping that cannot be changed becomes a dict."""
    count = 0 if _is_record(x) and not isinstance(x, (Mapping, tuple, list)) else len(x)
    held = list(x.values()) if isinstance(x, Mapping) else list(x) if count else []
    items, others = values[:count], values[count:]
    if isinstance(x, Mapping):
        new = copy.copy(x) if isinstance(x, MutableMapping) else {}
        for key, value in zip(x, items, strict=True):  # an update() of its own may add or refuse
            new[key] = value
    elif isinstance(x, tuple):
        new = type(x)(items) if hasattr(x, "n_sequence_fields") else tuple.__new__(type(x), items)
    else:
        new = copy.copy(x)
        if isinstance(x, list):
            new[:] = items
    if isinstance(x, Mapping) and not isinstance(x, MutableMapping):
        return new
    replaced = dict(zip((name for name, _ in _attributes(x, held)), others, strict=True))
    for name, value in vars(x).items() if hasattr(x, "__dict__") else ():
        # An attribute that is one of the items (ModelOutput, a dict that is its own __dict__) stays so.
        place = next((k for k, item in enumerate(held) if item is value), None)
        if place is not None and not isinstance(x, UserDict):
            replaced[name] = items[place]
    for name, value in replaced.items():
        object.__setattr__(new, name, value)  # of a frozen dataclass, too
    return new


def leaves(x: object, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in x that is no known container, in order."""
    inside = children(x)
    if inside is None:
        yield path, x
    else:
        for suffix, value in inside:
            yield from leaves(value, path + suffix)


def tensors(x: object, path: str) -> Iterator[tuple[str, Tensor]]:
    return ((where, value) for where, value in leaves(x, path) if isinstance(value, Tensor))


def with_tensors(x: Any, replacements: Iterator[Tensor]) -> Any:
    """x with the next of `replacements` for each of its tensors, in the order of `tensors`."""
    if isinstance(x, Tensor):
        return next(replacements)
    if not any(True for _ in tensors(x, "")):
        return x
    return rebuilt(x, [with_tensors(value, replacements) for _, value in children(x) or ()])


def _is_record(x: object) -> bool:
    return (
        isinstance(x, SimpleNamespace)
        or (dataclasses.is_dataclass(x) and not isinstance(x, type))
        or hasattr(type(x), "__attrs_attrs__")
    )


def _attributes(x: object, items: list[Any]) -> list[tuple[str, Any]]:
    """(name, value) of what x holds beside its items."""
    names = dict.fromkeys(vars(x)) if hasattr(x, "__dict__") else {}
    if dataclasses.is_dataclass(x):
        names |= dict.fromkeys(field.name for field in dataclasses.fields(x))
    names |= dict.fromkeys(field.name for field in getattr(type(x), "__attrs_attrs__", ()))
    found = [(name, getattr(x, name)) for name in names if isinstance(name, str) and hasattr(x, name)]
    if isinstance(x, UserDict):
        found = [(name, value) for name, value in found if name != "data"]
    return [(name, value) for name, value in found if not any(value is item for item in items)]
