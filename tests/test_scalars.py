"""A scale or a bias may be a number of Python's or numpy's, or the one element of a tensor, everywhere."""

import numpy as np
import pytest
import torch
from torch import nn

from gcl_kernels import ClipLoss, GCLLoss, gcl_loss, pairwise_logsumexp

X, Y = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()

CALLS = {
    "pairwise_logsumexp": lambda x, s: torch.cat(pairwise_logsumexp(x, Y.to(x), s)),
    "gcl_loss": lambda x, s: gcl_loss(x, Y.to(x), s, label_smoothing=0.1),
    "GCLLoss": lambda x, s: GCLLoss()(x, Y.to(x), torch.ones(6), s),
    "ClipLoss": lambda x, s: ClipLoss()(x, Y.to(x), s),
}
BIASED = {"ClipLoss": lambda x, s: ClipLoss()(x, Y.to(x), 2.0, logit_bias=s)}

NUMBERS = [
    2, 2.0, np.float16(2), np.float32(2), np.float64(2), np.int64(2), np.array(2), np.array(2.0), np.array([[2.0]], np.float32),
    torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.bfloat16),
    nn.Parameter(torch.tensor(2.0)),
]  # fmt: skip


def of(number):
    return f"{type(number).__name__} {getattr(number, 'dtype', '')} {getattr(number, 'shape', '')}"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", NUMBERS, ids=of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kind_of_number_is_a_scale(name, number, dtype):
    x = X.to(dtype)
    actual = CALLS[name](x, number)
    expected = CALLS[name](x, 2.0)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("number", NUMBERS, ids=of)
def test_every_kind_of_number_is_a_bias_that_cancels(number):
    loss = ClipLoss()(X, Y, 2.0, number)
    assert torch.equal(loss, ClipLoss()(X, Y, 2.0))
    if isinstance(number, nn.Parameter):
        (gradient,) = torch.autograd.grad(loss, number)
        assert gradient == 0


@pytest.mark.parametrize("name", ["gcl_loss", "ClipLoss"])
@pytest.mark.parametrize("number", [2, np.float32(2), np.array(2.0), nn.Parameter(torch.tensor(2.0))], ids=of)
def test_compiled_without_a_break(name, number):
    torch._dynamo.reset()
    call = (lambda x, s: ClipLoss()(x, Y, s, s)) if name == "ClipLoss" else CALLS[name]
    actual = torch.compile(call, fullgraph=True, backend="eager")(X, number)
    torch.testing.assert_close(actual, call(X, 2.0))


@pytest.mark.parametrize(("calls", "argument"), [(CALLS, "logit_scale"), (BIASED, "logit_bias")])
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (True, TypeError, "expected a float or a tensor of one element, got bool"),
        (np.bool_(True), TypeError, "expected a float or a tensor of one element, got bool"),
        (np.array(True), TypeError, "expected a float or a tensor of one element, got bool"),
        (torch.tensor(True), TypeError, "expected a float or a floating-point tensor, got torch.bool"),
        (1j, TypeError, "expected a float or a tensor of one element, got complex"),
        (np.array("2"), TypeError, "expected a float or a tensor of one element, got str"),
        (np.array([1.0, 2.0]), ValueError, r"expected one element, got shape \(2,\)"),
        (torch.ones(2), ValueError, r"expected one element, got shape \(2,\)"),
        (np.float32("nan"), ValueError, "expected a finite number, got nan"),
        (1e300, ValueError, "expected a finite number in float32, got 1e[+]300"),
        (10**400, ValueError, "expected a finite number in float32, got 1000"),
    ],
)
def test_what_is_no_number_is_refused_by_name(calls, argument, number, error, message):
    for call in calls.values():
        with pytest.raises(error, match=f"^{argument}: {message}"):
            call(X, number)


def test_features_of_clip_loss_are_refused_by_its_own_names():
    with pytest.raises(ValueError, match=r"text_features: expected 6 rows, as image_features has, got 5"):
        ClipLoss()(X, Y[:5], 2.0)
    with pytest.raises(TypeError, match=r"image_features: expected a torch.Tensor, got dict"):
        ClipLoss()({"a": X}, Y, 2.0)
    with pytest.raises(ValueError, match=r"text_features: expected a 2-d tensor, got shape \(1, 6, 4\)"):
        ClipLoss()(X, Y[None], 2.0)
