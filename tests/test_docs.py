"""What README.md, CHANGELOG.md and docs/ show is true: Python runs, commands parse, what is named or linked exists."""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from .test_package import PROJECT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n$")  # above a block that cannot run here, with the reason


def title(page):
    """Its path from docs/, or its name beside the README."""
    return page.relative_to(ROOT / "docs" if (ROOT / "docs") in page.parents else ROOT).as_posix()


def blocks(language):
    """Page, number of the first line and text of every fenced block in a language."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if not NOT_RUN.search(text[: match.start()]):
                line = text[: match.start(1)].count("\n")
                yield pytest.param(page, line, match[1], id=f"{title(page)}:{line + 1}")


def skip_without_harness():
    for package in ("open_clip", "PIL", "tqdm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from gcl_kernels.training.openclip import import_open_clip

    import_open_clip()  # a CPU-only torch beside PyPI's torchvision cannot import it otherwise


def skip_without_trainer(library):
    from gcl_kernels.integrations.importing import import_torchvision

    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # beside a CPU-only torch the libraries' import of it fails otherwise
    pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)


def example_names():
    """What examples of the losses take as given."""
    generator = torch.Generator().manual_seed(0)
    sides = ("image_features", "text_features", "query", "title", "image")
    names = {name: F.normalize(torch.randn(6, 8, generator=generator), dim=1) for name in sides}
    names["logit_scale"] = torch.tensor(14.3)
    names["scores"] = torch.tensor([1.0, 20.0, 40.0, 60.0, 80.0, 100.0])
    names["query_ids"] = torch.tensor([0, 0, 1, 2, 3, 3])
    names["has_field"] = torch.tensor([[True, True]] * 5 + [[False, True]])
    return names


def guide_files(folder):
    """What the guide's example of a search reads: a corpus and a checkpoint of the demo's model."""
    from PIL import Image

    from gcl_kernels.training.openclip import create_model

    documents = folder / "demo_output" / "glyphs"
    documents.mkdir(parents=True)
    Image.new("RGB", (32, 32), "white").save(documents / "alpha.png")
    corpus = {name: {"title": f"greek small {name}", "image": "alpha.png"} for name in ("alpha", "beta")}
    (documents / "zero_shot.json").write_text(json.dumps(corpus))
    checkpoints = folder / "logs" / "first" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(create_model("ViT-Tiny-8-32px")[0].state_dict(), checkpoints / "best.pt")


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory):
    """The names of each page: a block sees what the blocks before it have made."""
    group = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
    distributed.init_process_group("gloo", init_method=group, rank=0, world_size=1)  # "Many GPUs" runs as one process
    yield {title(page): example_names() for page in PAGES}
    distributed.destroy_process_group()


@pytest.mark.parametrize(("page", "line", "code"), list(blocks("python")))
def test_python_runs(page, line, code, namespaces, tmp_path, monkeypatch):
    if re.search(r"open_clip|gcl_kernels\.training", code):
        skip_without_harness()
    for library in re.findall(r"^(?:from|import) (transformers|lightning|accelerate)\b", code, re.MULTILINE):
        skip_without_trainer(library)
    monkeypatch.chdir(tmp_path)
    if title(page) == "guide.md":
        guide_files(tmp_path)
    names = namespaces[title(page)]
    names.pop("loss", None)
    exec(compile("\n" * line + code, page, "exec"), names)  # a traceback names the page's own line
    if "loss = " in code:
        assert names["loss"].shape == ()
        assert math.isfinite(names["loss"].detach())


def test_the_readme_s_first_two_examples_give_the_same_loss():
    skip_without_harness()
    losses = []
    for block in list(blocks("python"))[:2]:
        names = example_names()
        exec(block.values[2], names)
        losses.append(names["loss"])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("page", "line", "text"), list(blocks("json")))
def test_json_is_json(page, line, text):
    json.loads(text)


def prose(page):
    """The page without its fenced blocks and without what is generated between marks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!-- figures.*?<!-- end figures -->", "", text, flags=re.DOTALL)


def inline_code(page):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands():
    """Page and words of every command: indented lines, joined where they go on, and inline code."""
    for page in PAGES:
        joined = re.sub(r"\\\n\s*", "", prose(page))
        indented = re.findall(r"^    (\S.*)$", joined, re.MULTILINE)
        for code in indented + inline_code(page):
            if re.match(r"(python|torchrun|gcl-\w+|make|pip)( |$)", code):
                yield pytest.param(shlex.split(code, comments=True), id=f"{title(page)}: {code[:60]}")


