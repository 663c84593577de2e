"""Both sides of every comparison of the sigmoid loss, whose bias is a fourth input; as `tests.oracle` for the softmax.

The gradients of the scale and of the bias are held to a forward error bound instead of plain PyTorch's errors.
"""

import itertools

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

    In half precision pairs of a line that have one logit have one rounding of G. It may be lucky in all dense forms at once, as
    one rounding of a logit may (`testing.floor`). At a scale of 0 all pairs have one.
    """
    more = eps_of_logits(lhs) * abs(float(bias.detach()))
    lines = 1 if float(scale.detach()) == 0 else min(len(lhs), len(rhs))
    return testing.floor(lhs, rhs, scale) + more + rounding_of_pairs(lhs) / lines**0.5


def limits_of_sums(dense, inputs, rhs_bias=None) -> dict[str, float]:
    """Of dscale = sum_ij G_ij s_ij and dbias = sum_ij G_ij, one number each whose terms may cancel: a forward error bound.

    It takes the place of plain PyTorch's errors, which in half precision are a thousand times larger. If each term t is known
    to e |t|, their sum is known to sum e |t|, however much of it cancels.

    A logit z is rounded as the product with the scale, as the bias in base 2 and as their sum, each to eps / 2 of its size:
    |dz| <= eps (|s| + |bias|), and a sigmoid turns dz into a relative error of at most dz. Over L lines, where the product's
    roundings are of either sign, 4 / sqrt(L) of the first part is enough (`testing.floor`). The roundings of the sigmoid itself,
    and of what adds up, are what `testing.FLOOR` is for.

    dscale is <G rhs, lhs>, whose terms are G_ij x_id y_jd: what adds up is of their size, which an inner product near 0 is not.
    In half precision G is rounded before that product, and bfloat16's product on a CPU is rounded, too. dbias has neither: it
    adds up sigmoids before they are rounded.
    """
    lhs, rhs, scale, bias = (x.detach().double() for x in inputs)
    per_pair = bias.expand(len(lhs), len(rhs)).clone().requires_grad_()
    *_, g = testing.value_and_gradients(lambda: dense(lhs, rhs, scale, per_pair), (per_pair,))
    similarities, biases = lhs @ rhs.T, bias.abs() + (0.0 if rhs_bias is None else rhs_bias.double().abs().max())
    share = min(1.0, 4 / min(len(lhs), len(rhs)) ** 0.5)
    dz = eps_of_logits(inputs[0]) * float(share * (scale * similarities).abs().max() + biases)
    own, half = testing.floor(*inputs[:2], 0 * scale), rounding_of_pairs(inputs[0])
    of_scale = g.abs() * ((dz + half) * similarities.abs() + (own + half) * (lhs.abs() @ rhs.abs().T))
    return {
        "dscale": float(of_scale.sum() / (g * similarities).sum().abs()),
        "dbias": float((dz + own) * g.abs().sum() / g.sum().abs()),
    }


def eps_of_logits(lhs) -> float:
    """Logits are float32 for half precision, too."""
    return torch.finfo(torch.promote_types(lhs.dtype, torch.float32)).eps


def rounding_of_pairs(lhs) -> float:
    """The largest relative error of an entry of G that is multiplied by a side; 0 where that is in the logits' dtype."""
    return torch.finfo(lhs.dtype).eps / 2 if lhs.dtype in (torch.bfloat16, torch.float16) else 0.0


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
    # The number itself is rounded last, to the dtype of the scale.
    sums = {
        name: limit_of_sum + torch.finfo(inputs[2].dtype).eps / 2
        for name, limit_of_sum in limits_of_sums(dense, inputs, options.get("rhs_bias")).items()
    }
    # Numbers below the smallest normal one, as of a sigmoid at z = -95 in float32, have fewer digits; none, in the end.
    kind = torch.finfo(torch.promote_types(inputs[0].dtype, torch.float32))
    # Each reads as many forms as it needs, and no form is made twice.
    for k, (name, read) in enumerate(zip(names, itertools.tee(forms(), len(names)), strict=True)):
        # Plain PyTorch's errors are no part of the limit of a sum, unless sigmoids are too small for float16, as plain ones are.
        alone = name in sums and not (name == "dscale" and inputs[0].dtype == torch.float16)
        one = [[exact[k]]] if alone else ([form[k]] for form in read)
        at_least = sums.get(name, limit) + kind.smallest_normal / max(
            float(exact[k].norm()), kind.smallest_normal * kind.eps
        )
        testing.assert_as_accurate([actual[k]], one, [exact[k]], [name], at_least)
