import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gcl_kernels import aggregate_fields, testing


@given(
    n=st.sampled_from((1, 5, 17)),
    names=st.sampled_from((("a",), ("a", "b"), ("a", "b", "c"))),
    normalize_fields=st.booleans(),
    normalize=st.booleans(),
    masked=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(n, names, normalize_fields, normalize, masked, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    fields = {k: torch.randn(n, 6, generator=g).to(dtype).requires_grad_() for k in names}
    weights = {k: float(torch.rand((), generator=g)) + 0.01 for k in names}
    mask = torch.rand(n, len(names), generator=g) > 0.4 if masked else None
    options = {"mask": mask, "normalize_fields": normalize_fields, "normalize": normalize}
    exact = {k: v.detach().double().requires_grad_() for k, v in fields.items()}
    oracle = testing.value_and_gradients(
        lambda: reference.aggregate_fields(exact, weights, **options), list(exact.values())
    )
    dense = testing.value_and_gradients(
        lambda: reference.aggregate_fields(fields, weights, **options), list(fields.values())
    )
    actual = testing.value_and_gradients(lambda: aggregate_fields(fields, weights, **options), list(fields.values()))
    assert actual[0].dtype == dtype
    floor = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    testing.assert_as_accurate(actual, [dense], oracle, floor=floor)


def test_what_an_absent_field_holds_is_not_read():
    title, image = torch.randn(3, 4), torch.full((3, 4), math.nan)
    mask = torch.tensor([[True, False]] * 3)
    torch.testing.assert_close(
        aggregate_fields([title, image], [0.1, 0.9], mask=mask),
        torch.nn.functional.normalize(title),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_row_without_a_direction_is_zero_with_zero_gradient(monkeypatch):
    title = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], requires_grad=True)
    image = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    result = aggregate_fields([title, image], mask=mask)
    assert not result.any()
    result.sum().backward()
    assert title.grad is not None
    assert not title.grad.any()
    monkeypatch.setenv("GCL_KERNELS_DEBUG", "1")
    with pytest.raises(
        ValueError, match=r"fields: expected a non-zero aggregate in every row, got none in row 0 \(3 such\)"
    ):
        aggregate_fields([title, image], mask=mask)


def test_only_the_ratio_of_weights_matters():
    fields = {"a": torch.randn(5, 3), "b": torch.randn(5, 3)}
    torch.testing.assert_close(
        aggregate_fields(fields, {"b": 9.0, "a": 1.0}), aggregate_fields(list(fields.values()), [0.1, 0.9])
    )
    torch.testing.assert_close(aggregate_fields(fields), aggregate_fields(fields, [2.0, 2.0]))
