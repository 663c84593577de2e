"""What the kernels' tests share: small configurations that cover every constexpr branch."""

import dataclasses
import itertools

import torch
from hypothesis import strategies as st

from gcl_kernels import backends, pairwise_logsumexp, testing
from gcl_kernels.backends.triton.config import Config, Strips, TileShape

from .conftest import DEVICE, INTERPRETED

# (forward, backward). Sides, steps of D, bands and halves differ; every D of `testing.EDGE_DIMS` leaves a tail somewhere.
TILES = (
    (TileShape(32, 64, 32, 4, 2, group=2), TileShape(64, 32, 32, 4, 2, group=1, halves=True)),
    (TileShape(64, 32, 16, 4, 2, group=3), TileShape(32, 64, 16, 4, 2, group=2)),
    (TileShape(128, 128, 64, 8, 2), TileShape(128, 128, 64, 8, 2, halves=True)),
)

# Of the forward's tile of each, down strips in every plane however small: two programs are said to run at a time.
STRIPS = tuple(
    Strips(forward, *fold, resident=2, waves=0)
    for (forward, _), fold in zip(TILES, ((2, 8), (4, 1), (1, 1)), strict=True)
)


def configurations() -> tuple[Config, ...]:
    """Every tile, with descriptors and with pointers, with one exponential a logit and with two, the former with strips."""
    switches = itertools.product(zip(TILES, STRIPS, strict=True), (True, False), (True, False))
    return tuple(
        Config(
            *(dataclasses.replace(tile, one_exponential=one) for tile in 2 * tiles),
            descriptors=descriptors,
            strips=strips if one else None,
        )
        for (tiles, strips), descriptors, one in switches
        if INTERPRETED or not descriptors or torch.cuda.get_device_capability()[0] >= 9
    )


configs = st.sampled_from(configurations())


def sizes_around(config: Config) -> tuple[int, ...]:
    """Sizes around the edges of a configuration's tiles, and no larger: the interpreter takes its time for every tile."""
    largest = max(config.forward.sides)
    return tuple(size for size in testing.EDGE_SIZES if size <= largest + 1)


@st.composite
def cases(draw, **restrictions):
    """(configuration, problem)."""
    config = draw(configs)
    return config, draw(testing.problems(**{"sizes": sizes_around(config), **restrictions}))


def using(config: Config, budget: int | None = None):
    """Instead of the table's choice, and a workspace of so many bytes."""
    return backends.settings(config=config, workspace_mib=None if budget is None else budget / 2**20)


def build(problem: testing.Problem, dtype: torch.dtype) -> testing.Batch:
    return problem.build(dtype, DEVICE)


def triton(*args, **options):
    return pairwise_logsumexp(*args, backend="triton", **options)