class Parsed(BaseException):
    """Raised in place of what a command does once its arguments are read."""


@cache
def parser_of(module):
    """The parser that a module's `main` makes."""
    if importlib.util.find_spec(f"{module}.__main__" if is_package(module) else module) is None:
        pytest.fail(f"there is no module {module}")
    return parser_made_by(importlib.import_module(f"{module}.__main__" if is_package(module) else module).main, module)


def parser_made_by(function, program, *arguments):
    """The parser that a function makes; reading the command line with it ends the function."""
    read = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, *arguments):
        if not parser.add_help:  # one that only looks for --config first
            return read(parser, *arguments)
        raise Parsed(parser)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        mock.patch.object(sys, "argv", [program]),
        pytest.raises(Parsed) as parsed,
    ):
        function(*arguments)
    return parsed.value.args[0]


def is_package(module):
    specification = importlib.util.find_spec(module)
    return specification is not None and specification.submodule_search_locations is not None


def module_of(words):
    """Module and arguments of `python -m MODULE`, of torchrun or of an installed command; None of any other command."""
    if words[0] in PROJECT["scripts"]:
        return PROJECT["scripts"][words[0]].split(":")[0].removesuffix(".__main__"), words[1:]
    if words[0] in ("python", "torchrun") and "-m" in words:
        place = words.index("-m")
        return words[place + 1], words[place + 2 :]
    return None


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_takes_its_arguments(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        assert set(extras) <= set(PROJECT["optional-dependencies"])
    elif any(word.startswith("gcl_kernels.training") for word in (PROJECT["scripts"].get(words[0], ""), *words)):
        skip_without_harness()
    module, arguments = module_of(words) or (None, [])
    if module is None:
        return
    if not arguments:
        assert importlib.util.find_spec(module)
        return
    parser = parser_of(module)
    known = set(parser._option_string_actions)
    if module == "gcl_kernels.training.experiments":
        known |= set(parser_of("gcl_kernels.training")._option_string_actions)  # it hands them to every run
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known
    if "..." not in arguments:
        with mock.patch.object(parser, "error", side_effect=ValueError):  # instead of leaving the process
            parser.parse_known_args(arguments)


HARNESS = tuple(
    f"gcl_kernels.training{name}"
    for name in ("", ".evaluate", ".experiments", ".export", ".report", ".search", ".serve", ".split")
)


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_options_that_are_named_exist(page):
    named = {code.split()[0].split("=")[0] for code in inline_code(page) if code.startswith("--")}
    if named:
        skip_without_harness()
    others = ("gcl_kernels.plan", "gcl_kernels.testing", "bench")
    known = {option for module in (*HARNESS, *others) for option in parser_of(module)._option_string_actions}
    if title(page) == "open_clip.md":
        params = importlib.import_module("open_clip_train.params")
        known |= set(parser_made_by(params.parse_args, "open_clip_train", [])._option_string_actions)
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_modules_that_are_named_exist(page):
    for code in inline_code(page):
        code = code.replace("gcl_kernels.reference", "reference")  # its name in a checkout
        if re.fullmatch(r"(gcl_kernels|reference|bench)(\.\w+)*", code):
            module, _, attribute = code.rpartition(".")
            found = module and hasattr(importlib.import_module(module), attribute)
            assert found or importlib.util.find_spec(code), code


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_tables_of_the_findings_are_those_that_the_runs_wrote():
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs/results.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    assert set(rows) <= set((ROOT / "docs/result_tables.md").read_text().splitlines())


def test_the_runs_find_where_to_write_their_tables():
    text = (ROOT / "docs/result_tables.md").read_text()
    for section in ("", ": sigmoid"):
        begin, end = f"\n<!-- experiments{section} -->\n", f"\n<!-- end experiments{section} -->\n"
        assert text.count(begin) == text.count(end) == 1
        assert 0 < text.index(begin) < text.index(end)


@cache
def messages():
    """Every string of the library's source, with … in the place of what is put into it."""
    found = []
    for path in (ROOT / "gcl_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            found += [text] if len(text) > 10 else []
    return found


HEADINGS = re.findall(
    r"^### `([^`]*expected[^`]*|gcl_kernels [^`]*)`", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("heading", HEADINGS)
def test_messages_that_are_explained_are_those_of_the_library(heading):
    words = re.sub(r"^[\w…]+: ", "", heading)  # without the argument, which may be one of several
    pattern = ".*".join(re.escape(part) for part in words.split("…"))
    assert any(re.search(pattern, message, re.DOTALL) for message in messages())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
