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

    In half precision one line, or one logit that all pairs have at a scale of 0, is one rounding of G, which may be lucky in all
    dense forms at once.
    """
    exact = lhs.dtype == torch.float64
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    more = eps * abs(float(bias.detach()))
    if lhs.dtype in (torch.bfloat16, torch.float16):
        lines = 1 if float(scale.detach()) == 0 else min(len(lhs), len(rhs))
        more += torch.finfo(lhs.dtype).eps / 2 / lines
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
