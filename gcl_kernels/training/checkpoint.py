"""Checkpoints in open_clip's form, written so that a crash at any moment leaves the previous one whole.

`{epoch, name, state_dict, optimizer, scaler}` is what `open_clip.create_model(pretrained=FILE)` and open_clip's own
trainer read; `gcl_kernels` beside them holds what an exact resume needs. Tensors and plain types only, so that
`torch.load(weights_only=True)` suffices.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training import openclip
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import write_atomically, write_json_atomically

OURS = "gcl_kernels"
"""The key of what open_clip does not have."""

LATEST, BEST = "epoch_latest.pt", "best.pt"

PLACES = {
    "logs", "name", "resume", "config", "report_to", "log_every_n_steps", "keep_last", "save_frequency", "save_steps",
    "val_frequency", "val_steps", "workers",
}  # fmt: skip
"""Options that a resumed run may change without becoming another run."""


def save(path: Path, content: dict[str, Any], *, best: bool = False) -> None:
    """Write a checkpoint and let `epoch_latest.pt` beside it, and for the best so far `best.pt`, be the same file.

    The model's configuration goes with it: in the checkpoint, and as `MODEL.json` beside it.

    Raises:
        InputError: it cannot be written, as on a full disk; what was there before is whole, and nothing half is left.
    """
    options = content.get(OURS, {}).get("options", {})
    name = str(options.get("model", "none:"))
    config = (
        None
        if ":" in name
        else openclip.configuration(
            name, options.get("context_length"), content.get("state_dict", {}).get("logit_bias")
        )
    )
    if config:
        content = {**content, OURS: {**content[OURS], openclip.CONFIGURATION: config}}
    try:
        write_atomically(path, lambda new: torch.save(content, new))
        if config:
            write_json_atomically(
                path.with_name(f"{Path(name).stem if name.endswith('.json') else name}.json"), config, indent=4
            )
        also(path, LATEST)
        if best:
            also(path, BEST)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written: {' '.join(str(error).split())[:200]}") from None


def also(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder: a hard link where the file system has them, else a copy."""

    def link(new: Path) -> None:
        new.unlink(missing_ok=True)
        try:
            os.link(path, new)
        except (OSError, AttributeError):
            shutil.copyfile(path, new)

    write_atomically(path.with_name(name), link)
    # Renaming one name of a file to another name of the same file does nothing (POSIX), and leaves the first.
    path.with_name(name + ".tmp").unlink(missing_ok=True)


def newest_first(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, the latest written first; where clocks are coarse, that of the larger number."""
    found = [*folder.glob("epoch_[0-9]*.pt"), *folder.glob("step_[0-9]*.pt")]
    number = lambda path: int("".join(filter(str.isdigit, path.stem)) or 0)  # noqa: E731
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, number(path)), reverse=True)


def keep_last(folder: Path, count: int) -> None:
    """Delete all numbered checkpoints but the newest `count`; 0 keeps all."""
    for path in newest_first(folder)[count:] if count else ():
        # A file that another program has open stays on Windows, until the next time.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)


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


def resume(resume_from: str, folder: Path, say: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
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
                say(f"passed over: {error}")
    if refused:
        raise InputError("\n".join(refused))
    return None


def changes(ours: dict[str, Any], options: dict[str, Any], *, rows: int, world: int) -> list[str]:
    """What makes the rest of a resumed run another one than was begun, from `content[OURS]`."""
    changed = [
        f"--{key.replace('_', '-')} {value} -> {options[key]}"
        for key, value in ours["options"].items()
        if key not in PLACES and key in options and options[key] != value
    ]
    if ours["rows"] != rows:
        changed.append(f"rows of --train-data {ours['rows']} -> {rows}")
    if len(ours["random"]) != world:
        changed.append(f"processes {len(ours['random'])} -> {world}")
    return changed


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """What dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
