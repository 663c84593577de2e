"""pairwise_softplus and sigmoid_loss against the float64 reference, and what they promise besides numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gcl_kernels import backends, pairwise_softplus, pointwise_ops, sigmoid_loss, testing
from gcl_kernels.backends.pointwise import PointwiseNeed
from gcl_kernels.pairs import Pairs
from tests.counting import LargestTensor, Products
from tests.oracle import DTYPES
from tests.sigmoid_oracle import LOSS_NAMES, SCALES, assert_accurate, biases, run, with_bias

problems = testing.problems(terms=True, scales=SCALES)
reductions = st.sampled_from(("mean", "weighted_mean", "sum", "none"))


def weights_of(problem, options):
    g = torch.Generator().manual_seed(problem.seed)
    shape = options["labels"].shape if "labels" in options else (problem.n,)
    return torch.rand(shape, generator=g, dtype=torch.float64) * 3


@given(problem=problems, dtype=st.sampled_from((*DTYPES, torch.float64)), bias=biases())
def test_the_primitive_is_as_accurate_as_dense_pytorch(problem, dtype, bias):
    batch = problem.build(dtype)
    inputs = with_bias(batch, bias)
    with backends.settings(tile=(32, 48)):
        actual = run(pairwise_softplus, inputs, **batch.options)
    assert [v.dtype for v in actual] == [torch.float64] * 2 + [dtype] * 2 + [inputs[2].dtype] * 2
    assert_accurate(actual, inputs, **batch.options)


@given(
    problem=problems,
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    bias=biases(),
    reduction=reductions,
    reads=st.booleans(),
)
def test_the_loss_is_as_accurate_as_dense_pytorch(problem, dtype, bias, reduction, reads):
    """`reads`: whether numbers are read on the host, as on a CPU; False is the path of every other device."""
    batch = problem.build(dtype)
    inputs = with_bias(batch, bias)
    options = {**batch.options, "weights": weights_of(problem, batch.options).to(inputs[2].dtype)}
    with backends.settings(tile=(32, 48), host_reads=reads):
        actual = run(sigmoid_loss, inputs, reduction=reduction, **options)
    assert_accurate(actual, inputs, reference.sigmoid_loss, LOSS_NAMES, reduction=reduction, **options)


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (5, 7))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    labels = torch.tensor([[0, 3], [1, 1], [-1, 6], [2, -1], [-1, -1]])
    weights = torch.rand(5, 2, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: pairwise_softplus(*v, labels=labels), (x, y, scale, bias))
    for reduction in ("mean", "weighted_mean", "none"):
        options = {"labels": labels, "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda *v: sigmoid_loss(*v[:4], weights=v[4], **options),  # noqa: B023
            (x, y, scale, bias, weights),
        )


def test_weights_are_of_positives_alone():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    row, positive = pairwise_softplus(x, y, 2.0, -1.0)
    w = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    expected = row + w * torch.nn.functional.softplus(-positive)
    torch.testing.assert_close(sigmoid_loss(x, y, 2.0, -1.0, weights=w, reduction="none"), expected.float())


@pytest.mark.parametrize("field_mode", ["aggregate", "pairwise"])
def test_fields(field_mode):
    g = torch.Generator().manual_seed(0)
    lhs = torch.nn.functional.normalize(torch.randn(5, 3, generator=g, dtype=torch.float64))
    rhs = {k: torch.randn(7, 3, generator=g, dtype=torch.float64) for k in ("title", "image")}
    mask = torch.rand(7, 2, generator=g) > 0.3
    options = {"rhs_field_weights": {"title": 0.7, "image": 0.3}, "rhs_field_mask": mask, "field_mode": field_mode}
    actual = sigmoid_loss(lhs, rhs, 5.0, -2.0, reduction="none", **options)
    if field_mode == "aggregate":
        y = reference.aggregate_fields(rhs, options["rhs_field_weights"], mask=mask)
        expected = reference.sigmoid_loss(lhs, y, 5.0, -2.0, reduction="none")
    else:
        expected = 0.0
        for f, (name, share) in enumerate(options["rhs_field_weights"].items()):
            z = 5.0 * lhs @ torch.nn.functional.normalize(rhs[name]).T - 2.0
            sign = 1 - 2 * torch.eye(5, 7, dtype=torch.float64)
            losses = torch.nn.functional.softplus(sign * z)
            expected = expected + share * torch.where(mask[:, f], losses, 0.0).sum(dim=1)
    torch.testing.assert_close(actual, expected)


@pytest.fixture
def counts(monkeypatch):
    """Of whatever the backend is asked for: FLOPs of products, and entries of the largest tensor."""
    backend = backends.load("torch")
    count, function = {"flops": 0, "largest": 0}, backend.softplus

    def counted(*args, **kwargs):
        with Products() as products, LargestTensor() as largest:
            result = function(*args, **kwargs)
        count["flops"] += products.flops
        count["largest"] = max(count["largest"], largest.numel)
        return result

    monkeypatch.setattr(backend, "softplus", counted)
    return count


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_passes_take_six_units(reduction, dtype, counts):
    n, m, d = 96, 160, 32
    lhs, rhs = (torch.randn(k, d).to(dtype).requires_grad_() for k in (n, m))
    with backends.settings(tile=(32, 64)):
        sigmoid_loss(lhs, rhs, 1.0, -5.0, reduction=reduction).sum().backward()
    assert counts["flops"] == (8 if reduction == "none" else 6) * n * m * d


@pytest.mark.parametrize(
    ("frozen", "units"), [(("rhs",), 4), (("lhs",), 4), (("lhs", "rhs"), 4), (("lhs", "rhs", "scale"), 2)]
)
def test_nothing_is_computed_for_what_is_frozen(frozen, units, counts):
    n, m, d = 64, 96, 32
    names = ("lhs", "rhs", "scale", "bias")
    inputs = (torch.randn(n, d), torch.randn(m, d), torch.tensor(1.0), torch.tensor(-5.0))
    for name, x in zip(names, inputs, strict=True):
        x.requires_grad_(name not in frozen)
    with backends.settings(tile=(32, 48)):
        sigmoid_loss(*inputs).backward()
    assert counts["flops"] == units * n * m * d
    assert [x.grad is not None for x in inputs] == [name not in frozen for name in names]


def test_no_tensor_of_n_by_m(counts):
    n, m, d = 300, 400, 8
    inputs = torch.randn(n, d).requires_grad_(), torch.randn(m, d).requires_grad_()
    for reduction in ("mean", "none"):
        with backends.settings(tile=(32, 48)):
            sigmoid_loss(*inputs, 1.0, -5.0, reduction=reduction).sum().backward()
    assert 0 < counts["largest"] <= m * d


def test_a_loss_scaled_later_keeps_small_float16_gradients():
    """1 / N and a sigmoid of 5e-5 lie below float16's smallest number; a GradScaler's factor comes with the backward."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(64, 16, generator=g)).half().requires_grad_() for _ in range(2))
    labels = torch.full((64,), -1)
    factor = 2.0**16
    actual = torch.autograd.grad(factor * sigmoid_loss(x, y, 1.0, -16.0, labels=labels), (x, y))
    exact = [v.detach().double().requires_grad_() for v in (x, y)]
    expected = torch.autograd.grad(factor * reference.sigmoid_loss(*exact, 1.0, -16.0, labels=labels), exact)
    for a, e in zip(actual, expected, strict=True):
        assert testing.relative_error(a, e) < 2e-3


