"""False negatives by similarity, and biases, in `gcl_loss`: beside the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import GCLLoss, backends, gcl_loss, testing
from tests.oracle import run

margins, ratios = st.sampled_from((None, 0.0, 0.1, 0.5)), st.sampled_from((None, 0.5, 0.95, 1.2))


@given(
    problem=testing.problems(geometries=("random", "paired", "clustered")),
    options=testing.loss_options(),
    margin=margins,
    ratio=ratios,
    bias=st.booleans(),
)
def test_equal_to_the_reference(problem, options, margin, ratio, bias):
    batch = problem.build(torch.float64)
    options = {**options, "false_negative_margin": margin, "false_negative_ratio": ratio}
    if bias:
        options["rhs_bias"] = torch.randn(problem.m, generator=problem.generator(), dtype=torch.float64)
    if margin == 0.0 or ratio == 1.0 or problem.d == 1:  # the positive is at its own limit, and a copy of it beside it
        return
    with backends.settings(tile=(16, 16), debug=True):  # checks known upstream gradients
        actual = run(gcl_loss, batch, **options)
    for a, o in zip(actual, run(reference.gcl_loss, batch, **options), strict=True):
        torch.testing.assert_close(a, o, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["aggregate", "pairwise"])
def test_of_fields_some_of_which_are_absent(mode):
    g = torch.Generator().manual_seed(0)
    n, m, d = 14, 20, 6
    lhs = {name: torch.randn(n, d, generator=g, dtype=torch.float64) for name in "ab"}
    rhs = {name: torch.randn(m, d, generator=g, dtype=torch.float64) for name in "cd"}
    options = {
        "labels": torch.randint(-1, m, (n, 2), generator=g),
        "lhs_field_mask": torch.rand(n, 2, generator=g) > 0.3,
        "rhs_field_mask": torch.rand(m, 2, generator=g) > 0.3,
        "rhs_bias": torch.randn(m, generator=g, dtype=torch.float64),
        "label_smoothing": 0.1,
        "false_negative_margin": 0.1,
        "field_mode": mode,
    }
    sides = [*lhs.values(), *rhs.values()]
    for x in sides:
        x.requires_grad_()
    results = [
        testing.value_and_gradients(lambda loss=loss: loss(lhs, rhs, 9.0, **options), sides)
        for loss in (gcl_loss, reference.gcl_loss)
    ]
    for a, o in zip(*results, strict=True):
        torch.testing.assert_close(a, o, rtol=1e-9, atol=1e-9)
    plain = gcl_loss(lhs, rhs, 9.0, **{**options, "false_negative_margin": None})
    assert abs(float(results[0][0] - plain.detach())) > 1e-3  # something was hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_near_copy_of_the_positive_is_no_negative(dtype):
    """Two rows whose documents are nearly the same: with a margin each is trained as if it were alone."""
    x = torch.eye(4, 8)
    y = x.clone()
    y[1] = y[0] + 0.01 * torch.eye(8)[7]
    x[1] = x[0]
    x, y = x.to(dtype), y.to(dtype)
    labels = torch.arange(4)
    loss = gcl_loss(x, y, 20.0, labels=labels, false_negative_ratio=0.95, reduction="none")
    by_ids = gcl_loss(
        x,
        y,
        20.0,
        labels=labels,
        lhs_ids=torch.tensor([0, 0, 1, 2]),
        rhs_ids=torch.tensor([0, 0, 1, 2]),
        reduction="none",
    )
    torch.testing.assert_close(loss, by_ids)
    assert bool((loss[:2] < 1e-6).all())
    assert float(gcl_loss(x, y, 20.0, labels=labels)) > 0.3


@pytest.mark.parametrize(("margin", "ratio"), [(0.2, None), (None, 0.5), (0.2, 0.5), (0.02, 1.5), (0.02, 3.0)])
def test_either_limit_hides(margin, ratio):
    """A row whose positive has the similarity 0.4, with negatives of 0.1, 0.3, 0.5 and 0.7."""
    similarity = torch.tensor([0.4, 0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    x, y = (
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        torch.stack([similarity, torch.zeros(5, dtype=torch.float64)], dim=1),
    )
    loss = gcl_loss(x, y, 2.0, directions="lhs_to_rhs", false_negative_margin=margin, false_negative_ratio=ratio)
    limit = min(0.4 + (9 if margin is None else margin), 0.4 * (9 if ratio is None else ratio))
    seen = similarity[(similarity <= limit) | (similarity == 0.4)]
    assert len(seen) < 5
    torch.testing.assert_close(loss, (2 * seen).logsumexp(0) - 0.8)


def test_the_module_has_the_options():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(9, 4, generator=g), dim=1) for _ in range(2))
    scores, bias = torch.randint(1, 100, (9,), generator=g), torch.randn(9, generator=g)
    module = GCLLoss("linear", false_negative_margin=0.2, false_negative_ratio=0.9)
    assert "false_negative_margin=0.2, false_negative_ratio=0.9" in repr(module)
    expected = gcl_loss(
        x, y, 5.0, weights=scores.float(), rhs_bias=bias, false_negative_margin=0.2, false_negative_ratio=0.9
    )
    torch.testing.assert_close(module(x, y, scores, 5.0, rhs_bias=bias), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"false_negative_margin": -0.1}, "false_negative_margin: expected a number >= 0, got -0.1"),
        ({"false_negative_ratio": "0.95"}, "false_negative_ratio: expected a number, got str"),
        ({"rhs_bias": torch.zeros(3)}, r"rhs_bias: expected \(4,\), got \(3,\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gcl_loss(torch.eye(4), torch.eye(4), 1.0, **options)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_a_pair_at_its_own_limit_stays_finite(seed):
    """A margin of 0 and copies of positives: whichever way roundings fall, nothing overflows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)
    y = x[torch.randint(0, 40, (40,), generator=g)].requires_grad_()
    with backends.settings(tile=(16, 24)):
        loss = gcl_loss(x, y, 100.0, false_negative_margin=0.0, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), y)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 4 * 100 * 40
