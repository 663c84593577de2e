"""The forward against one reference: its cut into strips, when it is taken, and what runs where it is not exact."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_kernels import backends, testing
from gcl_kernels.backends import Lines, Want
from gcl_kernels.backends.triton import config, operands, run, strips
from gcl_kernels.pairs import Pairs
from tests.oracle import assert_accurate
from tests.oracle import run as value_and_gradients

from .common import STRIPS, configurations, triton, using
from .conftest import DEVICE, INTERPRETED

# what a sum that is too small becomes is made again
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WITH_STRIPS = [c for c in configurations() if c.strips is not None]
BOTH = Want(True, True)


def unit_rows(n, m, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=1) for k in (n, m)]


def opposed(n, m, d, side):
    """All cosines of line 5 of a side are near -1, all others of the other side near 1."""
    x, y = (0.05 * v + torch.eye(d)[0] for v in unit_rows(n, m, d))
    (x if side == "lhs" else y)[5] *= -1
    return [torch.nn.functional.normalize(v, dim=1) for v in (x, y)]


def forward(x, y, scale, given, budget=None):
    """(lines, kernels and whether they were skipped)."""
    launched, original = [], run._runner

    def note(kernel, programs, **arguments):
        skip = arguments.get("p_skip")
        launched.append((kernel, None if skip is None else int(skip)))
        original(kernel, programs, **arguments)

    pairs = Pairs.of(x.to(DEVICE), y.to(DEVICE), scale)
    with using(given, budget), run.replaced_by(note):
        return backends.load("triton").forward(pairs, BOTH), launched


def exact(x, y, scale) -> Lines:
    s = scale * (x.double() @ y.double().t())
    return Lines(s.logsumexp(1), s.logsumexp(0), s.diagonal()[:, None])


def assert_close(lines, x, y, scale):
    for actual, expected in zip(lines, exact(x, y, scale), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=6e-7, atol=1e-6 + 3e-7 * abs(scale))


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, -20.0])
@pytest.mark.parametrize(("n", "m"), [(150, 201), (192, 256), (20, 300), (70, 80), (1, 65), (257, 257)])
@pytest.mark.parametrize("given", WITH_STRIPS[:4:3], ids=["descriptors", "pointers"])
def test_every_tile_is_counted_once(given, n, m, scale):
    """Ragged on either side, whole tiles alone, less than a tile of either, a short last chunk."""
    x, y = unit_rows(n, m, 24)
    lines, launched = forward(x, y, scale, given)
    assert ("forward_strips", None) in launched
    if n > 1:
        assert launched[-2:] == [("forward_tile", 1), ("finish_lines", 1)]
    assert_close(lines, x, y, scale)


@pytest.mark.parametrize("scale", [14.3, 150.0])
@pytest.mark.parametrize("given", WITH_STRIPS[:4:3], ids=["descriptors", "pointers"])
def test_chunks_of_rows(given, scale):
    """Each has its own place on the diagonal; column sums of all are added up."""
    x, y = unit_rows(300, 310, 24)
    lines, launched = forward(x, y, scale, given, budget=2**10)
    assert launched.count(("forward_strips", None)) > 1
    assert_close(lines, x, y, scale)


@pytest.mark.parametrize("budget", [None, 2**10])
@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_line_far_below_the_bound_is_made_again(dtype, side, budget):
    """As if there were no strips, to the bit; at a lower scale, whose exponentials float32 holds, it is not."""
    x, y = (v.to(dtype) for v in opposed(150, 201, 24, side))
    given = WITH_STRIPS[0]
    lines, launched = forward(x, y, 100.0, given, budget)
    assert ("forward_tile", 0) in launched
    assert ("forward_tile", 1) not in launched
    without, _ = forward(x, y, 100.0, dataclasses.replace(given, strips=None), budget)
    assert all(map(torch.equal, lines, without))
    assert_close(lines, x, y, 100.0)

    for scale in (55.0, 61.5):  # on either side of the bound from which on the reference is not 0
        lines, launched = forward(x, y, scale, given, budget)
        assert ("forward_tile", 0) not in launched
        assert_close(lines, x, y, scale)


@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0, 200.0])
def test_gradients_follow(scale):
    x, y = (v.to(DEVICE).bfloat16().requires_grad_() for v in unit_rows(100, 140, 24))
    batch = testing.Batch(x, y, torch.tensor(scale, device=DEVICE).requires_grad_(), {})
    with using(WITH_STRIPS[0]):
        assert_accurate(value_and_gradients(triton, batch), batch)


@pytest.mark.skipif(not INTERPRETED, reason="compares results of one reference with those of another")
@given(headroom=st.floats(20, 120))
@settings(max_examples=5)
def test_the_reference_does_not_show(headroom):
    """`HEADROOM` is a matter of range: the sums relative to another reference say the same."""
    x, y = unit_rows(70, 90, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "UNSHIFTED", 0.0)
        patch.setattr(strips, "HEADROOM", headroom)
        lines, launched = forward(x, y, 30.0, WITH_STRIPS[0])
    assert launched[-1] == ("finish_lines", 1)
    assert_close(lines, x, y, 30.0)


@given(
    n=st.integers(1, 3000),
    m=st.integers(1, 3000),
    given=st.sampled_from(STRIPS),
    resident=st.sampled_from((1, 7, 132)),
)
def test_a_cut_covers_the_plane(n, m, given, resident):
    given = dataclasses.replace(given, resident=resident)
    cut = strips.Cut.of(n, m, given)
    row_tiles, whole_strips = n // given.tile.rows, m // given.tile.cols
    assert (cut.segments - 1) * cut.segment < row_tiles or cut.segments == row_tiles == 0
    assert cut.segments * cut.segment >= row_tiles
    assert cut.segment <= strips.LONGEST
    # segments, the diagonal, the ragged row tile; and as many for the ragged strip
    assert cut.slots == cut.segments + 1 + (n % given.tile.rows > 0)
    assert cut.programs == cut.slots * (whole_strips + (m % given.tile.cols > 0))


def test_a_large_cut_leaves_few_programs_without_work():
    """Of the time of all programs that a Hopper has room for, at N = 8,192 and 65,536."""
    given = config.WIDE_STRIPS_90
    for n in (8192, 65_536):
        cut = strips.Cut.of(n, n, given)
        waves = -(-(n // given.tile.cols) * cut.segments // given.resident)
        assert n * n / (given.tile.rows * given.tile.cols) > 0.95 * waves * cut.segment * given.resident


@pytest.mark.parametrize(
    ("n", "options", "want", "expected"),
    [
        (8192, {}, BOTH, True),
        (4096, {}, BOTH, False),  # launches matter more there
        (8192, {"labels": torch.zeros(8192, dtype=torch.int64)}, BOTH, False),
        (8192, {"lhs_ids": torch.arange(8192), "rhs_ids": torch.arange(8192)}, BOTH, False),
        (8192, {"rhs_bias": torch.zeros(8192)}, BOTH, False),
        (8192, {"lhs_limit": torch.zeros(8192)}, BOTH, False),
        (8192, {}, Want(True, False), False),
    ],
)
def test_what_strips_are_for(n, options, want, expected):
    x = torch.zeros(n, 512, dtype=torch.bfloat16)
    with using(config.FAMILIES["sm_90"].config(torch.bfloat16, 512, "ieee")), run.replaced_by(lambda *_, **__: None):
        assert strips.pay(operands.Operands.of(Pairs.of(x, x, torch.tensor(1.0), **options)), want) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_made_again(bad):
    x, y = unit_rows(70, 90, 24)
    x[40, 3] = bad
    _, launched = forward(x, y, 10.0, WITH_STRIPS[0])
    assert launched[-1] == ("finish_lines", 0)
