"""The accuracy rule: a fast implementation may err as plain PyTorch errs in the same dtype, and a quarter more.

    error(actual) <= 1.25 * error(dense PyTorch in the same dtype) + 1e-6        (1e-12 in float64)

An error is relative: |actual - oracle| / |oracle| in the Euclidean norm, with the float64 result as the oracle.

The error of one dense evaluation is a random number. Where many roundings add up it hardly varies from one evaluation to
the next. Where few do (a handful of logits, one near tie in a peaked softmax, terms of one number that cancel) it varies
much: an evaluation can be exact by luck. So the rule does not rest on one evaluation. `dense_forms` makes many that are
equal in exact arithmetic: the features in another order, a factor moved from one side into the scale. Their mean error and
its spread say how large an error of that kind can be. What they cannot show is the rounding of a logit in another base or
order of factors. `floor` bounds it: each float32 rounding of a logit s is up to eps |s|, and a rounding of a logit is a
relative error of its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 1.25
FLOOR, FLOOR_FLOAT64 = 1e-6, 1e-12
FORMS = 24
# Errors of different forms are samples of one distribution. So many standard deviations above their mean lies less than one
# sample in a million.
DEVIATIONS = 5.0
ENOUGH = 8  # samples, for a standard deviation to mean something

Dense = Callable[[Tensor, Tensor, Tensor], Any]


def value_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """[outputs..., gradient of each input] of `function()`, for one fixed random upstream gradient.

    Infinite outputs (the -inf of a line with nothing visible) get no upstream gradient, as in any loss that uses the others.

    Args:
        function: returns a tensor or a sequence of tensors.
        inputs: leaf tensors that require gradients. One that is not used has the gradient 0.
        seed: of the upstream gradient.
    """
    outputs = function()
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    g = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for v in outputs:
        upstream = torch.rand(v.shape, generator=g, dtype=torch.float64).to(v.device)
        total = total + (torch.where(v.isinf(), 0.0, v.to(torch.float64)) * upstream).sum().cpu()
    gradients = torch.autograd.grad(total, list(inputs), allow_unused=True, materialize_grads=True)
    return [v.detach() for v in (*outputs, *gradients)]


def in_float64(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The oracle: `value_and_gradients` of `function(*inputs)` for float64 copies of `inputs`."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return value_and_gradients(lambda: function(*exact), exact)


def dense_forms(
    function: Dense, inputs: Sequence[Tensor], count: int = FORMS, *, similarities: bool = False
) -> Iterator[list[Tensor]]:
    """`value_and_gradients` of `function(lhs, rhs, logit_scale)` as given, then of expressions equal to it.

    Args:
        function: a dense loss that depends on its inputs by their logits alone, logit_scale * lhs @ rhs.T.
        inputs: lhs (N, D), rhs (M, D) and logit_scale, leaf tensors that require gradients.
        count: how many expressions.
        similarities: True: the function may depend on lhs @ rhs.T as well.
    """
    yield value_and_gradients(lambda: function(*inputs), inputs)
    for seed in range(1, count):
        yield value_and_gradients(
            lambda s=seed: function(*equivalent(*inputs, seed=s, similarities=similarities)), inputs
        )


def equivalent(
    lhs: Tensor, rhs: Tensor, logit_scale: Tensor, seed: int, similarities: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(lhs, rhs, logit_scale) with the same logits (and similarities) in exact arithmetic and other roundings in any other."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(lhs.shape[1], generator=g).to(lhs.device)
    left, right = (2.0 ** (torch.rand(2, generator=g, dtype=torch.float64) - 0.5)).tolist()
    right = 1 / left if similarities else right
    return left * lhs[:, order], right * rhs[:, order], logit_scale / (left * right)


def floor(lhs: Tensor, rhs: Tensor, logit_scale: Tensor, rhs_bias: Tensor | None = None) -> float:
    """What the rule adds to the limit: FLOOR (FLOOR_FLOAT64 for float64 inputs), and by how much an evaluation may exceed the
    errors of its kind by bad luck.

    That is four roundings of the largest logit (the product, the scale, the base, the difference to a reference) where one
    line decides the result, and 1 / sqrt(L) of that where L lines do, since what is luck in each of them averages out.
    Tiles are float32 for half precision too.

    Args:
        lhs: (N, D).
        rhs: (M, D).
        logit_scale: of one element.
        rhs_bias: (M,) or None.
    """
    exact = lhs.dtype == torch.float64
    with torch.no_grad():
        logits = logit_scale * lhs.double() @ rhs.double().T
        largest_logit = float((logits if rhs_bias is None else logits.abs() + rhs_bias.abs()).abs().max())
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    return (FLOOR_FLOAT64 if exact else FLOOR) + 4 * eps * largest_logit / min(len(lhs), len(rhs)) ** 0.5


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """|`actual` - `oracle`| / |`oracle`| in the Euclidean norm; equal infinities count as no error; NaN where NaN differs."""
    actual, oracle = actual.detach().to("cpu", torch.float64), oracle.detach().to("cpu", torch.float64)
    same = actual == oracle
    difference = torch.where(same, 0.0, actual - oracle)
    norm = torch.where(oracle.isinf(), 0.0, oracle).norm()
    error = difference.norm() / norm
    return 0.0 if bool(same.all()) else float(error)


def assert_as_accurate(
    actual: Sequence[Tensor],
    dense: Iterable[Sequence[Tensor]],
    oracle: Sequence[Tensor],
    names: Sequence[str] | None = None,
    floor: float = FLOOR,
) -> None:
    """The accuracy rule, for each of several results.

    Args:
        actual: what is tested.
        dense: the same quantities by plain PyTorch in the same dtype, by one or several equivalent expressions
            (`dense_forms`). An iterator is read as far as it is needed.
        oracle: the same by plain PyTorch in float64 (`in_float64`).
        names: of the results, for messages.
        floor: what is added to the limit; 1e-12 for float64. The function `floor` gives more where logits are large or lines
            are few.

    Raises:
        AssertionError: an error is over its limit. It names the result, the error and the limit.
    """
    names = names or [f"output {k}" for k in range(len(oracle))]
    for name, a, o in zip(names, actual, oracle, strict=True):
        assert a.shape == o.shape, f"{name}: expected shape {tuple(o.shape)}, got {tuple(a.shape)}"
    errors = [relative_error(a, o) for a, o in zip(actual, oracle, strict=True)]
    samples: list[list[float]] = [[] for _ in errors]
    limits = [floor] * len(errors)
    for form in dense:
        for k, o in enumerate(oracle):
            samples[k].append(relative_error(form[k], o))
            limits[k] = FACTOR * largest_error(samples[k]) + floor
        if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            return
    for name, error, limit in zip(names, errors, limits, strict=True):
        assert error <= limit or math.isnan(limit), f"{name}: error {error:.3g} is over {limit:.3g}"


def largest_error(samples: Sequence[float]) -> float:
    """That can be expected of evaluations like those whose errors these are."""
    if any(math.isnan(e) for e in samples):
        return math.nan
    if len(samples) < ENOUGH:
        return max(samples)
    mean = sum(samples) / len(samples)
    deviation = math.sqrt(sum((e - mean) ** 2 for e in samples) / (len(samples) - 1))
    return max(*samples, mean + DEVIATIONS * deviation)
