"""What mkdocs.yml cannot say: patterns in the navigation, pages and links outside docs/, no script from a network."""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

PAGES = {"bench/README.md": "measurements.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site that stand elsewhere in the repository."""

NETWORK, HERE = "https://unpkg.com/iframe-worker/shim", "vendor/iframe-worker.js"
"""What the theme would fetch to search in a page opened from a disk, and our copy of it."""


def on_config(config):
    config.nav = expanded(config.nav, set(pages_in(config.nav)))
    return config


def expanded(entries, named):
    """The entries; in the place of a pattern the pages that match it and have no place yet; no section without a page."""
    result = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, below),) = entry.items()
            below = expanded(below, named) if isinstance(below, list) else below
            result += [{title: below}] if below else []
        elif "*" in entry:
            matches = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(entry))
            result += [page for page in matches if page not in named]
            named.update(matches)
        else:
            result.append(entry)
    return result


def pages_in(entries):
    for entry in entries:
        for below in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages_in(below) if isinstance(below, list) else [below]


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links between docs/ and the rest of the repository lead to a page, to a copy of a picture, or become a file's name."""
    source = Path(page.file.abs_src_path)
    folder = Path(page.file.src_uri).parent

    def replace(match):
        is_picture, text, target, anchor = match.groups()
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            return match[0]  # mkdocs says what is wrong with it
        inside = path.relative_to(ROOT).as_posix()
        if path.is_relative_to(DOCS):
            to = path.relative_to(DOCS).as_posix()
        elif inside in PAGES:
            to = PAGES[inside]
        elif is_picture:
            to = "pictures/" + inside.replace("/", "-")
            if files.get_file_from_path(to) is None:
                files.append(File.generated(config, to, abs_src_path=str(path)))
        else:
            return f"`{inside}`"
        to = os.path.relpath(to, folder)
        return f"[![{text}]({to})]({to})" if is_picture else f"[{text}]({to}{anchor or ''})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^):#]+)(#[^)]*)?\)", replace, markdown)


def on_post_page(output, page, config):
    return output.replace(NETWORK, "../" * page.file.dest_uri.count("/") + HERE)


def on_post_template(output_content, template_name, config):
    return output_content.replace(NETWORK, "/" + HERE)
