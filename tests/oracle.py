"""Both sides of every comparison: values and gradients of a function, and the reference's under the public accuracy rule."""

import torch

import reference
from gcl_kernels import testing

NAMES = ("row", "col", "positive", "dlhs", "drhs", "dscale")
LOSS_NAMES = ("loss", "dlhs", "drhs", "dscale")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def everything(outputs):
    return outputs


def run(function, batch: testing.Batch, outputs=everything, **options):
    """Values and gradients of the chosen outputs of `function(lhs, rhs, logit_scale, **options)`."""
    given = {**batch.options, **options}
    return testing.value_and_gradients(lambda: outputs(function(*batch.differentiable, **given)), batch.differentiable)


def assert_accurate(actual, batch: testing.Batch, function=None, outputs=everything, names=NAMES, **options) -> None:
    """`testing.assert_as_accurate` beside a dense function, `reference.pairwise_logsumexp` by default."""
    given = {**batch.options, **options}

    def dense(*inputs):
        return outputs((function or reference.pairwise_logsumexp)(*inputs, **given))

    inputs = batch.differentiable
    forms = testing.dense_forms(dense, inputs, similarities="lhs_limit" in given)
    testing.assert_as_accurate(
        actual, forms, testing.in_float64(dense, inputs), names, testing.floor(*inputs, given.get("rhs_bias"))
    )


def bias_of_logits(function, device="cpu") -> float:
    """Mean relative error of many positives, whose own roundings average out: what all logits have in common.

    This scale times log2(e) is as far as a number can be from the nearest float32, 5.9e-8 of itself. The part that rounding
    takes is added to float32 products, whose own rounding leaves 2.5e-8 of it.
    """
    g = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(k, 16, generator=g) for k in (1024, 32))
    labels = torch.randint(0, 32, (1024,), generator=g)
    scale = torch.tensor(90.07644653320312)
    positive = function(lhs.to(device), rhs.to(device), scale.to(device), labels=labels.to(device)).positive.cpu()
    exact = reference.pairwise_logsumexp(lhs.double(), rhs.double(), scale.double(), labels=labels).positive
    return float(((positive - exact) / exact.abs().mean() * exact.sign()).mean())
