"""What the torch backend computes and holds, counted: nothing that is not asked for, never N x M."""

import contextlib
from unittest import mock

import pytest
import torch

from gcl_kernels import backends, gcl_loss, pairs, pairwise_logsumexp
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.backends import torch as backend
from gcl_kernels.backends.pointwise import PointwiseNeed, PointwiseUpstream
from gcl_kernels.backends.torch.tiles import tile_numel, tiles_to_store
from gcl_kernels.backends.triton import launch, pointwise
from gcl_kernels.backends.triton import run as launcher
from gcl_kernels.pairs import Pairs
from tests.counting import LargestTensor, Products


def pairs_of(lhs, rhs, scale=10.0, **options):
    return Pairs.of(lhs, rhs, torch.tensor(scale), **options)


ALL, BOTH = Need(True, True, True), Want(True, True)


def both_passes(pairs, need=ALL, want=BOTH):
    """The backend itself: the operators around it hide its work from PyTorch's counters."""
    with backends.settings(tile=(32, 48)):
        statistics = backend.forward(pairs, want)
        if any(need):
            upstream = Lines(*(None if v is None else torch.ones_like(v) for v in statistics))
            backend.backward(pairs, statistics, upstream, need)


def assert_rounded_last(backend, lhs, rhs):
    """The gradients asked for in float32 are the numbers that are rounded to the inputs' dtype otherwise."""
    pairs = Pairs.of(lhs, rhs, torch.tensor(3.0, device=lhs.device))
    statistics = backend.forward(pairs, Want(True, True))
    upstream = Lines(*(factor * torch.ones_like(v) for factor, v in zip((1, 1, -2), statistics, strict=True)))
    arguments = pairs, statistics, upstream, Need(True, True, True)
    rounded, wide = backend.backward(*arguments), backend.backward(*arguments, dtype=torch.float32)
    for r, w in zip(rounded[:2], wide[:2], strict=True):
        assert (r.dtype, w.dtype) == (lhs.dtype, torch.float32)
        assert torch.equal(r, w.to(lhs.dtype))
        assert not torch.equal(r.float(), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_float32_of_half_precision(dtype):
    assert_rounded_last(backend, torch.randn(40, 8).to(dtype), torch.randn(50, 8).to(dtype))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_n_by_m_tensor_is_ever_made(ids, dtype):
    n, m, d = 300, 400, 8
    options = {"lhs_ids": torch.arange(n), "rhs_ids": torch.arange(m) % 7} if ids else {}
    inputs = pairs_of(torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype), **options)
    with LargestTensor() as largest:
        both_passes(inputs)
    assert largest.numel == m * d  # an input's own size; a tile is 32 x 48


@pytest.mark.parametrize(
    ("need", "want", "units"),
    [
        ((True, True, True), (True, True), 8),
        ((True, False, False), (True, True), 6),
        ((False, True, True), (True, True), 6),
        ((False, False, True), (True, True), 6),
        ((False, False, False), (True, True), 2),
        ((True, True, True), (True, False), 8),
    ],
)
def test_nothing_is_computed_for_a_frozen_side(need, want, units):
    n, m, d = 64, 96, 32
    lhs, rhs = torch.randn(n, d), torch.randn(m, d)
    lhs, rhs = lhs / lhs.norm(dim=1, keepdim=True), rhs / rhs.norm(dim=1, keepdim=True)
    inputs = pairs_of(lhs, rhs)
    with Products() as products:
        both_passes(inputs, Need(*need), Want(*want))
    assert products.flops == units * n * m * d


@pytest.mark.parametrize(
    ("need", "products_of_g"),
    [((True, True, True), 2), ((True, False, True), 1), ((False, True, True), 1), ((False, False, True), 1)],
)
def test_triton_computes_nothing_for_a_frozen_side(need, products_of_g):
    """The library products of its backward, on tensors without memory."""
    n, m, d = 64, 96, 32
    meta = Pairs(torch.empty(n, d, device="meta"), torch.empty(m, d, device="meta"), torch.empty((), device="meta"))
    statistics = Lines(*(torch.empty(k, device="meta", dtype=torch.float64) for k in (n, m, (n, 1))))
    with launcher.replaced_by(lambda kernel, programs, **arguments: None), Products() as products:
        launch.backward(meta, statistics, Lines(*map(torch.empty_like, statistics)), Need(*need))
    assert products.flops == 2 * products_of_g * n * m * d


@pytest.mark.parametrize(("given", "units"), [(False, 2), (True, 6)])
def test_triton_s_sigmoid_loss_makes_every_logit_once(given, units, monkeypatch):
    """Operations of the tile kernel's programs and of the library products, in several chunks, on tensors without memory."""
    n, m, d = 1024, 1536, 256
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "1")
    x, y = (torch.empty(k, d, device="meta", dtype=torch.bfloat16) for k in (n, m))
    scale, bias = (torch.empty((), device="meta") for _ in range(2))
    tiles = []

    def count(kernel, programs, **arguments):
        assert kernel == "forward_tile"
        tiles.append(programs * arguments["BLOCK_ROWS"] * arguments["BLOCK_COLS"])

    upstream = PointwiseUpstream(torch.empty(n, device="meta", dtype=torch.float64), None) if given else None
    with launcher.replaced_by(count), Products() as products:
        pointwise.softplus(Pairs(x, y, scale), bias, upstream, PointwiseNeed(given, given, given, given))
    assert 2 * d * sum(tiles) + products.flops == units * n * m * d
    assert (len(tiles) > 1) == given


