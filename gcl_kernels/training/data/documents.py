"""Document metadata: the corpus that is searched, a JSON object of objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

from gcl_kernels.training.data.faults import LINES_SHOWN, one_line, quoted, shown
from gcl_kernels.training.data.images import ImageCheck
from gcl_kernels.training.data.streams import TextStream
from gcl_kernels.training.data.tables import listed
from gcl_kernels.training.data.values import image_path, parse_json, repeated_fault, texts_of, utf8_fault
from gcl_kernels.training.errors import DataError


def read_documents(
    path: str | Path,
    fields: Mapping[str, str],
    *,
    check_images: str = "decode",
    skip_bad_rows: bool = False,
    image_root: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, str]]:
    """Read document metadata, a JSON object `{document id: {field: value}}`, keeping the named fields.

    What a value is follows the rules of `data.values`, and an id is text, without white space at its ends. Image values
    become absolute paths, from `image_root` or else the file's own folder; a field that a document lacks is "". Documents
    without any of the fields are kept: what to do with them is for the caller to say. Ids that come twice are counted in a
    line that is said, and so are bad documents with `skip_bad_rows`, which leaves them out.

    Raises:
        DataError: a missing file, text that is no JSON (with its line), another structure, a field that no document has;
            and, unless they are skipped, bad documents: a value that is neither text nor a number, text or an id that UTF-8
            cannot hold, an empty id, a named field that comes twice, an unreadable image.
    """
    path = Path(path)
    name = one_line(str(path))
    stream = TextStream(path)
    try:
        text = stream.file.read()
    finally:
        stream.close()
    if stream.damage:
        raise DataError(f"{name}: {stream.damage}")
    content, fault = parse_json(text)
    if fault:
        raise DataError(f"{name}{fault}")
    versions = getattr(content, "versions", {})
    if not isinstance(content, dict) or not all(
        isinstance(document, dict) for document in (*content.values(), *chain(*versions.values()))
    ):
        raise DataError(
            f"{name}, line 1: expected a JSON object {{document id: {{field: value}}}}, got another structure"
        )

    folder = str(Path(path.parent if image_root is None else image_root).resolve())
    images = ImageCheck(check_images)
    documents: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    repeated: list[str] = []
    bad, bad_count = [], 0
    for key, document in ((name, one) for name in content for one in versions.get(name, [content[name]])):
        identity = key.strip()
        seen.update(field for field in fields if field in document)
        values, faults = texts_of({field: document.get(field) for field in fields}, "field")
        faults += [fault for fault in (utf8_fault(identity), repeated_fault(document, fields, "field")) if fault]
        if not identity:
            faults.append("expected an id, got none")
        for field, kind in fields.items():
            if kind == "img" and values[field]:
                values[field] = image_path(folder, values[field])
                if not faults and (fault := images(values[field])):
                    faults.append(f"expected a readable image in field '{field}', got {fault}")
        if faults:
            bad_count += 1
            if len(bad) < LINES_SHOWN:
                bad.append(one_line(f"{path}, document {quoted(identity)}: {'; '.join(faults)}"))
            continue
        if identity in documents:
            repeated.append(identity)
            values = min(values, documents[identity], key=emptier)
        documents[identity] = values
    if bad and not skip_bad_rows:
        raise DataError("\n".join(shown(bad, bad_count)))
    for field in fields:
        if content and field not in seen:
            found = list(dict.fromkeys(key for document in content.values() for key in document))
            raise DataError(
                f"{name}: expected a field '{field}' in at least one document, got the fields {listed(found)}"
            )
    if content and not documents:
        raise DataError("\n".join([f"{name}: expected at least one good document, got none", *shown(bad, bad_count)]))
    if bad:
        say("\n  ".join([f"{name}: {bad_count} bad documents skipped:", *shown(bad, bad_count)]))
    if repeated:
        say(
            f"{name}: expected each document id once, got {len(repeated)} ids again, first "
            f"{quoted(repeated[0])}; the fullest document of an id counts"
        )
    return documents


def emptier(document: Mapping[str, str]) -> tuple[int, list[str]]:
    """The place of a document among those of its id, the fullest first; of equally full ones that with the smallest values."""
    return sum(not value for value in document.values()), list(document.values())
