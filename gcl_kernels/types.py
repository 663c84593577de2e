"""The options that are names, as types; what is checked at run time is read from the same list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

Directions = Literal["both", "lhs_to_rhs", "rhs_to_lhs"]
Reduction = Literal["mean", "weighted_mean", "sum", "none"]
FieldMode = Literal["aggregate", "pairwise"]
Positives = Literal["joined", "apart"]
Transport = Literal["all_gather", "ring"]
Backend = Literal["torch", "triton"]
ScoreToWeightName = Literal["constant", "linear", "inverse", "inverse_sqrt", "log", "piecewise"]
WeightNormalization = Literal["mean"]

DIRECTIONS: tuple[Directions, ...] = get_args(Directions)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
FIELD_MODES: tuple[FieldMode, ...] = get_args(FieldMode)
POSITIVES: tuple[Positives, ...] = get_args(Positives)
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
BACKEND_NAMES: tuple[Backend, ...] = get_args(Backend)
SCORE_TO_WEIGHT_NAMES: tuple[ScoreToWeightName, ...] = get_args(ScoreToWeightName)

Function = TypeVar("Function", bound=Callable[..., Any])


def signature_of(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator: to a type checker what it decorates has the signature of `function`."""
    return lambda _: function
