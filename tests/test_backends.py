"""Which backend is chosen, why, and what is said where Triton does not work."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from gcl_kernels import backends
from gcl_kernels.backends import choice

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def triton_that(tmp_path):
    """Runs code in a process whose `import triton` finds a module with this source; returns what it printed."""

    def run(source, code):
        (tmp_path / "triton.py").write_text(source)
        path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


BROKEN = {
    "too old": ("__version__ = '3.4.0'", "Triton 3.4.0 is too old, 3.5 is the lowest that works"),
    "broken": ("import no_such_module", "Triton cannot be imported (No module named 'no_such_module')"),
    "raises": ("raise OSError('libcuda.so.1')", "Triton cannot be imported (OSError: libcuda.so.1)"),
    "exits": ("raise SystemExit('no driver')", "Triton cannot be imported (SystemExit: no driver)"),
    "without a version": ("pass", "Triton cannot be imported (AttributeError"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_triton_that_does_not_work_gives_torch_and_one_warning_that_says_why(triton_that, source, reason):
    out = triton_that(
        source,
        "import torch, warnings\n"
        "from gcl_kernels import backends\n"
        "cuda = torch.device('cuda')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [backends.choose(None, cuda, torch.bfloat16) for _ in range(3)]\n"
        "print(names, len(seen), seen[0].message)\n"
        "try:\n"
        "    backends.choose('triton', cuda, torch.bfloat16)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "from gcl_kernels import env\n"
        "print('report', *env.report(), sep='\\n')\n",
    )
    warning, refusal, report = out.split("\n", 2)
    assert warning.startswith("['torch', 'torch', 'torch'] 1 gcl_kernels takes the slower backend 'torch'")
    assert refusal.startswith("backend: expected one that can take these tensors, got 'triton': ")
    for text in (warning, refusal, report):
        assert reason in text


def test_nothing_is_said_where_triton_would_not_be_the_choice(triton_that):
    out = triton_that(
        "import no_such_module",
        "import torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "from gcl_kernels import backends, gcl_loss\n"
        "gcl_loss(torch.randn(5, 3), torch.randn(5, 3), 2.0)\n"
        "print(backends.choose_with_reason(None, torch.device('cuda'), torch.float64))",
    )
    assert out.startswith("('torch', 'its tiles are float32")


def test_the_default_follows_device_and_dtype(monkeypatch):
    for reason in (None, "it is broken"):
        monkeypatch.setattr(choice, "why_not_triton", lambda reason=reason: reason)
        choice._warn_of_fallback.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert backends.choose(None, CPU, torch.float32) == "torch"
            assert backends.choose(None, CUDA, torch.bfloat16) == ("torch" if reason else "triton")
            assert backends.choose(None, CUDA, torch.float64) == "torch"
    choice._warn_of_fallback.cache_clear()


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("cuda", CPU, torch.float32, "expected None or one of 'torch', 'triton', got 'cuda'"),
        ("triton", CPU, torch.float64, "got 'triton': its tiles are float32"),
        ("triton", torch.device("mps"), torch.float32, "got 'triton': it takes CUDA and HIP tensors, not one on mps"),
    ],
)
def test_a_backend_asked_for_by_name_never_falls_back(name, device, dtype, message, monkeypatch):
    monkeypatch.setattr(choice, "why_not_triton", lambda: None)
    with pytest.raises(ValueError, match=f"backend: .*{message}"):
        backends.choose(name, device, dtype)


def test_settings_nest_and_end():
    from gcl_kernels.backends.settings import current

    before = current()
    with backends.settings(tile=(16, 8), workspace_mib=0.5):
        assert backends.workspace_bytes() == 2**19
        with backends.settings(workspace_mib=1):
            assert (current().tile, backends.workspace_bytes()) == ((16, 8), 2**20)
        assert backends.workspace_bytes() == 2**19
    assert current() is before


def test_the_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "3")
    assert backends.workspace_bytes() == 3 * 2**20
    with backends.settings(workspace_mib=0):
        assert backends.workspace_bytes() == 0


def test_a_device_without_half_precision_products_is_told_so_once(monkeypatch):
    from gcl_kernels.backends import products

    products.way.cache_clear()
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options)
    )  # there is no such device
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [products.way("cuda", torch.bfloat16) for _ in range(2)] == ["widen", "widen"]
    products.way.cache_clear()
    assert len(seen) == 1
    assert "no product of torch.bfloat16 with float32 results on cuda devices" in str(seen[0].message)


@pytest.mark.parametrize("first", [True, False])
def test_products_of_half_precision_are_added_up_in_float32(first):
    from gcl_kernels.backends.products import add_product, product

    a, b = torch.randn(9, 4).to(torch.bfloat16), torch.randn(4, 7).to(torch.bfloat16)
    total = torch.full((9, 7), torch.nan if first else 1.0)
    add_product(total, a, b, first)
    torch.testing.assert_close(total, a.float() @ b.float() + (0 if first else 1))
    torch.testing.assert_close(product(a, b, torch.empty(9, 7)), a.float() @ b.float())
