"""Checkpoints in open_clip's form, written so that a crash at any moment leaves the previous one whole.

`{epoch, name, state_dict, optimizer, scaler}` is what `open_clip.create_model(pretrained=FILE)` and open_clip's own
trainer read; `gcl_kernels` beside them holds what an exact resume needs. Tensors and plain types only, so that
`torch.load(weights_only=True)` suffices.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import write_atomically

OURS = "gcl_kernels"
"""The key of what open_clip does not have."""

LATEST, BEST = "epoch_latest.pt", "best.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and let `epoch_latest.pt` beside it be the same file."""
    write_atomically(path, lambda new: torch.save(content, new))
    also(path, LATEST)


def also(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder: a hard link where the file system has them, else a copy."""

    def link(new: Path) -> None:
        new.unlink(missing_ok=True)
        try:
            os.link(path, new)
        except OSError:
            shutil.copyfile(path, new)

    write_atomically(path.with_name(name), link)


def newest_first(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, the latest written first."""
    found = [*folder.glob("epoch_[0-9]*.pt"), *folder.glob("step_[0-9]*.pt")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def keep_last(folder: Path, count: int) -> None:
    """Delete all numbered checkpoints but the newest `count`; 0 keeps all."""
    for path in newest_first(folder)[count:] if count else ():
        path.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to resume from, after checking every byte of it against its checksums.

    Raises:
        InputError: one line: no such file, a truncated or damaged one, or one that this harness did not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path}: expected a whole checkpoint, got a damaged file: wrong checksum in '{damaged}'")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: expected a checkpoint, got '{error.strerror or error}'") from None
    except InputError:
        raise
    except Exception:  # torch.load and zipfile raise many kinds for what is no checkpoint, with pages of text
        raise InputError(f"{path}: expected a whole checkpoint, got a truncated file or another kind of file") from None
    if not isinstance(content, dict) or OURS not in content:
        raise InputError(
            f"{path}: expected a checkpoint of this harness, got one without what a resume needs; for its weights alone "
            f"use --pretrained"
        )
    return content


def find(resume: str, folder: Path) -> Iterator[Path]:
    """The files to try for `--resume`, best first: one, or with `last-good` all of the run's; none for a new run."""
    latest = folder / LATEST
    if resume == "latest":
        yield from [latest] if latest.exists() else []
    elif resume == "last-good":
        yield from [*([latest] if latest.exists() else []), *newest_first(folder)]
    else:
        yield Path(resume)


def resume(resume_from: str, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that `--resume` names, or None where a run has none yet.

    Raises:
        InputError: as `load`; with `last-good` only when none of them can be read.
    """
    refused = []
    for path in find(resume_from, folder):
        try:
            return path, load(path)
        except InputError as error:
            refused.append(str(error))
            if resume_from == "last-good":
                print(f"passed over: {error}")
    if refused:
        raise InputError("\n".join(refused))
    return None
