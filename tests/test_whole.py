"""The whole step of a small batch beside the passes over tiles and the formula in float64."""

from unittest import mock

import pytest
import torch

import reference
from gcl_kernels import ClipLoss, SigLipLoss, backends, gcl_loss, sigmoid_loss, testing
from gcl_kernels.backends.pointwise import PointwiseNeed
from gcl_kernels.backends.torch import whole
from gcl_kernels.pairs import Pairs
from gcl_kernels.testing import relative_error
from tests import sigmoid_oracle
from tests.counting import LargestTensor, Products

torch_backend = backends.load("torch")
OF_TILES = {"tile": (1024, 1024)}  # a tile that is given takes the passes


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def steps(monkeypatch):
    """{"softmax_step": [whether a call made the loss]}, likewise for the sigmoid."""
    calls = {"softmax_step": [], "sigmoid_step": []}

    def counted(name, function):
        def call(*given):
            made = function(*given)
            calls[name].append(made is not None)
            return made

        return call

    for name in calls:
        monkeypatch.setattr(torch_backend, name, counted(name, getattr(torch_backend, name)))
    return calls


def drawn(n, m, d, dtype, cosine=0.5, scale=30.0):
    unit = torch.nn.functional.normalize
    x = unit(torch.randn(-(-n // 4), d).repeat_interleave(4, 0)[:n] + torch.randn(n, d))
    y = unit(torch.randn(m, d))
    y[:n] = unit(cosine * x + (1 - cosine**2) ** 0.5 * y[:n])
    return [v.to(dtype).requires_grad_() for v in (x, y)] + [torch.tensor(scale, requires_grad=True)]


def results(loss, inputs):
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


NEAR = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 2e-2}  # two ways of one result


def options_of(name, n, m):
    channels = torch.arange(n)[:, None] // 3, torch.arange(m)[:, None] // 3
    return {
        "plain": {},
        "sum": {"reduction": "sum"},
        "weights": {"weights": torch.rand(n) * torch.tensor([0.0, 1.0]).repeat(n)[:n]},
        "whole weights": {"weights": torch.arange(n) % 5},
        "ids": {"lhs_ids": channels[0], "rhs_ids": channels[1]},
        "bias": {"rhs_bias": torch.randn(m)},
    }[name]


def assert_as_right_as_dense(inputs, **given):
    actual = testing.value_and_gradients(lambda: gcl_loss(*inputs, **given), inputs)

    def dense(*inputs):
        return reference.gcl_loss(*inputs, **given)

    exact, limit = testing.in_float64(dense, inputs), testing.floor(*inputs)
    testing.assert_as_accurate(actual, testing.dense_forms(dense, inputs), exact, floor=limit)


@pytest.mark.parametrize("options", ["plain", "sum", "weights", "whole weights", "ids", "bias"])
@pytest.mark.parametrize("shape", [(2, 2, 3), (60, 75, 600), (128, 128, 64), (17, 129, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_softmax_as_right_as_dense_and_as_the_passes(dtype, shape, options, steps):
    n, m, _ = shape
    if options == "ids" and n == 2:
        pytest.skip("both rows have one id, and nothing to see")
    # of two rows at a scale of 30 a loss may be below what dense PyTorch tells from 0 in float64
    inputs, given = drawn(*shape, dtype, scale=30.0 if n > 2 else 5.0), options_of(options, n, m)
    got = results(lambda *x: gcl_loss(*x, **given), inputs)
    assert steps == {"softmax_step": [True], "sigmoid_step": []}
    assert [g.dtype for g in got] == [torch.promote_types(dtype, torch.float32), dtype, dtype, torch.float32]
    assert_as_right_as_dense(inputs, **given)
    for g, again in zip(got, results(lambda *x: gcl_loss(*x, **given), inputs), strict=True):
        assert torch.equal(g, again)
    with backends.settings(**OF_TILES):
        of_tiles = results(lambda *x: gcl_loss(*x, **given), inputs)
    assert all(
        relative_error(g, t) <= NEAR[dtype] for g, t in zip(got[:3], of_tiles[:3], strict=True)
    )  # dscale cancels


@pytest.mark.parametrize("options", ["plain", "sum", "ids", "bias"])
@pytest.mark.parametrize("shape", [(2, 2, 3), (60, 75, 600), (200, 256, 64), (1, 1, 1), (180, 184, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sigmoid_as_right_as_dense_and_as_the_passes(dtype, shape, options, steps):
    n, m, _ = shape
    given = options_of(options, n, m)
    inputs = [*drawn(*shape, dtype, scale=10.0), torch.tensor(-3.0, requires_grad=True)]
    got = results(lambda *x: sigmoid_loss(*x, **given), inputs)
    assert steps == {"softmax_step": [], "sigmoid_step": [True]}
    actual = sigmoid_oracle.run(sigmoid_loss, inputs, **given)
    sigmoid_oracle.assert_accurate(actual, inputs, reference.sigmoid_loss, sigmoid_oracle.LOSS_NAMES, **given)
    with backends.settings(**OF_TILES):
        of_tiles = results(lambda *x: sigmoid_loss(*x, **given), inputs)
    assert all(
        relative_error(g, t) <= NEAR[dtype] for g, t in zip(got[:3], of_tiles[:3], strict=True)
    )  # dscale cancels


@pytest.mark.parametrize("scale", [-8.0, 100.0])
def test_large_logits(scale, steps):
    """At a scale of 100 exponentials of positives alone would reach 2^144."""
    inputs = drawn(96, 96, 64, torch.float32, cosine=0.97, scale=scale)
    assert_as_right_as_dense(inputs)
    assert steps["softmax_step"] == [True]


def test_a_small_loss_keeps_its_digits(steps):
    x = torch.eye(64).requires_grad_()
    loss = gcl_loss(x, x.detach(), 25.0).detach()
    assert steps["softmax_step"] == [True]
    expected = torch.log1p(63 * torch.exp(torch.tensor(-25.0, dtype=torch.float64)))
    assert float(expected) < 1e-9
    assert abs(float(loss) / float(expected) - 1) < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y, s: (x, y, 0.0 * s),
        lambda x, y, s: (1e30 * x, y, s),
        lambda x, y, s: (torch.full_like(x, torch.nan), y, s),
        lambda x, y, s: (torch.cat([x[:1] * 1e3, x[1:]]), y, s),
        lambda x, y, s: (torch.cat([x[:1] * torch.inf, x[1:]]), y, s),
    ],
    ids=["scale 0", "huge", "NaN", "one row of large logits", "infinity"],
)
@pytest.mark.parametrize("name", ["softmax_step", "sigmoid_step"])
def test_what_is_beyond_one_reference_is_left_to_the_passes(name, change, steps):
    inputs = change(*(v.detach() for v in drawn(20, 20, 16, torch.float32)))
    inputs = [v.requires_grad_() for v in inputs]
    loss = gcl_loss if name == "softmax_step" else lambda x, y, s: sigmoid_loss(x, y, s, -3.0)
    got = results(loss, inputs)
    assert steps[name] == [False]
    with backends.settings(tile=(20, 20)):
        for g, t in zip(got, results(loss, inputs), strict=True):
            torch.testing.assert_close(g, t, rtol=0, atol=0, equal_nan=True)


def test_a_row_that_sees_nothing_is_left_to_the_passes(steps):
    x, y, s = drawn(4, 4, 8, torch.float32)
    ids = torch.zeros(4, dtype=torch.int64)
    loss = gcl_loss(x, y, s, lhs_ids=ids, rhs_ids=ids).detach()
    assert (steps["softmax_step"], float(loss)) == ([False], 0.0)
    assert float(gcl_loss(x[:1], y[:1], s).detach()) == 0.0


@pytest.mark.parametrize(
    ("frozen", "units"), [((), 6), (("rhs",), 4), (("lhs",), 4), (("lhs", "rhs"), 2), (("lhs", "rhs", "scale"), 2)]
)
@pytest.mark.parametrize("name", ["softmax_step", "sigmoid_step"])
@pytest.mark.parametrize("d", [32, 200])
def test_nothing_is_computed_for_what_is_frozen(name, d, frozen, units):
    """Nor is any tensor larger than the plane or a side."""
    n, m = 64, 96
    inputs = {"lhs": torch.randn(n, d) / d, "rhs": torch.randn(m, d), "scale": torch.tensor(2.0)}
    need = PointwiseNeed(*(side not in frozen for side in inputs), False)
    pairs = Pairs(*inputs.values())
    with Products() as products, LargestTensor() as largest:
        if name == "softmax_step":
            _, gradients = whole.softmax_step(pairs, None, True, need)
        else:
            _, gradients = whole.sigmoid_step(pairs, torch.tensor(-3.0), True, need)
    assert products.flops == units * n * m * d
    assert largest.numel == m * max(n, d)
    assert [g is not None for g in gradients] == list(need)


@pytest.mark.parametrize("loss", [gcl_loss, lambda x, y, s: sigmoid_loss(x, y, s, -3.0)], ids=["softmax", "sigmoid"])
def test_a_second_backward_and_a_second_derivative(loss):
    inputs = drawn(6, 9, 4, torch.float32)
    value = loss(*inputs)
    first, again = (torch.autograd.grad(3 * value, inputs, retain_graph=True) for _ in range(2))
    once = torch.autograd.grad(loss(*inputs), inputs)
    for a, b, c in zip(first, again, once, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3 * c)
    (g,) = torch.autograd.grad(value, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        g.sum().backward()


def test_inputs_changed_before_a_second_backward_are_noticed():
    x, y, s = drawn(6, 6, 4, torch.float32)
    value = gcl_loss(x * 1, y, s)
    value.backward(retain_graph=True)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize(
    "settings", [{"tile": (1024, 1024)}, {"host_reads": False}, {"workspace_mib": 0}], ids=lambda s: next(iter(s))
)
def test_settings_of_the_passes_are_kept(settings, steps):
    x, y, s = drawn(12, 12, 8, torch.float32)
    with backends.settings(**settings):
        gcl_loss(x, y, s)
        sigmoid_loss(x, y, s, -3.0)
    assert steps == {"softmax_step": [], "sigmoid_step": []}


@pytest.mark.parametrize("case", ["labels", "float16", "weights with a gradient", "reduction", "limits", "directions"])
def test_what_is_not_plain_takes_the_passes(case, steps):
    x, y, s = drawn(12, 12, 8, torch.float16 if case == "float16" else torch.float32)
    given = {
        "labels": {"labels": torch.arange(12)},
        "weights with a gradient": {"weights": torch.ones(12, requires_grad=True)},
        "reduction": {"reduction": "none"},
        "limits": {"false_negative_margin": 0.1},
        "directions": {"directions": "lhs_to_rhs"},
    }.get(case, {})
    gcl_loss(x, y, s, **given)
    assert steps["softmax_step"] == []


def test_the_drop_ins_take_it_and_no_gradient_makes_none(steps):
    x, y, s = drawn(12, 12, 8, torch.bfloat16)
    with mock.patch.object(whole.WholePlane, "gradients", side_effect=AssertionError), torch.no_grad():
        without = ClipLoss()(x, y, s), SigLipLoss()(x, y, s, -10.0)
    assert not any(loss.requires_grad for loss in without)
    assert steps == {"softmax_step": [True], "sigmoid_step": [True]}
    assert torch.equal(ClipLoss()(x, y, s), without[0])
    assert torch.equal(SigLipLoss()(x, y, s, -10.0), without[1])


def test_few_logarithms_are_the_sum_of_all():
    u = torch.rand(256, 1000).mul_(30).sub_(25).exp_()
    exact = u.double().log1p().sum(dim=1)
    assert relative_error(whole.log1p_sums(u), exact) < 2e-7
    assert relative_error(whole.log1p_sums(1e10 * u), (1e10 * u.double()).log1p().sum(dim=1)) < 2e-7
    assert whole.log1p_sums(torch.full((256, 256), torch.nan)) is None
    assert whole.log1p_sums(torch.full((256, 256), 2.0**61)) is None
