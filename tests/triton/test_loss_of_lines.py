"""The loss of few launches (`linear`): labels that repeat, one direction, limits; against the reference and the other path."""

import pytest
import torch

import reference
from gcl_kernels import gcl_loss, linear, pairwise_logsumexp, testing
from tests.oracle import DTYPES, LOSS_NAMES, assert_accurate, run

from .common import build
from .conftest import DEVICE

# what a tile computes past the end, from repeated rows and padding, is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DIRECTIONS = ("both", "lhs_to_rhs", "rhs_to_lhs")
N, M = 70, 50


def labels_by_name():
    g = torch.Generator().manual_seed(5)
    return {
        "few": torch.randint(
            -1, 4, (N,), generator=g
        ),  # some 14 rows a column, more than a step of them would hide an error
        "one": torch.where(torch.arange(N) % 9 == 0, -1, M - 1),  # 62 rows of the last column: two steps
        "none": torch.full((N,), -1, dtype=torch.int32),
        "column": torch.randint(0, M, (N, 1), generator=g),
    }


def batch_of(dtype, **options):
    problem = testing.Problem(N, M, 24, None, 0, 1, 20.0, "random", strided=False, seed=3)
    batch = build(problem, dtype)
    return testing.Batch(batch.lhs, batch.rhs, batch.logit_scale, {k: v for k, v in options.items() if v is not None})


@pytest.fixture
def calls(monkeypatch):
    """How often the loss took this path."""
    made, loss = [], linear.loss
    monkeypatch.setattr(linear, "loss", lambda *given: made.append(1) or loss(*given))
    return made


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("name", labels_by_name())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_that_repeat(name, directions, dtype, calls):
    labels = labels_by_name()[name].to(DEVICE)
    weights = torch.linspace(0, 3, N, device=DEVICE).reshape(labels.shape)
    batch = batch_of(dtype, labels=labels, weights=weights, directions=directions, reduction="mean")
    actual = run(gcl_loss, batch, backend="triton")
    assert len(calls) == 1
    assert_accurate(actual, batch, reference.gcl_loss, names=LOSS_NAMES)


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"false_negative_margin": 0.1}, {"lhs_ids": 3, "rhs_ids": 3}], ids=str)
def test_both_paths_have_one_value(options, directions, calls, monkeypatch):
    labels = labels_by_name()["few"].to(DEVICE)
    options = {
        k: torch.arange(N if k == "lhs_ids" else M, device=DEVICE) % v if "ids" in k else v for k, v in options.items()
    }
    batch = batch_of(torch.float32, labels=labels, directions=directions, **options)
    fast = run(gcl_loss, batch, backend="triton")
    monkeypatch.setattr(linear, "takes", lambda *_: False)
    slow = run(gcl_loss, batch, backend="triton")
    assert len(calls) == 1
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=2e-6)


def test_repeated_labels_have_the_same_bits_every_time():
    batch = batch_of(torch.bfloat16, labels=labels_by_name()["few"].to(DEVICE))
    first, second = (run(gcl_loss, batch, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_scale_of_zero_beside_limits_leaves_no_tiny_number():
    """A row that sees its positive alone has the logsumexp 0, and so has the positive."""
    x, y = (torch.nn.functional.normalize(torch.randn(5, 16, device=DEVICE), dim=1) for _ in range(2))
    limits = torch.full((5,), -2.0, device=DEVICE)  # hides every pair that is not labelled
    for labels in (None, torch.tensor([4, 3, 2, 1, 0], device=DEVICE)):
        lines = pairwise_logsumexp(x, y, 0.0, labels=labels, lhs_limit=limits, backend="triton")
        assert all(not line.any() for line in lines)


def test_labels_compile_to_one_graph():
    x, y = (torch.randn(20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    inputs = x, y, torch.tensor(5.0, device=DEVICE, requires_grad=True)
    labels = torch.arange(20, device=DEVICE) % 7

    def loss(*inputs):
        both, one = (gcl_loss(*inputs, labels=labels, directions=d, backend="triton") for d in ("both", "rhs_to_lhs"))
        return both + one

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    for a, e in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)
    torch.compiler.reset()