def test_a_second_backward_and_a_second_derivative():
    x, y = (torch.randn(n, 4, requires_grad=True) for n in (6, 9))
    loss = sigmoid_loss(x, y, 2.0, -3.0)
    first = torch.autograd.grad(3 * loss, (x, y), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (x, y), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with backends.settings(tile=(4, 4)):
        of_tiles = sigmoid_loss(x, y, 2.0, -3.0)
        of_rows = pairwise_softplus(x, y, 2.0, -3.0).row.sum()
    for name, value in (("sigmoid_loss", loss), ("pairwise_softplus", of_tiles), ("pairwise_softplus", of_rows)):
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"{name}: .*double backward is not supported"):
            g.sum().backward()


def test_known_gradients_are_checked_in_debug_mode():
    x, y = (torch.randn(n, 4, requires_grad=True) for n in (6, 9))
    pairs, bias = Pairs.of(x, y, 2.0), torch.tensor(-3.0)
    ones = torch.ones(6, dtype=torch.float64)
    for g_row, g_positive in ((ones.cumsum(0), ones), (ones, ones)):
        with backends.settings(debug=True):
            row, positive = pointwise_ops.softplus(pairs, bias, None, ones, ones[:, None])
            with pytest.raises(RuntimeError, match="known_upstream: expected gradients proportional"):
                ((g_row * row).sum() + (g_positive * positive[:, 0]).sum()).backward()


