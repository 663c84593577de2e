"""What a file was made from, so that it is used again for the same things alone.

Its parts are plain values, and digests of what is too large to keep: `{"--weight_key": "score", "corpus": "blake2b:..."}`.
They are taken of what was used, not of its name: documents as they were read, a model's weights. They stand in the file, or
beside one whose form is somebody else's, in `NAME.made-from.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_json_atomically

Parts = dict[str, Any]

READ_WHOLE = 1 << 30
"""Files of up to so many bytes are known by their content, larger ones and folders by names, sizes and times."""

TEXTS_TRIED = 1000
"""Texts whose token ids stand for a tokenizer, with its context length."""

_DIGEST = "blake2b:"


def digest(values: Iterable[Any]) -> str:
    """Of plain values and bytes, one after the other."""
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        state.update(len(content).to_bytes(8, "little") + content)
    return _DIGEST + state.hexdigest()


def digest_of_file(path: Path) -> str:
    """Of a file, of a folder's files, or of those that a pattern names."""
    if path.is_file() and path.stat().st_size <= READ_WHOLE:
        with path.open("rb") as file:
            return digest(iter(lambda: file.read(1 << 20), b""))
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else path.parent.glob(path.name)
    return digest([file.name, *_size_and_time(str(file))] for file in sorted(files))


def digest_of_images(paths: Iterable[str]) -> str:
    """Of image files by path, size and time; a part of a tar file changes with the whole."""
    return digest([path, *_size_and_time(path)] for path in sorted(set(paths)))


def short_id(identity: str) -> str:
    """Sixteen hexadecimal digits in the place of an id made of all cells of a document."""
    return digest([identity])[-16:]


def corpus_parts(
    model: Any, tokenizer: Any, preprocess: Any, documents: Mapping[str, Mapping[str, str]], kinds: Mapping[str, str]
) -> Parts:
    """What makes the embeddings of documents by their fields `kinds`, `{field: "txt" or "img"}`; other columns do not."""
    used = {
        kind: [values[key] for values in documents.values() for key in kinds if kinds[key] == kind]
        for kind in ("txt", "img")
    }
    return {
        **model_parts(model, tokenizer, preprocess, used["txt"]),
        "corpus": digest([key, *((field, documents[key][field]) for field in kinds)] for key in sorted(documents)),
        "images": digest_of_images(filter(None, used["img"])),
        "fields": [[key, kind] for key, kind in kinds.items()],
    }


def model_parts(model: Any, tokenizer: Any, preprocess: Any, texts: Iterable[str]) -> Parts:
    """What makes an embedding of a text or an image: structure, weights, tokens and preprocessing."""
    structure = [
        [name, type(module).__name__, sorted((key, str(value)) for key, value in vars(module).items() if _is_plain(key, value))]
        for name, module in model.named_modules()
    ]  # fmt: skip
    weights = ([name, str(weight.dtype), *weight.shape] for name, weight in model.state_dict().items())
    contents = (
        weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for weight in model.state_dict().values()
    )
    tried = [text for text, _ in zip(sorted({text for text in texts if text}), range(TEXTS_TRIED), strict=False)]
    tokens = tokenizer(tried).tolist() if tried else []
    # Functions print with their address.
    return {
        "model": digest([structure, re.sub(r" at 0x[0-9a-f]+", "", f"{model!r}{preprocess!r}")]),
        "weights": digest([*weights, *contents]),
        "tokens": digest(tokens),
    }


def record(path: Path, parts: Parts) -> None:
    """Write beside a file what it was made from."""
    write_json_atomically(_beside(path), {"file": digest_of_file(path), "made_from": parts}, indent=1)


def recorded(path: Path) -> Parts | None:
    """What a file was made from; None where nothing says so, or the file is no longer as it was written."""
    try:
        content = read_json(_beside(path))
        return content["made_from"] if content["file"] == digest_of_file(path) else None
    except (DataError, KeyError, TypeError, OSError):
        return None


def difference(then: Parts, now: Parts) -> str:
    """The parts that are not the same, in words; "" where all are."""
    words = []
    for key in [*now, *(key for key in then if key not in now)]:
        a, b = then.get(key), now.get(key)
        if a != b:
            shown = not any(isinstance(value, str) and value.startswith(_DIGEST) for value in (a, b))
            words.append(f"{key} ({_text(a)} then, {_text(b)} now)" if shown else key)
    return ", ".join(words)


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.made-from.json")


def _size_and_time(path: str) -> list[int]:
    for file in (path, path.rpartition("@")[0]):
        try:
            status = os.stat(file)
            return [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            continue
    return []


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and key != "training" and isinstance(value, (bool, int, float, str, tuple))
