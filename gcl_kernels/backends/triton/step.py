"""The loss that `linear` describes, whole: its forward and its backward, each of them taped (`tape`).

A backend may offer two functions beside its contract, of `Pairs` with at most one label a row:

    loss_of_pairs(pairs, weights, want, mean) -> (loss, Lines, plan)
    loss_of_pairs_backward(g, pairs, weights, lines, need, mean, plan) -> Gradients

`want` says which directions, `lines` and `plan` are what the forward returned, and `g` is 0-d, the gradient of the loss.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...pairs import Pairs
from ..contract import Gradients, Lines, Need, Want
from ..settings import WORKSPACE_VARIABLE, current
from . import launch, lines
from .tape import Outputs, Plan, layout, plan_of

LARGEST = 2**26  # logits that are taped: beyond them the host has time

Known = tuple[Plan, tuple]  # and the layout that it is for


def loss_of_pairs(pairs: Pairs, weights: Tensor | None, want: Want, mean: bool) -> tuple[Tensor, Lines, Known | None]:
    def function(weights: Tensor | None, *fields) -> Outputs:
        pairs = Pairs(*fields)
        made = launch.forward(pairs, want)
        return lines.sum_losses(made, weights, mean, torch.float32, pairs.labels), *made

    tensors = (weights, *pairs.fields())
    if len(pairs.lhs) * len(pairs.rhs) > LARGEST:
        (loss, *made), known = function(*tensors), None
    else:
        known = _plan((want, mean), tensors, pairs.lhs.device)
        loss, *made = known[0].run("forward", function, tensors)
    assert loss is not None
    return loss, Lines(*made), known


def loss_of_pairs_backward(
    g: Tensor,
    pairs: Pairs,
    weights: Tensor | None,
    statistics: Lines,
    need: Need,
    mean: bool,
    known: Known | None,
) -> Gradients:
    def function(g: Tensor, row, col, positive, weights: Tensor | None, *fields) -> Outputs:
        pairs = Pairs(*fields)
        want = Want(row is not None, col is not None)
        upstream = lines.spread_gradient(g, weights, pairs.n, pairs.m, mean, want, pairs.labels)
        return launch.backward(pairs, Lines(row, col, positive), upstream, need)

    given = (weights, *pairs.fields())
    # what a hook gives back for a saved tensor may lie otherwise in memory
    if known is None or layout(given) != known[1]:
        return Gradients(*function(g, *statistics, *given))
    name = need, g.dtype, g.data_ptr() & 15, torch.get_float32_matmul_precision()
    return Gradients(*known[0].run(name, function, (g, *statistics, *given)))


def _plan(options: tuple, tensors: tuple[Tensor | None, ...], device: torch.device) -> Known:
    """Settings are compared by identity, which is quicker than by value."""
    laid = layout(tensors)
    precision, workspace = torch.get_float32_matmul_precision(), os.environ.get(WORKSPACE_VARIABLE)
    return plan_of((options, device, laid, _Same(current()), precision, workspace)), laid


class _Same:
    """Equal to what holds the same object, which it keeps alive."""

    __slots__ = ("x",)

    def __init__(self, x: object):
        self.x = x

    def __hash__(self) -> int:
        return id(self.x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x
