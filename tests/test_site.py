"""The documentation site: it builds without a warning, every page has a place, and reading it needs no network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("mkdocs", "material", "mkdocstrings_handlers.python")


def is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def build(configuration, folder):
    absent = [tool for tool in TOOLS if not is_installed(tool)]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        configuration,
        "--site-dir",
        folder,
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_pattern_in_the_navigation_stands_for_pages_without_a_place():
    pytest.importorskip("mkdocs")
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs/_hooks.py")
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    nav = [{"Scale": ["grad*.md", {"GPUs": "many_gpus.md"}]}, {"Nothing": ["nothing*.md"]}, "api/r*.md", "[gm]*_*.md"]
    assert hooks.expanded(nav, set(hooks.pages_in(nav))) == [
        {"Scale": ["grad_cache.md", {"GPUs": "many_gpus.md"}]}, "api/reference.md", "api/rows.md"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}


def test_reading_it_needs_no_network(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preload|preconnect)\"?[^>]*href=\"?([^\"\s>]+)", text)
        loaded += re.findall(r"<link[^>]*href=\"?([^\"\s>]+)[^>]*rel=\"?(?:stylesheet|preload|preconnect)", text)
        assert loaded
        assert not [target for target in loaded if re.match(r"(https?:)?//", target)], path
        folders = {target: site if target.startswith("/") else path.parent for target in loaded}
        lost = [target for target in loaded if not (folders[target] / target.lstrip("/").split("?")[0]).exists()]
        assert not lost, path
    assert not re.search(r"@import|url\(.?(https?:)?//", (site / "site.css").read_text(encoding="utf-8"))


def test_the_reference_is_of_functions_and_classes(site):
    """A name that a module shares with what is in it means the module to the tool that reads the source."""
    for path in (site / "api").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert path.stem == "types" or "doc-symbol-function" in text or "doc-symbol-class" in text, path
        assert "doc-symbol-module" not in text, path


def test_nothing_private_is_published(site):
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".pyc", ".md")]
