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


def floor(lhs, rhs, scale, bias, *, rounded_pairs: bool = True) -> float:
    """`testing.floor` of logits that the bias is part of: it is rounded to base 2 once, by what all logits have in common.

    `rounded_pairs`: of gradients of the sides, which are made from G in the inputs' dtype; those of the scale and of the bias are
    sums of G before it is rounded. In half precision pairs of a line that have one logit have one rounding of G. It may be lucky
    in all dense forms at once, as one rounding of a logit may (`testing.floor`). At a scale of 0 all pairs have one.
    """
    exact = lhs.dtype == torch.float64
    eps = torch.finfo(torch.float64 if exact else torch.float32).eps
    more = eps * abs(float(bias.detach()))
    if rounded_pairs and lhs.dtype in (torch.bfloat16, torch.float16):
        lines = 1 if float(scale.detach()) == 0 else min(len(lhs), len(rhs))
        more += torch.finfo(lhs.dtype).eps / 2 / lines**0.5
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

    exact, limit = testing.in_float64(dense, inputs), floor(*inputs)
    try:
        testing.assert_as_accurate(actual, forms(), exact, names, limit)
    except AssertionError:
        # The gradients of the scale and of the bias are one number each, sums over all pairs, whose terms may cancel. A sum of
        # terms that are each known to a relative error e is known to e times its condition number, sum |t| / |sum t|.
        worse, samples = cancellations(dense, inputs), list(forms())
        for k, name in enumerate(names):
            one = [[form[k]] for form in samples]
            of_sum = floor(*inputs, rounded_pairs=False) * worse[name] if name in worse else 0.0
            testing.assert_as_accurate([actual[k]], one, [exact[k]], [name], max(limit, of_sum))


def cancellations(dense, inputs) -> dict[str, float]:
    """How much larger the terms of a sum over all pairs are than the sum, from the gradient of a bias for each pair."""
    lhs, rhs, scale, bias = (x.detach().double() for x in inputs)
    biases = bias.expand(len(lhs), len(rhs)).clone().requires_grad_()
    *_, g = testing.value_and_gradients(lambda: dense(lhs, rhs, scale, biases), (biases,))
    terms = {"dscale": g * (lhs @ rhs.T), "dbias": g}
    return {name: float(term.abs().sum() / term.sum().abs()) for name, term in terms.items()}
