"""What can be wrong with the weights that a model begins with, each in one line."""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence

import torch

from gcl_kernels.training.errors import InputError

OTHER_FORMATS = (".safetensors", ".npz", ".npy")
"""Endings of weights that open_clip reads and torch does not."""

EXPECTED_NOISE = ("No pretrained weights loaded", "initialized partially")
"""What open_clip warns of when no weights were asked for."""


def expect_weights(model: str, pretrained: str, tags: Sequence[str]) -> None:
    """Raise InputError for what is neither one of open_clip's `tags` for the model nor a whole file of weights."""
    # open_clip reads tags without regard to case, and "-" for "_".
    if pretrained.lower().replace("-", "_") in {tag.lower().replace("-", "_") for tag in tags}:
        return
    if os.path.isdir(pretrained):
        raise InputError(f"--pretrained: expected a file of weights, got the folder '{pretrained}'")
    try:
        with open(pretrained, "rb") as file:
            file.read(1)
    except OSError as error:
        known = ", ".join(sorted(tags)) or "none"
        raise InputError(f"--pretrained: expected a readable file, or one of open_clip's tags for {model} ({known}), got "
                         f"'{pretrained}': {error.strerror}") from None  # fmt: skip
    if pretrained.lower().endswith(OTHER_FORMATS) or not zipfile.is_zipfile(pretrained):
        return
    try:
        with zipfile.ZipFile(pretrained) as archive:
            names = archive.namelist()
            if not any(name.endswith("data.pkl") for name in names):
                first = f", first '{names[0]}'" if names else ""
                raise InputError(f"--pretrained: expected a file of weights, got '{pretrained}', a zip archive of {len(names)} "
                                 f"other files{first}; unpack it and name one")  # fmt: skip
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        damaged = str(error)
    if damaged:
        raise InputError(f"--pretrained: expected a whole file of weights, got '{pretrained}', which is damaged: wrong "
                         f"checksum in '{damaged}'")  # fmt: skip


@contextlib.contextmanager
def faults_in_one_line(model: str, pretrained: str | None) -> Iterator[None]:
    """Within it open_clip makes a model: what it raises for bad weights becomes an InputError of one line."""
    root = logging.getLogger()
    quiet = lambda record: not any(part in str(record.msg) for part in EXPECTED_NOISE)  # noqa: E731
    if pretrained is None:
        root.addFilter(quiet)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    except ImportError as error:
        package = (error.name or "transformers").partition(".")[0]
        raise InputError(f"--model {model}: expected the package {package}, got none: pip install {package}") from None
    except OSError as error:  # what has to be downloaded, or read from a folder
        raise InputError(f"--model {model}: cannot be downloaded or read: {first_line(error)}") from None
    except Exception as error:  # open_clip and torch raise many kinds, and an unpickler of what is no pickle all others
        if pretrained is None and ":" not in model:
            raise
        other_model = isinstance(error, AssertionError) or "loading state_dict" in str(error)
        kind = "weights of another model" if other_model else "a truncated file or another kind of file"
        raise InputError(f"--pretrained: expected a whole file of weights of {model}, got '{pretrained or model}', {kind}: "
                         f"{first_line(error)}") from None  # fmt: skip
    finally:
        root.removeFilter(quiet)


def first_line(error: Exception) -> str:
    """What an exception says, on one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
