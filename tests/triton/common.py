"""What the kernels' tests share: small configurations that cover every constexpr branch, and both sides of a comparison."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import strategies as st

import reference
from gcl_kernels import pairwise_logsumexp, testing
from gcl_kernels.backends.triton import launch
from gcl_kernels.backends.triton.config import Config, Tile

from .conftest import DEVICE, INTERPRETED

NAMES = ("row", "col", "positive", "dlhs", "drhs", "dscale")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (forward, backward). Sides, steps of D, bands and halves differ; every D of ``testing.EDGE_DIMS`` leaves a tail somewhere.
TILES = (
    (Tile(32, 64, 32, 4, 2, group=2), Tile(64, 32, 32, 4, 2, group=1, halves=True)),
    (Tile(64, 32, 16, 4, 2, group=3), Tile(32, 64, 16, 4, 2, group=2)),
    (Tile(128, 128, 64, 8, 2), Tile(128, 128, 64, 8, 2, halves=True)),
)


def configurations() -> tuple[Config, ...]:
    """Every tile, with descriptors and with pointers, with one exponential a logit and with two."""
    switches = itertools.product(TILES, (True, False), (True, False))
    return tuple(
        Config(*(dataclasses.replace(tile, one_exponential=one) for tile in 2 * tiles), descriptors=descriptors)
        for tiles, descriptors, one in switches
        if INTERPRETED or not descriptors or torch.cuda.get_device_capability()[0] >= 9
    )


configs = st.sampled_from(configurations())


def use(patch: pytest.MonkeyPatch, config: Config, budget: int | None = None) -> None:
    """Replace the table's choice, and the workspace budget (bytes)."""
    patch.setattr(launch, "select", lambda *_: config)
    if budget is not None:
        patch.setattr(launch, "workspace_bytes", lambda: budget)


def build(problem: testing.Problem, dtype: torch.dtype) -> testing.Batch:
    return problem.build(dtype, DEVICE)


def everything(out):
    return out


def run(function, batch: testing.Batch, outputs=everything):
    """Values and gradients of the chosen outputs."""
    return testing.value_and_gradients(
        lambda: outputs(function(batch.lhs, batch.rhs, batch.logit_scale, **batch.options)), batch.differentiable
    )


def triton(*args, **options):
    return pairwise_logsumexp(*args, backend="triton", **options)


def dense_forms(batch: testing.Batch, outputs=everything):
    """Plain PyTorch in the same dtype, the scale applied before or after the product: which of them is luckiest is luck."""

    def form(left: float, right: float):
        def function(lhs, rhs, scale, **options):
            share = scale.detach().clamp(min=1e-9)
            lhs, rhs = (share**left).to(lhs.dtype) * lhs, (share**right).to(rhs.dtype) * rhs
            return reference.pairwise_logsumexp(lhs, rhs, scale * share ** -(left + right), **options)

        return function

    return [run(form(*shares), batch, outputs) for shares in ((0, 0), (1, 0), (0, 1), (0.4, 0.6))]


def accuracy_floor(problem: testing.Problem, batch: testing.Batch) -> float:
    """The rule's floor; and where few logits decide the result, some float32 roundings of the largest logit more.

    The rule compares errors that average over many roundings. A handful of logits, or one near-tie in a peaked softmax, can
    come out exact by luck in one float32 evaluation and one rounding off in an equally good one.
    """
    with torch.no_grad():
        largest_logit = float((batch.logit_scale * batch.lhs.float() @ batch.rhs.float().T).abs().max())
    averages = problem.n * problem.m >= 1000 and problem.d >= 7 and largest_logit < 16
    return 1e-6 if averages else 1e-6 + 4 * torch.finfo(torch.float32).eps * largest_logit


def assert_as_accurate(actual, problem: testing.Problem, batch: testing.Batch, outputs=everything, names=NAMES) -> None:
    """``testing.assert_as_accurate``, and for half precision the noise that G's one rounding is known to leave in dscale.

    dscale = <G, lhs rhs^T> is one number: it is off by half an ulp of every entry of G, added up like random numbers, and one
    dense evaluation is no measure of that.
    """
    exact, dense, floor = oracle(batch, outputs), dense_forms(batch, outputs), accuracy_floor(problem, batch)
    factor = 1.25 if min(problem.n, problem.m) >= 15 and problem.d >= 7 else 4.0  # a handful of numbers is luck, again
    testing.assert_as_accurate(actual[:-1], [d[:-1] for d in dense], exact[:-1], names, factor, floor)
    with torch.no_grad():
        largest_product = float((batch.lhs.double() @ batch.rhs.double().T).abs().max())
    lines = problem.n * max(problem.positives or 1, 1) + problem.n + problem.m
    noise = torch.finfo(batch.lhs.dtype).eps * largest_product * lines**0.5 / max(float(exact[-1].abs()), 1e-30)
    testing.assert_as_accurate(actual[-1:], [d[-1:] for d in dense], exact[-1:], names[-1:], floor=floor + noise)


def oracle(batch: testing.Batch, outputs=everything):
    exact = testing.Batch(*(x.detach().double().requires_grad_() for x in batch.differentiable), batch.options)
    return run(reference.pairwise_logsumexp, exact, outputs)
