"""aggregate_fields by its fused kernels: against the float64 reference, and where it must not look or write."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import aggregate_fields, backends, gcl_loss, testing
from tests.oracle import DTYPES

from .conftest import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the zero norms that are then not taken


def run(fields, options, backend="triton"):
    return testing.value_and_gradients(lambda: aggregate_fields(fields, **options, backend=backend), fields)


def by_name(fields, options):
    names = [str(f) for f in range(len(fields))]
    weights = dict(zip(names, options["weights"], strict=True))
    return dict(zip(names, fields, strict=True)), {**options, "weights": weights}


def run_reference(fields, options, dtype):
    fields = [x.detach().to(dtype).requires_grad_() for x in fields]
    named, options = by_name(fields, options)
    return testing.value_and_gradients(lambda: reference.aggregate_fields(named, **options), fields)


@given(problem=testing.field_problems(sizes=(1, 2, 5, 9)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_as_accurate_as_dense_pytorch(problem, dtype):
    fields, options = problem.build(dtype, DEVICE)
    actual = run(fields, options)
    assert all(v.dtype == dtype for v in actual)
    dense = [run_reference(fields, options, dtype), run(fields, options, "torch")]
    testing.assert_as_accurate(actual, dense, run_reference(fields, options, torch.float64))


@given(problem=testing.field_problems(sizes=(5, 9), dims=(1, 16, 33)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=6)
def test_what_is_absent_or_past_the_end_is_not_read(problem, dtype):
    """NaN there, and in every buffer handed out uninitialised, changes no bit. (Around the numbers there is NaN already.)"""
    problem = dataclasses.replace(problem, masked=True)
    fields, options = problem.build(dtype, DEVICE)
    plain = run(fields, options)
    with torch.no_grad():
        for f, x in enumerate(fields):
            x[~options["mask"][:, f]] = math.nan
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *args, **kwargs):
        x = new_empty(self, *args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_nan)
        same = run(fields, options)
    for a, b in zip(plain, same, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_a_row_without_a_direction_is_zero_with_zero_gradient():
    title = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], device=DEVICE, requires_grad=True)
    image = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 0.0]], device=DEVICE, requires_grad=True)
    mask = torch.tensor([[True, True], [True, True], [False, False]], device=DEVICE)
    out, *gradients = run([title, image], {"weights": None, "mask": mask})
    assert not out.any()
    assert not any(v.any() for v in gradients)


def test_a_nan_in_a_field_that_is_there_shows():
    x, y = torch.randn(3, 5, device=DEVICE), torch.randn(3, 5, device=DEVICE)
    x[1, 2] = math.nan
    out = aggregate_fields([x, y], backend="triton")
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_an_absent_field_gets_no_gradient_even_of_a_bad_row():
    x, y = (torch.randn(3, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False], [True, True], [False, True]], device=DEVICE)
    aggregate_fields([x, y], mask=mask, backend="triton").backward(torch.full((3, 5), math.nan, device=DEVICE))
    for f, v in enumerate((x, y)):
        assert v.grad is not None
        assert not v.grad[~mask[:, f]].any()
        assert v.grad[mask[:, f]].isnan().all()


@given(problem=testing.field_problems(sizes=(5,), dims=(33,)), frozen=st.sets(st.integers(0, 7)))
@settings(max_examples=5)
def test_a_frozen_field_gets_nothing_and_changes_nothing(problem, frozen):
    fields, options = problem.build(torch.float32, DEVICE)
    _, *expected = run(fields, options)
    for f, x in enumerate(fields):
        x.requires_grad_(f not in frozen)
    total = aggregate_fields(fields, **options, backend="triton")
    assert total.requires_grad == any(x.requires_grad for x in fields)
    if not total.requires_grad:
        return
    # the upstream gradient of `testing.value_and_gradients`
    upstream = torch.rand(total.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    total.backward(upstream.to(DEVICE))
    for f, (x, g) in enumerate(zip(fields, expected, strict=True)):
        assert x.grad is None if f in frozen else torch.equal(x.grad, g)


def test_autocast_changes_nothing():
    fields = [torch.randn(3, 5, device=DEVICE) for _ in range(2)]
    plain = aggregate_fields(fields, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(aggregate_fields(fields, backend="triton"), plain)


@pytest.mark.parametrize(("masked", "normalize"), [(False, False), (True, True)])
def test_the_operator_passes_opcheck(masked, normalize):
    fields = [torch.randn(5, 6, device=DEVICE, requires_grad=f != 1) for f in range(3)]
    mask = torch.rand(5, 3, device=DEVICE) > 0.3 if masked else None
    arguments = fields, mask, [0.2, 0.3, 0.5], [normalize, normalize], "triton"
    torch.library.opcheck(torch.ops.gcl_kernels.aggregate_fields.default, arguments)


def test_compiles_to_one_graph():
    encoder = torch.nn.Linear(6, 16, device=DEVICE)

    def loss(x, y, scale, mask):
        sides = {"query": encoder(x)}, {"image": encoder(y), "title": encoder(x + y)}
        return gcl_loss(
            *sides, scale, rhs_field_weights={"image": 0.9, "title": 0.1}, rhs_field_mask=mask, backend="triton"
        )

    x, y = torch.randn(9, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    mask = torch.rand(9, 2, device=DEVICE) > 0.3
    inputs = [scale, *encoder.parameters()]
    expected = torch.autograd.grad(loss(x, y, scale, mask), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y, scale, mask), inputs), expected)
    torch.compiler.reset()


def test_a_loss_of_fields_follows_the_torch_backend():
    fields = {k: torch.randn(7, 20, device=DEVICE, requires_grad=True) for k in ("image", "title")}
    query = torch.randn(7, 20, device=DEVICE)
    losses = [gcl_loss({"query": query}, fields, 5.0, backend=name) for name in ("triton", "torch")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(v, list(fields.values())) for v in losses), rtol=1e-5, atol=1e-6)


def test_a_second_backward_through_the_gradient_is_refused():
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(aggregate_fields([x], backend="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="aggregate_fields: expected one backward pass"):
        g.sum().backward()


def test_what_no_kernel_takes_is_refused_by_name_and_goes_to_torch_without():
    wide = [torch.randn(2, 8193, device=DEVICE)]
    with pytest.raises(
        ValueError, match=r"fields: expected at most 4 fields of D <= 8192 .* got 1 of D = 8193; backend 'torch'"
    ):
        aggregate_fields(wide, backend="triton")
    with pytest.raises(ValueError, match=r"backend: .* bfloat16, float16 and float32, not float64"):
        aggregate_fields([torch.randn(2, 3, device=DEVICE, dtype=torch.float64)], backend="triton")
    assert aggregate_fields(wide).shape == (2, 8193)
    gpu, half = torch.device("cuda"), torch.bfloat16
    for n_fields, d, expected in ((4, 8192, "triton"), (5, 4096, "triton"), (5, 8192, "torch"), (9, 16, "torch")):
        assert backends.choose_for_fields(None, gpu, half, n_fields, d) == expected
        assert backends.choose_for_fields("triton", gpu, half, n_fields, d) == "triton"
    assert backends.choose_for_fields(None, gpu, torch.float64, 2, 16) == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or HIP device")
def test_no_host_synchronisation():
    fields = [torch.randn(300, 64, device=DEVICE, requires_grad=True) for _ in range(2)]
    mask = torch.rand(300, 2, device=DEVICE) > 0.3
    run(fields, {"weights": [0.9, 0.1], "mask": mask})  # compiles, which may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        aggregate_fields(fields, [0.8, 0.2], mask=mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
