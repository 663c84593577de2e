"""A derivative that the kernels do not have is an error, never a zero or a part of it."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

import reference
from gcl_kernels import (
    ClipLoss,
    GCLLoss,
    MemoryBank,
    SigLipLoss,
    aggregate_fields,
    backends,
    gcl_loss,
    nt_xent_loss,
    pairwise_logsumexp,
    pairwise_softplus,
    sigmoid_loss,
    supcon_loss,
)

REFUSED = r"expected tensors without forward-mode tangents .* gcl_kernels\.reference"
X, Y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 5))
S, W = torch.tensor(2.0, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
BIAS = torch.tensor(-10.0, dtype=torch.float64)
MASK = torch.tensor([[True, False], [True, True], [False, True], [True, True]])

# Name: (a function of one tensor, that tensor); between them every tensor a public function has a derivative for.
LOSSES = {
    "gcl_loss, lhs": (lambda x: gcl_loss(x, Y, S), X),
    "gcl_loss, rhs": (lambda y: gcl_loss(X, y, S), Y),
    "gcl_loss, logit_scale": (lambda s: gcl_loss(X, Y, s), S),
    "gcl_loss, weights": (lambda w: gcl_loss(X, Y, S, weights=w), W),
    "gcl_loss, one direction": (lambda x: gcl_loss(x, Y, S, directions="lhs_to_rhs"), X),
    "gcl_loss, label smoothing": (lambda x: gcl_loss(x, Y, S, label_smoothing=0.1), X),
    "gcl_loss, z-loss": (lambda x: gcl_loss(x, Y, S, z_loss=0.1, reduction="none").sum(), X),
    "gcl_loss, fields": (lambda x: gcl_loss({"a": x, "b": X}, Y, S, lhs_field_mask=MASK), X),
    "gcl_loss, pairs of fields": (lambda x: gcl_loss({"a": x, "b": X}, Y, S, field_mode="pairwise"), X),
    "GCLLoss, lhs": (lambda x: GCLLoss()(x, Y, W, S), X),
    "GCLLoss, scores": (lambda w: GCLLoss(normalize="mean")(X, Y, w, S), W),
    "ClipLoss, features": (lambda x: ClipLoss()(x, X, S), X),
    "ClipLoss, logit_scale": (lambda s: ClipLoss()(X, X, s), S),
    "ClipLoss, logit_bias": (lambda b: ClipLoss()(X, X, S, b), BIAS),
    "pairwise_logsumexp, lhs": (lambda x: pairwise_logsumexp(x, Y, S).row.sum(), X),
    "pairwise_logsumexp, positive": (lambda y: pairwise_logsumexp(X, y, S).positive.sum(), Y),
    "pairwise_logsumexp, logit_scale": (lambda s: pairwise_logsumexp(X, Y, s).col.sum(), S),
    "nt_xent_loss, x": (lambda x: nt_xent_loss(x, X, S), X),
    "nt_xent_loss, logit_scale": (lambda s: nt_xent_loss(X, X, s), S),
    "supcon_loss, features": (lambda x: supcon_loss(x, torch.tensor([0, 0, 1, 1]), S), X),
    "MemoryBank.logsumexp, x": (lambda x: MemoryBank(2, 3).logsumexp(x, S).exp().sum(), X),
    "pairwise_softplus, lhs": (lambda x: pairwise_softplus(x, Y, S, BIAS).row.sum(), X),
    "pairwise_softplus, logit_bias": (lambda b: pairwise_softplus(X, Y, S, b).positive.sum(), BIAS),
    "sigmoid_loss, weights": (lambda w: sigmoid_loss(X, Y, S, BIAS, weights=w), W),
    "SigLipLoss, features": (lambda x: SigLipLoss()(x, X, S, BIAS), X),
    "SigLipLoss, logit_bias": (lambda b: SigLipLoss()(X, X, S, b), BIAS),
    "aggregate_fields, Triton": (lambda x: aggregate_fields([X.float(), x], backend="triton").sum(), X.float()),
}


@pytest.fixture(autouse=True)
def triton_is_chosen_where_it_is_named(monkeypatch):
    """On CPU tensors too: the refusal comes before anything is launched."""
    monkeypatch.setattr(backends, "choose_for_fields", lambda name, *_: name or "torch")


def forward_ad_of(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def under_vmap_in_a_dual_level(function, x):
    """The dual tensor reaches the function through a closure that a vmap has wrapped."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(
            torch.func.vmap(lambda k: function(k * dual))(torch.ones(2, dtype=x.dtype))
        ).tangent[0]


