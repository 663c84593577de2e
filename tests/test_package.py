"""What is installed: the packages, the versions they declare, the commands."""

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]


def test_every_package_of_the_library_is_installed():
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "gcl_kernels").rglob("__init__.py")]
    expected = sorted([".".join(folder.parts) for folder in folders] + ["gcl_kernels.reference"])
    assert sorted(CONFIGURATION["tool"]["setuptools"]["packages"]) == expected


def test_the_reference_works_under_the_name_it_is_installed_as(monkeypatch):
    folder = ROOT / CONFIGURATION["tool"]["setuptools"]["package-dir"]["gcl_kernels.reference"]
    for name in [name for name in sys.modules if name.startswith("gcl_kernels.reference")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "reference", None)  # as where it is installed: no such package
    specification = importlib.util.spec_from_file_location("gcl_kernels.reference", folder / "__init__.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "gcl_kernels.reference", module)
    specification.loader.exec_module(module)
    assert module.gcl_loss.__module__ == "gcl_kernels.reference.dense"


def lower_bounds(requirements):
    """{package: version} of every `package>=version`."""
    matches = (re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in matches if match}


def test_the_lowest_versions_are_those_that_are_tested():
    """`make lowest` installs what pyproject.toml promises to work with, no later release of it."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements-lowest.txt").read_text(), re.MULTILINE))
    extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    bounds = lower_bounds(PROJECT["dependencies"] + extras)
    assert {"torch", "triton", "open_clip_torch"} <= set(bounds)
    for package, lowest in bounds.items():
        assert re.fullmatch(rf"{re.escape(lowest)}(\.0)*", pins[package]), package


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_a_command_is_a_function_that_needs_no_argument(command):
    name, function = PROJECT["scripts"][command].split(":")
    if name.startswith("gcl_kernels.training"):
        pytest.importorskip("PIL")
        pytest.importorskip("tqdm")
    parameters = inspect.signature(getattr(importlib.import_module(name), function)).parameters.values()
    assert all(parameter.default is not parameter.empty for parameter in parameters)
