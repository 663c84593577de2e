"""A step repeated from its tape has the bits of one whose launches were decided anew."""

import pytest
import torch

from gcl_kernels import backends, gcl_loss
from gcl_kernels.backends.triton import tape

from .conftest import DEVICE

# what a tile computes past the end, from repeated rows and padding, is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, M, D = 20, 25, 32
CASES = {
    "plain": {},
    "weights": {"weights": torch.linspace(0, 2, N)},
    "labels": {"labels": torch.arange(N) % 7 - 1, "weights": torch.linspace(0, 2, N)},
    "ids": {"lhs_ids": torch.arange(N) % 5, "rhs_ids": torch.arange(M) % 5},
    "bias and limits": {"rhs_bias": torch.linspace(-1, 1, M), "false_negative_margin": 0.1},
    "one direction": {"directions": "rhs_to_lhs", "reduction": "sum"},
}


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    monkeypatch.setattr(tape, "_plans", tape.OrderedDict())
    return tape._plans


def tapes(plans):
    return [t for plan in plans.values() for t in plan.tapes.values() if isinstance(t, tape.Tape)]


def drawn(seed, dtype=torch.float32, d=D):
    g = torch.Generator().manual_seed(seed)
    lhs, rhs = (torch.randn(k, d, generator=g).div_(d**0.5).to(DEVICE, dtype).requires_grad_() for k in (N, M))
    return lhs, rhs, torch.tensor(5.0 + seed, device=DEVICE, requires_grad=True)


def step(inputs, needed=(0, 1, 2), **options):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss = gcl_loss(*inputs, backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(3 * loss, [inputs[i] for i in needed])


def plain(*given, **options):
    with backends.settings(tapes=False):
        return step(*given, **options)


def assert_same(actual, expected):
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), ("labels", torch.bfloat16), ("weights", torch.float16)],
    ids=str,
)
def test_three_steps_of_other_numbers(case, dtype, plans):
    """The first is as it is, the second is recorded, the third comes from the tapes."""
    for seed in range(3):
        inputs = drawn(seed, dtype)
        actual = step(inputs, **CASES[case])
        assert len(tapes(plans)) == (2 if seed else 0)
        assert_same(actual, plain(inputs, **CASES[case]))


def test_what_is_padded_and_copied(plans):
    for seed in range(3):  # D is no multiple of 16, and the sides are views
        wide = drawn(seed, d=27)
        inputs = wide[0][:, 1:20], wide[1][:, 3:22], wide[2]
        actual = step(inputs)
        assert_same(actual, plain(inputs))
    assert len(tapes(plans)) == 2


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_gradients_that_are_not_needed(needed, plans):
    for seed in range(3):
        inputs = drawn(seed)
        for i in set(range(3)) - set(needed):
            inputs[i].requires_grad_(False)
        assert_same(step(inputs, needed), plain(inputs, needed))
    assert len(tapes(plans)) == 2


def test_another_layout_has_a_tape_of_its_own(plans):
    for seed in range(3):
        lhs, rhs, scale = drawn(seed)
        for inputs in ((lhs, rhs, scale), (lhs[1:], rhs, scale), (lhs, rhs.t().contiguous().t(), scale)):
            assert_same(step(inputs), plain(inputs))
    assert len(tapes(plans)) == 6


def test_one_tensor_for_both_sides(plans):
    """It is not recorded, since a tape would take one side's memory for both, and it is repeated from others' tapes."""
    x, other, scale = drawn(0)[0], drawn(1)[0], drawn(0)[2]
    for inputs in ((x, x, scale),) * 3 + ((x, other, scale),) * 3 + ((other, x, scale), (x, x, scale)):
        assert_same(step(inputs), plain(inputs))
    assert len(tapes(plans)) == 2


def test_backward_twice_and_in_another_order(plans):
    for _ in range(2):
        step(drawn(9))
    first, second = drawn(3), drawn(4)
    losses = [gcl_loss(*inputs, backend="triton") for inputs in (first, second)]
    for inputs, loss in ((second, losses[1]), (first, losses[0]), (first, losses[0])):
        actual = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
        assert_same(actual, plain(inputs)[1:])
    assert len(tapes(plans)) == 2


def test_saved_tensors_that_come_back_otherwise(plans):
    def transposed(x):
        return x.t().contiguous().t() if x.ndim == 2 else x.clone()

    for seed in range(3):
        step(drawn(seed))
    assert len(tapes(plans)) == 2
    for seed in range(3):
        inputs = drawn(seed)
        with torch.autograd.graph.saved_tensors_hooks(transposed, lambda x: x):
            loss = gcl_loss(*inputs, backend="triton")
        actual = torch.autograd.grad(3 * loss, inputs)
        for a, e in zip(actual, plain(inputs)[1:], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)


def test_a_second_derivative_is_refused(plans):
    inputs = drawn(0)
    for _ in range(3):
        gradient = torch.autograd.grad(gcl_loss(*inputs, backend="triton"), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient[0].sum(), inputs)


def test_few_layouts_are_remembered(plans, monkeypatch):
    monkeypatch.setattr(tape, "PLANS", 2)
    lhs, rhs, scale = drawn(0)
    for n in (10, 11, 12):
        step((lhs[:n], rhs, scale))
    assert len(plans) == 2


def test_a_step_that_keeps_much_is_not_recorded(plans, monkeypatch):
    monkeypatch.setattr(tape, "LARGEST_SCRATCH", 100)
    for _ in range(3):
        step(drawn(0))
    assert not tapes(plans)


def test_a_function_that_reads_a_number_is_not_recorded(plans):
    def function(x):
        return (x * x.sum().item(),)

    for value in (1.0, 2.0, 3.0):
        x = torch.full((4,), value, device=DEVICE)
        (out,) = tape.plan_of("key").run("name", function, (x,))
        assert torch.equal(out, x * x.sum())
    assert not tapes(plans)


def test_operators_that_write_in_place_and_views(plans):
    def function(x):
        y = torch.zeros_like(x)
        y[1:] += x[:-1] * 2
        top, where = y.sort(dim=0, descending=True)
        return top.t(), where, torch.cat([y, x])[::2]

    for seed in range(3):
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)[seed : seed + 6]
        assert_same(tape.plan_of("key").run("name", function, (x,)), function(x))
    assert len(tapes(plans)) == 1
