"""Limits of similarity, biases of columns, positives apart, and gradients known beforehand, beside plain PyTorch in float64."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gcl_kernels import PairwiseLSE, backends, pairwise_logsumexp, testing
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.pairs import Pairs
from tests.oracle import assert_accurate, run


@given(problem=testing.problems(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_what_limits_nothing_and_adds_nothing_changes_no_bit(problem, dtype):
    batch = problem.build(dtype)
    idle = {
        "lhs_limit": torch.full((problem.n,), math.inf),
        "rhs_limit": torch.full((problem.m,), math.inf),
        "rhs_bias": torch.zeros(problem.m),
    }
    plain, with_terms = run(pairwise_logsumexp, batch), run(pairwise_logsumexp, batch, **idle)
    for a, b in zip(plain, with_terms, strict=True):
        assert torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


@given(
    problem=testing.problems(terms=True),
    directions=st.sampled_from(("both", "lhs_to_rhs", "rhs_to_lhs")),
    positives=st.sampled_from(("joined", "apart")),
)
def test_directions_and_positives_apart(problem, directions, positives):
    batch = problem.build(torch.float64)
    options = {"directions": directions, "positives": positives}
    actual = run(pairwise_logsumexp, batch, **options)
    assert (len(actual[0]), len(actual[1])) == (
        problem.n * (directions != "rhs_to_lhs"),
        problem.m * (directions != "lhs_to_rhs"),
    )
    assert_accurate(actual, batch, **options)


def test_a_hidden_column_equals_a_removed_one():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (12, 20))
    limit = torch.full((20,), math.inf)
    limit[15:] = -math.inf
    hidden = pairwise_logsumexp(x, y, 3.0, rhs_limit=limit)
    removed = pairwise_logsumexp(x, y[:15], 3.0)
    torch.testing.assert_close(hidden.row, removed.row)
    torch.testing.assert_close(hidden.col[:15], removed.col)
    assert hidden.col[15:].isinf().all()


@pytest.mark.parametrize("scale", [10.0, -10.0, 0.0])
def test_a_pair_is_above_its_limit_or_not(scale):
    """A whole rounding on either side of the limit decides; exactly at it a pair is seen, since its products are exact here."""
    x = torch.eye(4)
    y = 0.5 * torch.eye(4) + torch.diag(torch.full((3,), 0.25), 1)  # <x_i, y_{i+1}> = 0.25
    visible = []
    for limit in (0.25, 0.25 * (1 - 2**-22), 0.25 * (1 + 2**-22)):
        row = pairwise_logsumexp(x, y, scale, lhs_limit=torch.full((4,), limit), directions="lhs_to_rhs").row
        visible.append(row)
    whole = pairwise_logsumexp(x, y, scale, directions="lhs_to_rhs").row
    assert torch.equal(visible[0], whole)
    assert torch.equal(visible[2], whole)
    assert not torch.equal(visible[1][:3], whole[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("want", [Want(True, True), Want(True, False), Want(False, True)])
def test_a_pair_hidden_in_the_forward_alone_is_worth_at_most_a_softmax_of_two(dtype, want):
    """What a rounding may do at a limit: statistics that do not know a pair 90 nats above all others of its lines."""
    n = 6
    x, y = torch.eye(n, dtype=dtype), torch.eye(n, dtype=dtype)
    labels = torch.arange(n).roll(1)
    pairs = Pairs.of(x, y, 90.0, labels=labels, lhs_limit=torch.full((n,), 0.5))
    statistics = backends.load("torch").forward(pairs, want)
    seen = Pairs.of(x, y, 90.0, labels=labels, lhs_limit=torch.full((n,), 2.0))
    g = torch.full((n,), 1.0, dtype=torch.float64)
    upstream = Lines(g if want.row else None, g if want.col else None, torch.zeros(n, 1, dtype=torch.float64))
    dlhs, drhs, _ = backends.load("torch").backward(seen, statistics, upstream, Need(True, True, True))
    assert dlhs.abs().max() <= 90 * 4.01
    assert drhs.abs().max() <= 90 * 4.01


@pytest.mark.parametrize("loss", [1e-9, 1e-6, 1e-2])
def test_a_composed_loss_keeps_its_digits(loss):
    """float32 embeddings at logit_scale 100: row - positive is as exact as `gcl_loss`."""
    n, d = 64, 128
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    gap = math.log(n / loss) / 100  # every negative so far below the positive
    y = gap * x + torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1) * 1e-3
    row, _, positive = pairwise_logsumexp(x, y, 100.0)
    exact = reference.pairwise_logsumexp(x.double(), y.double(), 100.0)
    assert row.dtype == positive.dtype == torch.float64
    torch.testing.assert_close((row - positive).mean(), (exact.row - exact.positive).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs"])
def test_gradients_known_beforehand_save_a_pass(directions):
    """They are formed in the forward, and are those of the same loss without a word."""
    n, m, d = 40, 56, 8
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, d, generator=g, dtype=torch.float64).requires_grad_() for k in (n, m))
    w = torch.rand(n, generator=g, dtype=torch.float64)
    rows, cols = directions != "rhs_to_lhs", directions != "lhs_to_rhs"
    g_col = torch.cat([w, w.new_zeros(m - n)])
    known = PairwiseLSE(w if rows else None, g_col if cols else None, -w * (rows + cols))
    gradients, passes = [], []
    backend = backends.load("torch")
    for given_known in (known, None):
        with mock.patch.object(backend, "forward_with_gradient", wraps=backend.forward_with_gradient) as in_one_pass:
            row, col, positive = pairwise_logsumexp(x, y, 5.0, directions=directions, known_upstream=given_known)
            loss = (w * row).sum() if rows else 0.0
            loss = loss + ((g_col * col).sum() if cols else 0.0) - (rows + cols) * (w * positive).sum()
            gradients.append(torch.autograd.grad(3 * loss, (x, y)))
        passes.append(in_one_pass.call_count)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert passes == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lhs_limit": torch.zeros(4)}, r"lhs_limit: expected \(5,\), got \(4,\)"),
        ({"rhs_limit": torch.zeros(7, 1)}, r"rhs_limit: expected a 1-d tensor"),
        ({"rhs_bias": torch.full((7,), math.nan)}, r"rhs_bias: expected numbers, got NaN at 0"),
        ({"rhs_bias": torch.zeros(7, dtype=torch.int64)}, r"rhs_bias: expected dtype"),
        ({"directions": "bth"}, r"directions: expected one of"),
        ({"positives": "aside"}, r"positives: expected one of 'joined', 'apart', got 'aside'"),
        (
            {"known_upstream": PairwiseLSE(torch.ones(4), torch.ones(7), torch.ones(5))},
            r"known_upstream.row: expected shape",
        ),
        (
            {"known_upstream": PairwiseLSE(None, torch.ones(7), torch.ones(5))},
            r"known_upstream.row: expected a torch.Tensor",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pairwise_logsumexp(torch.randn(5, 3), torch.randn(7, 3), 1.0, **options)
