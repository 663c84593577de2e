"""What mkdocs.yml cannot say: patterns in the navigation, links of a page to files outside docs/, no script from a network."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NETWORK, HERE = "https://unpkg.com/iframe-worker/shim", "vendor/iframe-worker.js"
"""What the theme would fetch to search in a page opened from a disk, and our copy of it."""


def on_config(config):
    config.nav = expanded(config.nav)
    return config


def expanded(entries):
    """The entries; in the place of a pattern, the pages that match it and that no other entry names."""
    named = set(pages(entries))

    def expand(entry):
        if isinstance(entry, dict):
            return [{title: expanded_list(below) if isinstance(below, list) else below for title, below in entry.items()}]
        if "*" not in entry:
            return [entry]
        matches = sorted((ROOT / "docs").glob(entry))
        return [path for path in (match.relative_to(ROOT / "docs").as_posix() for match in matches) if path not in named]

    def expanded_list(below):
        return [new for entry in below for new in expand(entry)]

    return expanded_list(entries)


def pages(entries):
    for entry in entries:
        for below in entry.values() if isinstance(entry, dict) else [entry]:
            yield from pages(below) if isinstance(below, list) else [below]


def on_page_markdown(markdown, page, config, files):
    """A picture outside docs/ is copied to the site; any other file there is named, since it has no page."""
    folder = Path(page.file.abs_src_path).parent

    def replace(match):
        sign, text, target = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.is_file():
            return match[0]  # mkdocs says what is wrong with it
        inside = path.relative_to(ROOT).as_posix()
        if not sign:
            return f"`{inside}`"
        name = "pictures/" + inside.replace("/", "-")
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"![{text}]({'../' * page.file.src_uri.count('/')}{name})"

    return re.sub(r"(!?)\[([^]]*)\]\((\.\./[^)#]+)(?:#[^)]*)?\)", replace, markdown)


def on_post_page(output, page, config):
    return output.replace(NETWORK, "../" * page.file.dest_uri.count("/") + HERE)


def on_post_template(output_content, template_name, config):
    return output_content.replace(NETWORK, HERE)
