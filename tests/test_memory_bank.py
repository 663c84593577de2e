"""`MemoryBank`: the loss of the concatenated batch, what a queue keeps, and what a checkpoint of it holds."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gcl_kernels import MemoryBank, backends, pairwise_logsumexp, testing
from gcl_kernels.types import TRANSPORTS
from tests.counting import counted_products


def rows(n, seed=0, d=5):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)


def loss_with(bank, x, y, scale):
    """As the class's docstring has it."""
    out = pairwise_logsumexp(x, y, scale, directions="lhs_to_rhs")
    row = torch.logaddexp(out.row, bank.logsumexp(x, scale))
    return (row - out.positive).mean()


def kept(bank):
    """The rows of a bank that is not yet full, or all of them."""
    return bank.features[: min(int(bank.count), bank.size)]


@given(size=st.sampled_from((1, 3, 16, 40)), pushed=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 99))
def test_the_loss_is_that_of_the_concatenated_batch(size, pushed, seed):
    bank = MemoryBank(size, 5, dtype=torch.float64)
    for k, n in enumerate(pushed):
        bank.push(rows(n, 100 + k))
    x, y = (rows(9, seed + k).requires_grad_() for k in range(2))
    t = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def dense():
        return F.cross_entropy(t * x @ torch.cat([y, kept(bank)]).T, torch.arange(9))

    with backends.settings(tile=(4, 16)):
        actual = testing.value_and_gradients(lambda: loss_with(bank, x, y, t), (x, y, t))
    for a, e in zip(actual, testing.value_and_gradients(dense, (x, y, t)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@given(size=st.integers(1, 12), pushed=st.lists(st.integers(0, 30), max_size=6))
def test_the_last_rows_are_kept(size, pushed):
    bank, everything = MemoryBank(size, 1), torch.arange(float(sum(pushed)))[:, None]
    for part in everything.split(pushed) if pushed else []:
        bank.push(part, ids=part[:, 0].long())
    expected = everything[-size:, 0].tolist()
    assert sorted(kept(bank)[:, 0].tolist()) == expected
    assert [i for i in sorted(bank.ids.tolist()) if i >= 0] == expected
    assert bank.count == sum(pushed)
    assert bank.features.shape == (size, 1)


def test_an_empty_bank_changes_nothing():
    x, y = rows(6).requires_grad_(), rows(6, 1)
    bank = MemoryBank(4, 5, dtype=torch.float64)
    assert bool((bank.logsumexp(x, 3.0) == -math.inf).all())
    loss = loss_with(bank, x, y, 3.0)
    expected = F.cross_entropy(3.0 * x @ y.T, torch.arange(6))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (loss, expected)))


def test_pushed_rows_are_constants_and_what_was_computed_keeps_its_own():
    x, y = rows(6).requires_grad_(), rows(6, 1).requires_grad_()
    bank = MemoryBank(4, 5, dtype=torch.float64)
    bank.push(rows(4, 2))
    loss = loss_with(bank, x, y, 3.0)
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    bank.push(y)
    assert not bank.features.requires_grad
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_false_negatives_by_id_and_by_similarity():
    x, past = rows(3), rows(4, 1)
    bank = MemoryBank(8, 5, dtype=torch.float64)
    bank.push(past, ids=torch.tensor([7, -1, 7, 9]))
    logits = 2.0 * x @ past.T
    hidden = torch.tensor([[True, False, True, False], [False] * 4, [False, False, False, True]])
    row = bank.logsumexp(x, 2.0, lhs_ids=torch.tensor([7, -1, 9]))
    torch.testing.assert_close(row, logits.masked_fill(hidden, -math.inf).logsumexp(dim=1))
    limit = (x @ past.T).median(dim=1).values + 1e-9
    row = bank.logsumexp(x, 2.0, lhs_limit=limit)
    torch.testing.assert_close(row, logits.masked_fill(x @ past.T > limit[:, None], -math.inf).logsumexp(dim=1))


