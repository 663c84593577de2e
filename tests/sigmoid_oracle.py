"""Both sides of every comparison of the sigmoid loss, whose bias is a fourth input; as `tests.oracle` for the softmax."""

import torch
from hypothesis import strategies as st

import reference
from gcl_kernels import testing
from gcl_kernels.testing.accuracy import equivalent

NAMES = ("row", "positive", "dlhs", "drhs", "dscale", "dbias")
LOSS_NAMES = ("loss", "dlhs", "drhs", "dscale", "dbias")
BIASES = (-20.0, -10.0, -1.0, 0.0, 3.7, 20.0)
SCALES = (0.0, 1.0, 14.3, 100.0, 200.0, -10.0)


def biases():
    return st.sampled_from(BIASES)


def with_bias(batch: testing.Batch, bias: float):
    """(lhs, rhs, logit_scale, logit_bias): leaf tensors."""
    return *batch.differentiable, torch.full_like(batch.logit_scale.detach(), bias).requires_grad_()


def run(function, inputs, **options):
    return testing.value_and_gradients(lambda: function(*inputs, **options), inputs)


def floor(lhs, rhs, scale, bias) -> float:
    """`testing.floor` of logits that the bias is part of: it is rounded to base 2 once, by what all logits have in common.

    At a scale of 0 all of a column has one logit, and so one rounding of its sigmoid, in every form: luck that they cannot show.
    """
    exact = lhs.dtype == torch.float64
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    more = eps * abs(float(bias.detach()))
    if float(scale.detach()) == 0 and lhs.dtype in (torch.bfloat16, torch.float16):
        more += torch.finfo(lhs.dtype).eps / 2 / min(len(lhs), len(rhs)) ** 0.5
    return testing.floor(lhs, rhs, scale) + more


def assert_accurate(actual, inputs, function=reference.pairwise_softplus, names=NAMES, **options) -> None:
    """`testing.assert_as_accurate` beside a dense function of four inputs."""

    def dense(*given):
        return function(*given, **options)

    def forms():
        yield testing.value_and_gradients(lambda: dense(*inputs), inputs)
        similarities = "lhs_limit" in options
        for seed in range(1, 24):
            yield testing.value_and_gradients(
                lambda s=seed: dense(*equivalent(*inputs[:3], seed=s, similarities=similarities), inputs[3]), inputs
            )

    testing.assert_as_accurate(actual, forms(), testing.in_float64(dense, inputs), names, floor(*inputs))
