"""The modules that a callable uses, and their buffers as they were at one moment."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEEPEST = 6  # from the callable to a module
LONGEST = 256  # entries of a list or a mapping that are looked at
MOST = 10_000  # objects that are looked at in all


def modules_of(*roots: object) -> list[nn.Module]:
    """Every module among `roots` and what they refer to, once, with the modules inside it.

    Looked through are bound methods, `functools.partial`, closures, default arguments, the globals that a function names, short
    lists and mappings, and attributes of objects.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    level: list[Any] = list(roots)
    for _ in range(DEEPEST):
        following: list[Any] = []
        for x in level:
            if id(x) in seen or len(seen) > MOST:
                continue
            seen.add(id(x))
            if isinstance(x, nn.Module):
                found |= {id(module): module for module in x.modules()}
            else:
                following += _referred(x)
        level = following
    return list(found.values())


def _referred(x: Any) -> list[Any]:
    if isinstance(x, (Tensor, type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float)):
        return []
    if isinstance(x, (list, tuple, set, frozenset)):
        return list(x) if len(x) <= LONGEST else []
    if isinstance(x, Mapping):
        return list(x.values()) if len(x) <= LONGEST else []
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, types.FunctionType):
        if x.__module__ is not None and x.__module__.partition(".")[0] == "torch" and x.__closure__ is None:
            return []
        cells = [cell.cell_contents for cell in x.__closure__ or () if _filled(cell)]
        named = [x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__]
        defaults = [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        return [*cells, *defaults, *named, *vars(x).values()]
    call = [kind.__dict__["__call__"] for kind in type(x).__mro__ if "__call__" in kind.__dict__][:1]
    return [*getattr(x, "__dict__", {}).values(), *call]


def _names(code: types.CodeType) -> list[str]:
    """The names in a function's code and in the functions inside it."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return [*code.co_names, *inner]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


class Held(NamedTuple):
    """A buffer, or a number among a module's attributes."""

    holder: dict[str, Any]
    name: str
    value: Any
    copy: Any
    version: int

    def restore(self) -> None:
        self.holder[self.name] = self.value
        if isinstance(self.value, Tensor):
            # Its content returns to what it was, so graphs that have saved it are still right: no new version.
            self.value.data.copy_(self.copy)


State = dict[tuple[int, str], Held]


def state_of(modules: Iterable[nn.Module], before: State | None = None) -> State:
    """Buffers and numbers of `modules`, copied; those that have not changed since `before` share its copies."""
    state: State = {}
    for module in modules:
        for name, value in module._buffers.items():
            if value is not None and not value.is_inference():
                # F.batch_norm writes running statistics without counting a version
                uncounted = module.training and value.ndim == 1 and value.is_floating_point()
                old = None if before is None else before.get((id(module._buffers), name))
                if old is None or uncounted or old.value is not value or old.version != value._version:
                    old = Held(module._buffers, name, value, value.detach().clone(), value._version)
                state[id(module._buffers), name] = old
        if type(module).__module__.partition(".")[0] != "torch":
            attributes = vars(module)
            for name, value in attributes.items():
                if isinstance(value, (int, float)) and name != "training":
                    old = None if before is None else before.get((id(attributes), name))
                    if old is None or old.value is not value:
                        old = Held(attributes, name, value, None, 0)
                    state[id(attributes), name] = old
    return state


def changed(before: State, after: State) -> set[tuple[int, str]]:
    return {key for key, held in after.items() if before.get(key) is not held}


def restore(state: Mapping[tuple[int, str], Held]) -> None:
    with torch.no_grad():
        for held in state.values():
            held.restore()
