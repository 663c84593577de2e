"""The API reference: every public name has a place in it, and every parameter a type and an explanation."""

import importlib
import importlib.util
import inspect
import re
import typing
from functools import cache
from pathlib import Path

import pytest

import gcl_kernels
from gcl_kernels import types

ROOT = Path(__file__).parents[1]
MODULES = {  # and the package that each needs
    "gcl_kernels": "torch",
    "gcl_kernels.grad_cache": "torch",
    "gcl_kernels.testing": "hypothesis",
    "gcl_kernels.integrations.open_clip": "open_clip",
    "gcl_kernels.integrations.sentence_transformers": "sentence_transformers",
    "gcl_kernels.integrations.transformers": "transformers",
    "reference": "torch",
}
PAGES = sorted((ROOT / "docs/api").glob("*.md"))
LISTED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def public(module):
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    for name in names:
        value = getattr(module, name)
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


@cache
def module_of(name):
    package = MODULES.get(name, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if (
        package in ("open_clip", "sentence_transformers", "transformers")
        and importlib.util.find_spec("open_clip") is not None
    ):
        from gcl_kernels.training.openclip import import_open_clip

        import_open_clip()  # a CPU-only torch beside PyPI's torchvision cannot import either otherwise
    return importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_listed(name):
    if name == "gcl_kernels.grad_cache":
        assert f"{name}.cached" in LISTED
        return
    for short, value in public(module_of(name)):
        if name == "reference" and is_tuple(value):
            continue
        assert {f"{name}.{short}", f"{value.__module__}.{short}"} & set(LISTED), short


def is_tuple(value):
    return inspect.isclass(value) and issubclass(value, tuple)


def explained(name, doc):
    """Whether a docstring has an entry for a parameter, or speaks of it in backticks."""
    return re.search(rf"^\s*{name}: \S|`{name}\b", doc, re.MULTILINE)


def faults(name, value, more=""):
    """What a function or class lacks: a docstring, types of its parameters and result, explanations there or in `more`."""
    doc = (inspect.getdoc(value) or "") + more
    if not inspect.getdoc(value):
        yield f"{name} has no docstring"
    for parameter in inspect.signature(value).parameters.values():
        if parameter.annotation is parameter.empty and not is_tuple(value):
            yield f"{name}: {parameter.name} has no type"
        if not explained(parameter.name.lstrip("*"), doc):
            yield f"{name}: {parameter.name} is not explained"
    if inspect.isfunction(value) and inspect.signature(value).return_annotation is inspect.Signature.empty:
        yield f"{name}: the result has no type"


def methods(name, value):
    for short, member in vars(value).items() if inspect.isclass(value) else ():
        if inspect.isfunction(member) and not short.startswith("_"):
            yield f"{name}.{short}", member


def without_self(function):
    """A function with a method's other parameters."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@pytest.mark.parametrize("name", LISTED)
def test_every_parameter_has_a_type_and_an_explanation(name):
    module, _, short = name.rpartition(".")
    value = getattr(module_of(module), short)
    # The arguments of the dense reference are those of the library's function of the same name, as its page says.
    same = getattr(gcl_kernels, short, None) if module == "reference" else None
    found = list(faults(name, value, inspect.getdoc(same) or ""))
    for method, member in methods(name, value):
        doc = inspect.getdoc(member) or ""
        found += [f"{method} has no docstring"] * (not doc)
        for parameter in without_self(member).parameters.values():
            if parameter.annotation is parameter.empty:
                found.append(f"{method}: {parameter.name} has no type")
            if not explained(parameter.name, doc):
                found.append(f"{method}: {parameter.name} is not explained")
    assert not found, "\n".join(found)


def test_a_parameter_without_an_explanation_is_found():
    def function(x: int, y: int, z):
        """Adds.

        Args:
            x: a number.
        """

    assert list(faults("f", function)) == [
        "f: y is not explained", "f: z has no type", "f: z is not explained", "f: the result has no type"
    ]  # fmt: skip


def test_the_page_of_types_names_every_value():
    text = (ROOT / "docs/api/types.md").read_text()
    literals = {name: value for name, value in vars(types).items() if typing.get_origin(value) is typing.Literal}
    assert len(literals) > 5
    for name, value in literals.items():
        values = ", ".join(f'`"{choice}"`' for choice in typing.get_args(value))
        assert f"| `{name}` | {values} |" in text
