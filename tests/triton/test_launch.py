"""How a problem is cut into launches, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_kernels import pairwise_logsumexp
from gcl_kernels.backends import chunks, workspace_bytes
from gcl_kernels.backends.triton import operands

from .conftest import DEVICE, INTERPRETED

sizes = st.sampled_from((1, 100, 4096, 65_536, 1_000_000, 2**31 - 1))
TILE = (128, 256)


@given(n=sizes, m=sizes, itemsize=st.sampled_from((2, 4)))
def test_a_chunk_of_g_respects_the_budget(n, m, itemsize):
    rows, cols = chunks.chunk_of_gradient(n, m, TILE, itemsize)
    budget = workspace_bytes()
    assert 0 < rows <= n
    assert 0 < cols <= m
    assert rows % TILE[0] == 0 or rows == n
    assert cols % TILE[1] == 0 or cols == m
    assert rows * chunks.round_up(cols, 64) * itemsize <= 1.1 * budget
    if n * m * itemsize > 4 * budget and min(n, m) > 20_000:
        assert rows * cols * itemsize > budget / 4  # no small change
        assert max(rows, cols) / min(rows, cols) < 2


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.sampled_from((16, 128)))
@settings(max_examples=100)
def test_parts_are_equal_up_to_a_tile(length, largest, step):
    part = chunks.equal_parts(length, largest, step)
    assert part == length or (part % step == 0 and part <= max(step, largest))
    parts = -(-length // part)
    assert length - (parts - 1) * part > part - parts * step


@given(channels=st.integers(1, 3), distinct=st.sampled_from((1, 3, 1000)), seed=st.integers(0, 999))
def test_compressed_ids_are_equal_where_ids_are(channels, distinct, seed):
    g = torch.Generator().manual_seed(seed)
    left = torch.randint(-2, distinct, (7, channels), generator=g) * (2**40 + 1)
    right = torch.randint(-2, distinct, (9, channels), generator=g) * (2**40 + 1)
    small_left, small_right = operands.compress_ids(left, right)
    assert small_left.dtype == small_right.dtype == torch.int32
    expected = (left[:, None] == right[None]) & (left[:, None] >= 0)
    actual = small_left.t()[:7, None] == small_right.t()[None, :9]
    assert torch.equal(actual, expected)
    assert not (small_left.t()[7:, None] == small_right.t()[None]).any()  # nor do paddings match anything


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "as_it_is"),
    [
        ((5, 32), (32, 1), 0, True),
        ((5, 32), (48, 1), 16, True),
        ((5, 32), (33, 1), 0, False),
        ((5, 32), (1, 5), 0, False),
        ((5, 32), (32, 1), 1, False),
        ((5, 30), (32, 1), 0, False),
        ((5, 32), (0, 1), 0, False),
        ((1, 32), (32, 1), 0, True),
    ],
)
def test_operands_are_copied_only_where_they_must_be(shape, stride, offset, as_it_is):
    x = torch.randn(1000).to(torch.bfloat16).as_strided(shape, stride, offset)
    operand = operands.operand(x)
    assert (operand is x) == as_it_is
    assert torch.equal(operand[:, : shape[1]], x)
    assert not operand[:, shape[1] :].any()
    assert operand.stride(0) % 16 == 0
    assert operand.data_ptr() % 16 == 0


def test_float64_is_refused_and_told_where_to_go():
    x = torch.randn(3, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"backend: .* bfloat16, float16 and float32, not float64"):
        pairwise_logsumexp(x, x, 1.0, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="about real devices")
@pytest.mark.gpu
def test_no_synchronisation():
    x, y = (torch.randn(300, 64, device="cuda", requires_grad=True) for _ in range(2))
    scale = torch.tensor(10.0, device="cuda", requires_grad=True)
    ids = torch.arange(300, device="cuda") // 2

    def step():
        out = pairwise_logsumexp(x, y, scale, lhs_ids=ids, rhs_ids=ids, backend="triton")
        (out.row.sum() + out.col.sum() - out.positive.sum()).backward()

    step()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