def test_a_copy_a_checkpoint_and_a_dtype():
    bank = MemoryBank(4, 5)
    bank.push(rows(6).float(), ids=torch.arange(6))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = MemoryBank(4, 5)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = rows(3, 1).float()
    for again in (other, copy.deepcopy(bank)):
        assert torch.equal(again.logsumexp(x, 2.0), bank.logsumexp(x, 2.0))
        again.push(x)  # goes on where the other was
        assert not torch.equal(again.features, bank.features)
        assert again.count == 9
    with pytest.raises(RuntimeError, match="size mismatch for features"):
        MemoryBank(5, 5).load_state_dict(bank.state_dict())
    half = copy.deepcopy(bank).to(torch.bfloat16)
    assert (half.features.dtype, half.ids.dtype, half.count.dtype) == (torch.bfloat16, torch.int64, torch.int64)
    half.push(x)
    expected = (2.0 * x @ half.features.float().T).logsumexp(dim=1)
    torch.testing.assert_close(half.logsumexp(x, 2.0).float(), expected)
    assert repr(bank) == "MemoryBank(4, 5, dtype=torch.float32)"
    with torch.autocast("cpu", torch.bfloat16):
        assert bank.logsumexp(x, 2.0).isfinite().all()


def test_a_column_of_the_bank_costs_no_gradient_of_its_own():
    n, size, d = 40, 90, 8
    bank, x = MemoryBank(size, d), rows(n, d=d).float().requires_grad_()
    bank.push(rows(size, 1, d).float())
    with counted_products() as flops, backends.settings(tile=(16, 32)):
        bank.logsumexp(x, 5.0).sum().backward()
    assert sum(flops) == 6 * n * size * d


def test_one_compiled_graph():
    bank, x, y = MemoryBank(8, 5), rows(6).float().requires_grad_(), rows(6, 1).float()
    bank.push(y)
    compiled = torch.compile(lambda x: loss_with(bank, x, y, 3.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss_with(bank, x, y, 3.0))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryBank(0, 3), "size: expected at least 1, got 0"),
        (lambda: MemoryBank(3, 2.0), "dim: expected an int, got float"),
        (lambda: MemoryBank(3, 2, dtype=torch.int64), "dtype: expected one of torch.float64, .*, got torch.int64"),
        (lambda: MemoryBank(3, 2).push(torch.zeros(2, 3)), r"rows: expected \(N, 2\), got \(2, 3\)"),
        (lambda: MemoryBank(3, 2).push(torch.zeros(4, 2), torch.arange(3)), r"ids: expected \(4,\), one a row, got \(3,\)"),
        (lambda: MemoryBank(3, 2).push(torch.zeros(4, 2), torch.zeros(4)), "ids: expected dtype int64, got float32"),
        (lambda: MemoryBank(3, 2).logsumexp(torch.zeros(4), 1.0), r"x: expected a 2-d tensor, got shape \(4,\)"),
        (lambda: MemoryBank(3, 2).logsumexp(torch.zeros(4, 3), 1.0), r"rhs: expected \(M, 3\)"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def own_banks_on_rank(group, transport):
    """Each rank's own bank, seen by all ranks' rows; unequal numbers of everything."""
    rank = dist.get_rank(group)
    bank = MemoryBank(4 + rank, 5, dtype=torch.float64)
    bank.push(rows(3 * rank, 10 + rank))  # rank 0's is empty
    x = rows(2 + rank, 20 + rank).requires_grad_()
    row = bank.logsumexp(x, 3.0, process_group=group, transport=transport)
    row.sum().backward()
    return kept(bank), x.detach(), row.detach(), x.grad


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_over_ranks_a_row_sees_all_ranks_banks(pool, transport):
    banks, xs, actual, gradients = (
        torch.cat(parts) for parts in zip(*pool.run(3, own_banks_on_rank, transport), strict=True)
    )
    xs.requires_grad_()
    expected = (3.0 * xs @ banks.T).logsumexp(dim=1)
    torch.testing.assert_close(actual, expected.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), xs)[0])
