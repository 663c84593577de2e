"""Matrix products on a CPU: which are chosen, that each is right, and that each path of the backend is."""

import pytest
import torch

from gcl_kernels import ClipLoss, backends, gcl_loss, reference
from gcl_kernels.backends import cpu, products
from gcl_kernels.pairs import Pairs
from gcl_kernels.testing import relative_error
from tests.counting import LargestTensor, Products

onednn = pytest.mark.skipif(not cpu.has_onednn(), reason="this torch has no oneDNN product")
ZEN5 = {"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx2 avx512f avx512_bf16"}


@pytest.fixture
def machine(monkeypatch):
    """Sets what Linux says about the processor, and clears what was found out about this one."""
    for name in cpu.VARIABLES.values():
        monkeypatch.delenv(name, raising=False)

    def clear():
        for rule in (cpu.best_float32, cpu.best_bfloat16, cpu.linear):
            rule.cache_clear()

    def of(capability="AVX512", mkl=True, onednn=True, **about):
        clear()
        monkeypatch.setattr(cpu, "processor", lambda: about)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)

    yield of
    clear()


def zen5(**other):
    return {**ZEN5, **other}


@onednn
@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (zen5(), ("onednn", "native")),
        (zen5(capability="AVX2"), ("mm", "native")),
        (zen5(mkl=False), ("mm", "native")),
        (zen5(onednn=False), ("mm", "widen")),
        ({**ZEN5, "cpu family": "25"}, ("mm", "native")),
        ({**ZEN5, "cpu family": "23", "flags": "avx2", "capability": "AVX2"}, ("mm", "widen")),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "flags": "avx512f amx_bf16"}, ("mm", "native")),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "flags": "avx512f"}, ("mm", "widen")),
        ({}, ("mm", "widen")),
    ],
)
def test_the_machine_decides(about, expected, machine):
    machine(**about)
    assert (cpu.float32_products(), cpu.bfloat16_products()) == expected


@onednn
def test_the_environment_overrides_the_machine(machine, monkeypatch):
    machine(**ZEN5)
    monkeypatch.setenv("GCL_KERNELS_CPU_PRODUCTS", "mm")
    monkeypatch.setenv("GCL_KERNELS_CPU_BFLOAT16", "widen")
    assert (cpu.float32_products(), cpu.bfloat16_products()) == ("mm", "widen")
    with backends.settings(cpu_products="onednn", cpu_bfloat16="native"):
        assert (cpu.float32_products(), cpu.bfloat16_products()) == ("onednn", "native")


@pytest.mark.parametrize("variable", ["GCL_KERNELS_CPU_PRODUCTS", "GCL_KERNELS_CPU_BFLOAT16"])
def test_an_unknown_way_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(ValueError, match=f"{variable}: expected '.*' or '.*', got 'fast'"):
        ClipLoss()(torch.ones(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), torch.tensor(1.0))


def test_without_the_operator_torch_mm_is_taken(machine, monkeypatch):
    machine(**ZEN5)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert cpu.float32_products() == "mm"
    with backends.settings(cpu_products="onednn"), pytest.raises(ValueError, match="CPU_PRODUCTS: expected 'mm'"):
        cpu.float32_products()
    torch.testing.assert_close(gcl_loss(torch.eye(2), torch.eye(2), 1.0), torch.log(1 + torch.exp(torch.tensor(-1.0))))


def test_a_processor_that_cannot_be_asked_is_unknown(monkeypatch):
    cpu.processor.cache_clear()
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert cpu.processor() == {}
    cpu.processor.cache_clear()


def layouts(rows, cols):
    """One (rows, cols) matrix in several layouts of memory."""
    x = torch.randn(rows, cols)
    apart = torch.full((rows, cols + 16), torch.nan)
    apart[:, :cols] = x
    thin = torch.full((rows, 3 * cols), torch.nan)
    thin[:, ::3] = x
    upright = torch.full((cols, rows + 16), torch.nan)
    upright[:, :rows] = x.t()
    return x, [x, apart[:, :cols], thin[:, ::3], x.t().contiguous().t(), upright[:, :rows].t()]