# Name: how the derivative along ones is asked for.
DERIVATIVES = {
    "forward_ad": forward_ad_of,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x).sum(),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, strategy="forward-mode", vectorize=True).sum(),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(torch.ones_like(x)[None])[
        0
    ],
    "jvp of vmap": lambda f, x: torch.func.jvp(
        lambda xs: torch.func.vmap(f)(xs), (x[None],), (torch.ones_like(x)[None],)
    )[1][0],
    "vmap in a dual level": under_vmap_in_a_dual_level,
    "jvp around a grad": lambda f, x: torch.func.jvp(
        lambda a: torch.func.grad(lambda s: s * f(a))(S), (x,), (torch.ones_like(x),)
    )[1],
    "grad": lambda f, x: torch.func.grad(f)(x).sum(),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x).sum(),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (torch.ones_like(x),))[1],
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", LOSSES)
def test_public_functions_refuse(name, derivative):
    function, x = LOSSES[name]
    with pytest.raises(RuntimeError, match=REFUSED):
        DERIVATIVES[derivative](function, x)


@pytest.mark.parametrize("derivative", list(itertools.islice(DERIVATIVES, 10)))
def test_the_reference_has_them(derivative):
    """And the ways above of asking ask for the derivative along ones."""
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(reference.gcl_loss(x, Y, S, label_smoothing=0.1), x)[0].sum()
    actual = DERIVATIVES[derivative](lambda x: reference.gcl_loss(x, Y, S, label_smoothing=0.1), X)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("derivative", list(itertools.islice(DERIVATIVES, 10)))
def test_fields_in_plain_pytorch_have_them(derivative):
    def of(aggregate):
        return lambda x: (aggregate({"a": x, "b": X}, {"a": 0.3, "b": 0.7}, mask=MASK) * X).sum()

    expected, actual = (DERIVATIVES[derivative](of(f), X) for f in (reference.aggregate_fields, aggregate_fields))
    assert expected != 0
    torch.testing.assert_close(actual, expected)


def test_an_argument_without_a_tangent_is_taken_in_a_dual_level():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        assert gcl_loss(X, Y, S) == gcl_loss(X, Y, S, weights=torch.ones(4))
        assert gcl_loss(dual.detach(), Y, S).isfinite()
        with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED):
            gcl_loss(dual, Y, S)


def test_vmap_over_a_loss_has_its_values_and_gradients():
    batch = torch.stack([X, X.flip(0)]).requires_grad_()
    expected = torch.stack([gcl_loss(x, Y, S) for x in batch])
    actual = torch.func.vmap(lambda x: gcl_loss(x, Y, S))(batch)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss.sum(), batch)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_loss_refuses_whenever_it_was_compiled(fullgraph):
    loss = torch.compile(lambda x: gcl_loss(x, Y, S), fullgraph=fullgraph, backend="aot_eager")
    for _ in range(2):  # compiled within a dual level, then outside of one
        with pytest.raises(RuntimeError) as error:  # torch.compile tells its own story where it may not break the graph
            forward_ad_of(loss, X)
        assert fullgraph or "gcl_kernels.reference" in str(error.value)
        with pytest.raises(RuntimeError) as error:
            torch.func.jvp(loss, (X,), (X,))
        assert fullgraph or "gcl_kernels.reference" in str(error.value)
        torch.testing.assert_close(loss(X), gcl_loss(X, Y, S))


def test_a_derivative_taken_inside_a_compiled_function_refuses():
    for derivative in ("jvp", "forward_ad", "grad", "jacfwd"):
        compiled = torch.compile(
            lambda x, ask=DERIVATIVES[derivative]: ask(lambda x: gcl_loss(x, Y, S), x), backend="aot_eager"
        )
        with pytest.raises(RuntimeError, match=REFUSED):
            compiled(X)
