"""A backend's passes called alone, without a loss around them: the one file of the benchmarks that knows how that is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gcl_kernels import backends
from gcl_kernels.backends import Gradients, Lines, Need, Want, choice
from gcl_kernels.backends.pointwise import PointwiseNeed, PointwiseUpstream
from gcl_kernels.pairs import Pairs

Inputs = tuple[Tensor, Tensor, Tensor]
"""lhs, rhs, logit_scale, without gradients."""


def forward(backend: str, inputs: Inputs) -> Lines:
    """Both directions on default labels. `backends.settings(tile=..., config=...)` says with which tiles."""
    return backends.load(backend).forward(Pairs.of(*inputs), Want(True, True))


def backward(backend: str, inputs: Inputs, statistics: Lines) -> Gradients:
    """All three gradients of the mean loss."""
    return gradients(backend, inputs, statistics, Need(True, True, True))


def backward_tiles(backend: str, inputs: Inputs, statistics: Lines) -> Gradients:
    """The backward's tiles without its products: no gradient is asked for but G is made."""
    return gradients(backend, inputs, statistics, Need(False, False, False))


def sigmoid_tiles(inputs: Inputs) -> None:
    """Triton's one pass of a sigmoid loss without its products: the sigmoids are stored and nothing reads them."""
    lhs, rhs, scale = inputs
    pairs, one = Pairs.of(lhs, rhs, scale), lhs.new_full((len(lhs),), 1 / len(lhs), dtype=torch.float64)
    upstream = PointwiseUpstream(one, one[:, None])
    unread = mock.Mock(lift=None, finish=lambda *_: (None, None, None))
    with mock.patch("gcl_kernels.backends.triton.pointwise.Products", return_value=unread):
        backends.load("triton").softplus(
            pairs, scale.new_full((), -10.0), upstream, PointwiseNeed(True, True, True, True)
        )


def gradients(backend: str, inputs: Inputs, statistics: Lines, need: Need) -> Gradients:
    assert statistics.row is not None
    g = torch.full_like(statistics.row, 1 / len(statistics.row))
    return backends.load(backend).backward(Pairs.of(*inputs), statistics, Lines(g, g, -2 * g[:, None]), need)


@contextlib.contextmanager
def triton_configured(config: Any) -> Iterator[None]:
    """Every loss in this block runs on Triton with one configuration, whatever its device and dtype."""
    with mock.patch.object(choice, "choose_with_reason", return_value=("triton", "")), backends.settings(config=config):
        yield
