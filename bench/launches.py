"""A backend's passes called alone, without a loss around them: the one file of the benchmarks that knows how that is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gcl_kernels import backends
from gcl_kernels.backends import torch_chunked as chunked

Inputs = tuple[Tensor, Tensor, Tensor]
"""lhs, rhs, logit_scale, without gradients."""

Statistics = tuple[Tensor, Tensor, Tensor]
"""What a forward returns: row, col, positive."""


def torch_forward(inputs: Inputs, *, tile: tuple[int, int]) -> Statistics:
    """The PyTorch backend on default labels, in tiles of (rows, columns)."""
    return chunked.forward(*inputs, None, None, None, True, True, tile=tile)


def torch_backward(inputs: Inputs, statistics: Statistics, *, tile: tuple[int, int]) -> Any:
    """All three gradients of the mean loss."""
    upstream = upstream_of_mean(statistics)
    return chunked.backward(*inputs, None, None, None, *statistics, *upstream, True, True, True, tile=tile)


def triton_forward(inputs: Inputs, *, config: Any = None) -> Statistics:
    """The forward tile kernel and what merges its results; `config` replaces the table's choice."""
    from gcl_kernels.backends.triton import launch

    return launch.forward(*inputs, None, None, None, True, True, config)


def triton_backward_tiles(inputs: Inputs, statistics: Statistics, *, config: Any = None) -> Any:
    """The backward tile kernel without its products: no gradient is asked for but G is made."""
    from gcl_kernels.backends.triton import launch

    needs = False, False, False
    return launch.backward(*inputs, None, None, None, *statistics, *upstream_of_mean(statistics), *needs, config)


def upstream_of_mean(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    row, _, _ = statistics
    g = torch.full_like(row, 1 / len(row))
    return g, g, -2 * g[:, None]


@contextlib.contextmanager
def triton_configured(config: Any) -> Iterator[None]:
    """Every loss in this block runs on Triton with one configuration, whatever its device and dtype."""
    from gcl_kernels.backends.triton import launch

    choice = mock.patch.object(backends, "choose", return_value="triton")
    with choice, mock.patch.object(launch, "select", return_value=config):
        yield
