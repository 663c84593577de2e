"""What the values of options may be, and how one that cannot be used is refused."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from gcl_kernels.training.errors import InputError


class OptionError(InputError):
    """An option that cannot be used. `str` names options as Python does, `as_flags` as the command line does.

    In `text` an option's name stands between two `MARK`.
    """

    MARK = "\0"

    def __init__(self, text: str) -> None:
        super().__init__(text.replace(self.MARK, ""))
        self.as_flags = re.sub(f"{self.MARK}(.*?){self.MARK}", lambda match: flag_of(match[1]), text)


def flag_of(name: str) -> str:
    """How the command line writes an option: `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def named(name: str) -> str:
    return f"{OptionError.MARK}{name}{OptionError.MARK}"


# Checks of a value: None, or what was expected.


def positive(value: Any) -> str | None:
    return None if math.isfinite(value) and value > 0 else "a number > 0"


def whole(value: Any) -> str | None:
    return None if value >= 0 else "a whole number >= 0"


def finite(value: Any) -> str | None:
    return None if math.isfinite(value) else "a finite number"


def column_names(value: Sequence[Any]) -> str | None:
    good = value and len(set(map(str, value))) == len(value) and all(isinstance(key, str) for key in value)
    return None if good else "different column names"


def field_weights(value: Sequence[Any]) -> str | None:
    good = all(_is(float, weight) and math.isfinite(weight) and weight >= 0 for weight in value) and sum(value) > 0
    return None if good else "numbers >= 0, not all 0"


def kinds(value: Sequence[Any]) -> str | None:
    good = len(value) == 2 and all(isinstance(side, (list, tuple)) and set(side) <= {"txt", "img"} for side in value)
    return None if good else "two lists of 'txt' and 'img'"


def false_negatives(value: str) -> str | None:
    name, colon, number = value.partition(":")
    if value in ("mask", "avoid", "keep"):
        return None
    if name not in ("margin", "ratio") or not colon:
        return "mask, avoid, keep, margin:NUMBER or ratio:NUMBER"
    try:
        return None if 0 <= float(number) < math.inf else f"a number >= 0 after {name}:"
    except ValueError:
        return f"a number >= 0 after {name}:"


def not_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = (part for part in get_args(hint) if part is not type(None))
    return kind


def _is(kind: type, value: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def plain(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """A value as a checkpoint can hold it.

    Raises:
        OptionError: it is of another type, or not what the option's check allows.
    """
    refuse = lambda expected: OptionError(f"{named(field.name)}: expected {expected}, got {value}")  # noqa: E731
    if value is None:
        if field.default is not None:
            raise refuse(_WORDS.get(kind, "a value"))
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if get_origin(kind) is list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise refuse("a list")
        value = [_in_lists(item) for item in value]
    elif get_origin(kind) is Literal:
        value = "linear" if field.name == "score_scaling" and value == "minmax" else value
        if value not in get_args(kind):
            raise refuse(f"one of {', '.join(get_args(kind))}")
    elif not _is(kind, value):
        raise refuse(_WORDS[kind])
    else:
        value = kind(value)
    if (choices := field.metadata.get("choices")) and value not in choices:
        raise refuse(f"one of {', '.join(choices)}")
    left_out = value == [] and field.default_factory is list
    if (check := field.metadata.get("check")) and not left_out and (expected := check(value)):
        raise refuse(expected)
    return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _in_lists(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_in_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
