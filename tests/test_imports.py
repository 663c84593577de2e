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
    """(module, name or None) of every import in a file, modules as paths from the root; what only types need is left out."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((module, alias.name) for alias in node.names)


def modules_of(path):
    """Every module that a file may import: `from package import x` may mean the module package.x."""
    for module, name in imports_of(path):
        yield module
        if name is not None:
            yield f"{module}.{name}"


def within(module, packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files(*patterns):
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    assert paths
    return paths


STANDARD = set(sys.stdlib_module_names)


def test_reference_imports_only_torch():
    for path in files("reference/**/*.py"):
        outside = {
            module for module in modules_of(path) if module.split(".")[0] not in STANDARD | {"torch", "reference"}
        }
        assert not outside, path


LIBRARY = "gcl_kernels"
REFERENCE = ("reference", f"{LIBRARY}.reference")
TRAINING = f"{LIBRARY}.training"
TORCH, TRITON = (f"{LIBRARY}.backends.{name}" for name in ("torch", "triton"))
LOSSES = tuple(f"{LIBRARY}.{name}" for name in ("losses", "row_losses", "clip", "views", "memory_bank"))
PRIMITIVES = tuple(f"{LIBRARY}.{name}" for name in ("lse", "ops", "fields"))
DISTRIBUTED = f"{LIBRARY}.distributed"


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        # the library stands without its oracle, its benchmarks, its tests and its harness
        ("gcl_kernels/**/*.py", (*REFERENCE, "bench", "tests")),
        ("gcl_kernels/**/*.py", (TRAINING,)),
        ("gcl_kernels/**/*.py", (f"{LIBRARY}.testing",)),
        # losses -> primitives -> backends, never upwards
        ("gcl_kernels/backends/**/*.py", (*LOSSES, *PRIMITIVES, DISTRIBUTED)),
        ("gcl_kernels/distributed/*.py", (*LOSSES, f"{LIBRARY}.lse", f"{LIBRARY}.fields")),
        # graphs.py alone makes operators, over ranks, of the ones that ops.py makes within a rank
        ("gcl_kernels/distributed/[!g]*.py", (*PRIMITIVES, f"{LIBRARY}.pointwise_ops")),
        ("gcl_kernels/*ops.py", (DISTRIBUTED,)),
        ("gcl_kernels/pairs.py", (*LOSSES, *PRIMITIVES, DISTRIBUTED, f"{LIBRARY}.backends", "triton")),
        ("gcl_kernels/lse.py", (*LOSSES, f"{LIBRARY}.fields", "triton")),
        ("gcl_kernels/ops.py", (*LOSSES, f"{LIBRARY}.lse", f"{LIBRARY}.fields", "triton")),
        ("gcl_kernels/fields.py", (*LOSSES, "triton")),
        # backends know nothing of one another, and what they share knows neither; `choice` imports by name, when it is used
        ("gcl_kernels/backends/torch/*.py", (TRITON, "triton")),
        ("gcl_kernels/backends/triton/*.py", (TORCH,)),
        ("gcl_kernels/backends/*.py", (TORCH, TRITON)),
        # a prediction needs no Triton
        ("gcl_kernels/plan/*.py", ("triton",)),
    ],
)
def test_import_directions(importer, forbidden):
    for path in files(importer):
        if within(module_name(path), forbidden):
            continue
        for module in modules_of(path):
            assert not within(module, forbidden), f"{path.relative_to(ROOT)} imports {module}"


def private_names(path):
    """(name, module of the library, not the file's own package) of every private name that a file imports or reads."""
    own = ".".join(module_name(path).split(".")[:2])
    imported = {}
    for module, name in imports_of(path):
        if within(module, (LIBRARY,)) and not within(module, (own,)):
            imported[name] = module
            yield from ((part, module) for part in (*module.split("."), name or "") if is_private(part))
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id in imported and is_private(node.attr):
            yield node.attr, f"{imported[node.value.id]}.{node.value.id}"


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("importer", ["gcl_kernels/plan/*.py", "gcl_kernels/training/*.py", "bench/**/*.py"])
def test_no_private_name_of_another_package_is_used(importer):
    for path in files(importer):
        for name, module in private_names(path):
            raise AssertionError(f"{path.relative_to(ROOT)} uses {name} of {module}")
