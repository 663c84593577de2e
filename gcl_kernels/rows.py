"""Arguments of an encoder cut into micro-batches, and its results for them joined. What cannot be is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from .nests import KNOWN, children, has_rows, is_array, is_plain, leaves, rebuilt


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """N of the arguments, once each of them is known to be one that is cut, or rightly goes whole to every micro-batch."""
    named = [(f"args[{k}]", x) for k, x in enumerate(args)] + [(f"kwargs[{name!r}]", x) for name, x in kwargs.items()]
    sizes = {}
    for path, x in (leaf for name, value in named for leaf in leaves(value, name)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{path}: expected a tensor without gradient, got one that requires it")
        if isinstance(x, Tensor) and x.layout != torch.strided:
            raise TypeError(f"{path}: expected a dense tensor, got one of layout {x.layout}")
        if has_rows(x):
            sizes[path] = len(x)
    if not sizes or 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise ValueError(f"encoder: expected arguments with tensors of one batch size >= 1, got {sizes}")
    n = next(iter(sizes.values()))
    for path, x in named:
        _check_argument(path, x, n)
    return n


def _check_argument(path: str, x: Any, n: int) -> None:
    if _of_rows(x, n):
        if all(isinstance(value, Number) for value in x):
            raise ValueError(
                f"{path}: expected a tensor where numbers belong to the {n} rows, or an option bound to encoder by "
                f"functools.partial, got a {type(x).__name__} of {n} numbers, which could be either"
            )
        return
    inside = children(x)
    if inside is None:
        _refuse_uncut(path, x, n)
    for suffix, value in inside or ():
        _check_argument(path + suffix, value, n)


def _refuse_uncut(path: str, x: Any, n: int) -> None:
    """Raises for an argument that would go whole to every micro-batch and holds rows, or can be read once only."""
    if isinstance(x, (Tensor, nn.Module)) or is_array(x) or is_plain(x) or inspect.isroutine(x):
        return
    if isinstance(x, Iterator):
        raise TypeError(f"{path}: expected an argument that can be read twice, got the iterator {type(x).__name__}")
    slots = [getattr(kind, "__slots__", ()) for kind in type(x).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    inside = [*getattr(x, "__dict__", {}).values(), *(getattr(x, name) for name in names if hasattr(x, name))]
    inside += x if isinstance(x, (set, frozenset)) else ()
    if _length(x) == n or any(has_rows(v) and len(v) == n for value in inside for _, v in leaves(value, "")):
        raise TypeError(f"{path}: expected rows in {KNOWN}, got {type(x).__name__} with {n} rows, which cannot be cut")


def _length(x: Any) -> int | None:
    try:
        return None if isinstance(x, (set, frozenset)) else len(x)
    except Exception:  # somebody else's object
        return None


def _of_rows(x: Any, n: int) -> bool:
    """Whether x is a list with an entry for each of n rows, and no nest of tensors, which are cut themselves."""
    return type(x) in (list, tuple) and len(x) == n and not any(has_rows(value) for _, value in leaves(x, ""))


def cut(x: Any, rows: slice, n: int) -> Any:
    """`rows` of an argument that `batch_size` has passed."""
    if has_rows(x) or _of_rows(x, n):
        return x[rows]
    inside = children(x)
    if not inside:
        return x
    values = [cut(value, rows, n) for _, value in inside]
    same = all(new is value for new, (_, value) in zip(values, inside, strict=True))
    return x if same else rebuilt(x, values)


def join(parts: list[Any], counts: list[int], path: str, whole: list[Tensor]) -> Any:
    """One result of those for micro-batches of `counts` rows; its tensors go to `whole`, too, in order."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        names = ", ".join(dict.fromkeys(type(part).__name__ for part in parts))
        raise TypeError(f"{path}: expected one type from encoder for every micro-batch, got {names}")
    if isinstance(first, Tensor) or is_array(first):
        x = _join_rows(parts, counts, path)
        if isinstance(x, Tensor):
            whole.append(x)
        return x
    if is_plain(first):
        return _same(parts, path)
    inside = [children(part) for part in parts]
    if isinstance(first, (set, frozenset)) and all(is_plain(v) for part in parts for v in part):
        return _same(parts, path)
    if inside[0] is None:
        raise TypeError(
            f"{path}: expected {KNOWN} from encoder, got {type(first).__name__}; return what the loss needs alone"
        )
    if type(first) in (list, tuple) and all(is_plain(v) for part in parts for _, v in leaves(part, "")):
        if [len(part) for part in parts] == counts:
            return type(first)(value for part in parts for value in part)
        return _same(parts, path)
    if any([suffix for suffix, _ in held or ()] != [suffix for suffix, _ in inside[0]] for held in inside):
        raise ValueError(f"{path}: expected the same entries from encoder for every micro-batch, got others")
    values = [
        join([held[k][1] for held in inside if held is not None], counts, path + suffix, whole)
        for k, (suffix, _) in enumerate(inside[0])
    ]
    return rebuilt(first, values)


def _join_rows(parts: list[Any], counts: list[int], path: str) -> Any:
    """Tensors, or numpy arrays, one after the other."""
    for x, count in zip(parts, counts, strict=True):
        if x.ndim and len(x) != count:
            raise ValueError(
                f"{path}: expected ({count}, ...) from encoder for a micro-batch of {count}, got {tuple(x.shape)}"
            )
    if any(x.shape[1:] != parts[0].shape[1:] or x.ndim != parts[0].ndim for x in parts):
        shapes = ", ".join(dict.fromkeys(str(tuple(x.shape)) for x in parts))
        raise ValueError(f"{path}: expected rows of one shape from encoder for every micro-batch, got {shapes}")
    first = parts[0]
    if not isinstance(first, Tensor):
        if first.dtype.hasobject and not all(is_plain(value) for part in parts for value in part.flat):
            raise TypeError(f"{path}: expected an array of plain values from encoder, got other objects in it")
        import numpy

        return numpy.concatenate(parts) if first.ndim else _same(parts, path)
    if first.layout != torch.strided:
        raise TypeError(f"{path}: expected a dense tensor from encoder, got one of layout {first.layout}")
    if first.ndim:
        return torch.cat(parts)
    values = torch.stack(parts)
    alike = values == values[0]
    if first.is_floating_point():
        alike = torch.isclose(values, values[0], rtol=4 * torch.finfo(first.dtype).eps, atol=0.0, equal_nan=True)
    if not alike.all():
        raise ValueError(f"{path}: expected a 0-d tensor that is the same for every micro-batch, got {values.tolist()}")
    return first


def _same(parts: list[Any], path: str) -> Any:
    first = parts[0]
    for part in parts:
        if part is not first and part != first and not (part != part and first != first):  # NaN is like NaN
            raise ValueError(
                f"{path}: expected a tensor, a list as long as the micro-batch, or the same value from encoder for every "
                f"micro-batch, got {first!r} and {part!r}"
            )
    return first


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
