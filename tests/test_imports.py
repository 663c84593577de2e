"""What may import what, checked in fresh processes and in the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"  # None makes an import fail


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_works_with_nothing_but_torch():
    blocked = {"triton", "open_clip", "torchvision", "numpy", "hypothesis", "matplotlib", "PIL", "tqdm", "timm"}
    code = BLOCKED.format(names=blocked) + (
        "import torch, gcl_kernels, reference\n"
        "x = torch.randn(5, 3, requires_grad=True)\n"
        "gcl_kernels.gcl_loss(x, torch.randn(5, 3), 2.0).backward()\n"
        "assert x.grad.any()\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_library_imports_no_triton_and_no_harness():
    result = run(
        "import sys, gcl_kernels; bad = [m for m in sys.modules if m.split('.')[0] in ('triton', 'open_clip', 'hypothesis')"
        " or m.startswith('gcl_kernels.training')]; assert not bad, bad"
    )
    assert result.returncode == 0, result.stderr


def imports_of(path):
    """Top-level names of every import in a file, relative ones as paths from the root."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield ".".join(filter(None, (base, node.module)))


STANDARD = set(sys.stdlib_module_names)


def test_reference_imports_only_torch():
    for path in (ROOT / "reference").rglob("*.py"):
        outside = {name for name in imports_of(path) if name.split(".")[0] not in STANDARD | {"torch", "reference"}}
        assert not outside, path


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        ("gcl_kernels/**/*.py", ("reference", "bench", "tests")),
        ("gcl_kernels/*.py", ("gcl_kernels.training",)),
        ("gcl_kernels/backends/**/*.py", ("gcl_kernels.training", "gcl_kernels.lse", "gcl_kernels.losses")),
        ("gcl_kernels/lse.py", ("gcl_kernels.losses", "gcl_kernels.fields", "triton")),
        ("gcl_kernels/fields.py", ("gcl_kernels.losses", "triton")),
    ],
)
def test_import_directions(files, forbidden):
    paths = list(ROOT.glob(files))
    assert paths
    for path in paths:
        for name in imports_of(path):
            bad = [f for f in forbidden if name == f or name.startswith(f + ".")]
            assert not bad, f"{path.relative_to(ROOT)} imports {name}"
