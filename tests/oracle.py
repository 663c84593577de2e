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
    floor = testing.FLOOR + testing.luck(*inputs)
    testing.assert_as_accurate(
        actual, testing.dense_forms(dense, inputs), testing.in_float64(dense, inputs), names, floor
    )