@onednn
@pytest.mark.parametrize("terms", [None, 8])
@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 7, 9), (5, 1, 9), (5, 7, 1), (1, 1, 1), (1, 64, 1), (33, 16, 17)])
def test_every_layout_gives_the_product(shape, terms):
    rows, inner, cols = shape
    (a, lefts), (b, rights) = layouts(rows, inner), layouts(inner, cols)
    exact = a.double() @ b.double()
    for left in lefts:
        for right in rights:
            got = products.onednn_product(left, right, terms)
            assert (got.shape, got.dtype) == (exact.shape, torch.float32)
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@onednn
def test_no_row_and_no_column():
    assert products.onednn_product(torch.ones(0, 3), torch.ones(3, 2)).shape == (0, 2)
    assert products.onednn_product(torch.ones(2, 0), torch.ones(0, 2)).tolist() == [[0, 0], [0, 0]]


@onednn
def test_long_sums_are_as_exact_as_those_of_torch():
    """One accumulator a sum would err 1.7 times as much at D = 512 and 2.2 times at 4,096."""
    for d in (512, 4096):
        a, b = torch.randn(128, d), torch.randn(d, 128)
        exact = a.double() @ b.double()
        parts = products.onednn_product(a, b, products.TERMS)
        assert relative_error(parts, exact) <= 3.2e-7
        assert relative_error(products.onednn_product(a, b), exact) <= 1e-6


@onednn
def test_the_precision_that_is_set_is_followed_as_torch_mm_does():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    before = torch.get_float32_matmul_precision()
    exact = a.double() @ b.double()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            dense = relative_error(a @ b, exact)
            assert relative_error(products.onednn_product(a, b, products.TERMS), exact) <= 2 * dense
    finally:
        torch.set_float32_matmul_precision(before)


def drawn(n, m, d, dtype):
    """Rows in groups of four that are near one another, positives at a cosine of 0.5: a softmax of many terms."""
    unit = torch.nn.functional.normalize
    x = unit(torch.randn(-(-n // 4), d).repeat_interleave(4, 0)[:n] + torch.randn(n, d))
    y = torch.cat([unit(x + 1.7 * unit(torch.randn(n, d))), unit(torch.randn(m - n, d))])
    return [v.to(dtype).requires_grad_() for v in (x, y)] + [torch.tensor(30.0, requires_grad=True)]


def results(loss, inputs):
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


WAYS = [("mm", "widen"), ("mm", "native"), pytest.param(("onednn", "widen"), marks=onednn)]
WAYS.append(pytest.param(("onednn", "native"), marks=onednn))


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("workspace_mib", [0, 256])
@pytest.mark.parametrize("directions", ["both", "rhs_to_lhs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_way_is_as_exact_as_dense(ways, workspace_mib, directions, dtype):
    inputs = drawn(60, 75, 600, dtype)
    exact = results(
        lambda x, y, s: reference.gcl_loss(x, y, s, directions=directions),
        [v.detach().double().requires_grad_() for v in inputs],
    )
    dense = results(lambda x, y, s: reference.gcl_loss(x, y, s.to(x.dtype), directions=directions), inputs)
    with backends.settings(cpu_products=ways[0], cpu_bfloat16=ways[1], tile=(16, 24), workspace_mib=workspace_mib):
        got = results(lambda x, y, s: gcl_loss(x, y, s, directions=directions), inputs)
        again = results(lambda x, y, s: gcl_loss(x, y, s, directions=directions), inputs)
    for a, b in zip(got, again, strict=True):
        assert torch.equal(a, b)
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    for g, d, e in zip(got, dense, exact, strict=True):
        assert relative_error(g, e) <= 1.25 * relative_error(d, e) + floor


@onednn
def test_no_larger_tensor_and_no_more_work_by_onednn():
    x, y = torch.randn(96, 32), torch.randn(160, 32)
    cost = []
    for way in ("mm", "onednn"):
        with backends.settings(cpu_products=way, tile=(32, 64)), Products() as flops, LargestTensor() as largest:
            run = backends.load("torch").forward_with_gradient
            ones = torch.ones(96, dtype=torch.float64), torch.ones(160, dtype=torch.float64)
            run(
                Pairs.of(x, y, torch.tensor(0.1)),
                backends.Lines(*ones, -2 * ones[0][:, None]),
                backends.Need(True, True, True),
            )
        cost.append((flops.flops, largest.numel))
    assert cost[0][0] == cost[1][0] == 6 * 96 * 160 * 32
    assert cost[1][1] <= cost[0][1]