def test_no_gradient_work_under_no_grad(monkeypatch):
    lhs, rhs = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    for name in ("backward", "forward_with_gradient"):
        monkeypatch.setattr(backend, name, None)
    with torch.no_grad():
        result = pairwise_logsumexp(lhs, rhs, 1.0)
        gcl_loss(lhs, rhs, 1.0)
    assert not any(v.requires_grad for v in result)


@pytest.fixture
def flops(monkeypatch):
    """{"total": FLOPs of products} of whatever the backend is asked for."""
    count = {"total": 0}

    def counted(function):
        def run(*args, **kwargs):
            with Products() as products:
                result = function(*args, **kwargs)
            count["total"] += products.flops
            return result

        return run

    for name in ("forward", "backward", "forward_with_gradient"):
        monkeypatch.setattr(backend, name, counted(getattr(backend, name)))
    return count


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "rhs_to_lhs", "both"])
@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({}, 6),
        ({"label_smoothing": 0.1}, 6),
        ({"reduction": "weighted_mean"}, 6),
        ({"reduction": "none"}, 8),
        ({"z_loss": 1e-3}, 8),
    ],
)
def test_one_direction_pays_for_one(directions, options, units, flops):
    """6 N M D where the gradient is known beforehand, 8 otherwise; both directions cost 8 where no tile is stored."""
    n, m, d = 96, 160, 32
    units = 8 if directions == "both" else units
    lhs, rhs = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    with backends.settings(tile=(32, 64), workspace_mib=0):
        gcl_loss(lhs, rhs, 1.0, directions=directions, **options).sum().backward()
    assert flops["total"] == units * n * m * d


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "rhs_to_lhs", "both"])
def test_no_logit_is_made_twice_where_the_workspace_holds_them(directions, flops):
    n, m, d = 96, 160, 32
    lhs, rhs = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    with backends.settings(tile=(32, 64)):
        gcl_loss(lhs, rhs, 0.1, directions=directions).backward()
    assert flops["total"] == 6 * n * m * d


@pytest.mark.parametrize(("stored", "units"), [(1, 6 + 2 * 15 / 16), (4, 7.5), (16, 6)])
def test_a_stored_tile_is_not_made_again(stored, units, monkeypatch):
    n, d = 64, 4
    x = torch.randn(n, d)
    gradients, tile_bytes = 2 * x.nbytes, 4 * tile_numel(16, 16)
    upstream = Lines(torch.ones(n), torch.ones(n), -2 * torch.ones(n, 1))
    budget = ((stored + 2) * tile_bytes - gradients) / 2**20
    with backends.settings(tile=(16, 16), workspace_mib=budget), Products() as products:
        backend.forward_with_gradient(pairs_of(x, x.flip(0), 0.1), upstream, ALL)
    assert products.flops == units * n * n * d


def test_stored_tiles_respect_the_workspace_budget():
    tile = 4 * tile_numel(128, 128)
    with backends.settings(workspace_mib=1):
        assert tiles_to_store((128, 128), 0) == 2**20 // tile - 2  # the two in use count
        assert tiles_to_store((128, 128), 3 * tile) == 2**20 // tile + 1  # gradients are written where tiles were


def test_one_direction_never_holds_n_by_m():
    n, m, d = 300, 400, 8
    inputs = pairs_of(torch.randn(n, d), torch.randn(m, d), 1.0)
    for g_row, g_col in ((torch.ones(n), None), (None, torch.ones(m))):
        upstream = Lines(g_row, g_col, -torch.ones(n, 1))
        with LargestTensor() as largest, backends.settings(tile=(16, 16)):
            backend.forward_with_gradient(inputs, upstream, ALL)
        shape = (16, m) if g_col is None else (n, 16)
        assert 16 * max(n, m) * 0.75 <= largest.numel <= tile_numel(*shape)


@pytest.mark.parametrize("mode", [None, "aggregate", "pairwise"])
def test_inputs_are_checked_once(mode):
    """What is checked is carried as `Pairs`; nothing behind it looks again."""
    lhs, rhs = torch.randn(7, 4), torch.randn(9, 4)
    sides = (lhs, rhs) if mode is None else ({"a": lhs, "b": -lhs}, {"c": rhs, "d": -rhs})
    options = {} if mode is None else {"field_mode": mode}
    ids = {"lhs_ids": torch.arange(7), "rhs_ids": torch.arange(9)}
    with contextlib.ExitStack() as stack:
        names = "check_pair", "check_label_range", "check_channels", "check_scale"
        checks = [stack.enter_context(mock.patch.object(pairs, name, wraps=getattr(pairs, name))) for name in names]
        gcl_loss(*sides, 2.0, labels=torch.arange(7), label_smoothing=0.1, **ids, **options)
    assert [check.call_count for check in checks] == [1, 1, 1, 1]