def test_the_loss_passes_its_own_check_of_known_gradients():
    x, y = (torch.randn(n, 4, requires_grad=True) for n in (6, 9))
    labels = torch.tensor([[0, 0], [1, -1], [-1, -1], [2, 8], [3, 4], [5, 5]])
    with backends.settings(debug=True):
        sigmoid_loss(x, y, 2.0, -3.0, labels=labels, weights=torch.rand(6, 2), reduction="weighted_mean").backward()


@pytest.mark.parametrize("known", [True, False])
def test_the_operator_passes_opcheck(known):
    lhs, rhs = (torch.randn(n, 16, requires_grad=True) for n in (5, 7))
    pairs, bias = Pairs.of(lhs, rhs, torch.tensor(2.0)), torch.tensor(-3.0, requires_grad=True)
    g = (torch.ones(5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)) if known else (None, None)
    call = pointwise_ops.Call(PointwiseNeed(True, True, False, True), True, "torch")
    # the last of its tests asks for a gradient of every output, and those of gradients are refused
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        *["test_aot_dispatch_dynamic"] * (not known),
    )
    torch.library.opcheck(pointwise_ops._softplus, pointwise_ops.arguments(pairs, bias, *g, call), test_utils=tests)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction):
    encoder = torch.nn.Linear(6, 16)

    def loss(x, y, scale, bias):
        return sigmoid_loss(encoder(x), encoder(y), scale, bias, reduction=reduction).sum()

    x, y = torch.randn(9, 6), torch.randn(9, 6)
    learned = [torch.tensor(v, requires_grad=True) for v in (2.0, -3.0)]
    parameters = [*learned, *encoder.parameters()]
    expected = torch.autograd.grad(loss(x, y, *learned), parameters)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y, *learned), parameters), expected)
    torch.compiler.reset()


def test_autocast_is_followed_as_matmul_follows_it():
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        row, _ = pairwise_softplus(x, y, 2.0, -3.0)
    expected = pairwise_softplus(x.bfloat16(), y.bfloat16(), 2.0, -3.0).row
    assert torch.equal(row, expected)
    assert torch.autograd.grad(row.sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_passes_as_finite(bad):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 8, generator=g) for _ in range(2))
    x[16, 3] = bad
    actual, expected = (f(x, y, 1.0, -3.0) for f in (pairwise_softplus, reference.pairwise_softplus))
    for a, e in zip(actual, expected, strict=True):
        assert not (a.isfinite() & ~e.isfinite()).any()
        assert torch.equal(a.isfinite(), e.isfinite())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("x", "y", 1.0, "0"), {}, "logit_bias: expected a float or a tensor of one element, got str"),
        (("x", "y", 1.0, math.inf), {}, "logit_bias: expected a finite number, got inf"),
        (("x", "y", 1.0, torch.zeros(2)), {}, "logit_bias: expected one element, got shape"),
        (("x", "y", "1", 0.0), {}, "logit_scale: expected a float"),
        (("x", "y", 1.0, 0.0), {"rhs_bias": torch.zeros(3)}, r"rhs_bias: expected \(7,\), got \(3,\)"),
        (("x", "y", 1.0, 0.0), {"labels": torch.full((5,), 7)}, r"labels: expected columns 0\.\.6"),
    ],
)
def test_errors(arguments, options, message):
    tensors = {"x": torch.randn(5, 3), "y": torch.randn(7, 3)}
    arguments = [tensors.get(v, v) if isinstance(v, str) else v for v in arguments]
    for function in (pairwise_softplus, sigmoid_loss):
        with pytest.raises((TypeError, ValueError), match=message):
            function(*arguments, **options)
