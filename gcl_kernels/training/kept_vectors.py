"""The vectors of a corpus on disk: what they were made from, and whether they can be used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gcl_kernels.training import made_from
from gcl_kernels.training.corpora import Documents
from gcl_kernels.training.data import image_fault
from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_atomically, write_json_atomically
from gcl_kernels.training.search_model import SearchModel

MANIFEST = "embedded.json"


def parts_of(model: SearchModel, documents: Documents) -> made_from.Parts:
    """What the vectors of a corpus are made from."""
    kinds = model.right[0]
    texts = (values[key] for values in documents.values() for key in kinds if kinds[key] == "txt")
    images = (values[key] for values in documents.values() for key in kinds if kinds[key] == "img")
    return {
        **made_from.model_parts(model.encoder.model, model.tokenizer, model.preprocess, texts),
        "corpus": made_from.digest([key, *((f, documents[key][f]) for f in kinds)] for key in sorted(documents)),
        "images": made_from.digest_of_images(filter(None, images)),
        "fields": [[key, kind] for key, kind in kinds.items()],
    }


def keep(
    folder: Path, parts: made_from.Parts, document_ids: list[str], fields: Mapping[str, Tensor], lost: Mapping[str, str]
) -> None:
    """Write vectors, each field in a file, and last what they were made from."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for number, vectors in enumerate(fields.values()):
        array = vectors.numpy()

        def write(new: Path, array: np.ndarray = array) -> None:
            with new.open("wb") as file:
                np.save(file, array)

        write_atomically(folder / f"field-{number}.npy", write)
    content = {"made_from": parts, "document_ids": document_ids, "lost": dict(lost)}
    write_json_atomically(folder / MANIFEST, content)


def read_kept(
    folder: Path, model: SearchModel, parts: made_from.Parts, say: Callable[[str], None]
) -> tuple[list[str], dict[str, Tensor]] | None:
    """Ids and vectors that were made from the same things, mapped into memory; None, and a line, if they were not.

    Raises:
        DataError: a manifest that is none of ours, which is not overwritten.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    try:
        then, document_ids, lost = content["made_from"], content["document_ids"], content["lost"]
        other = made_from.difference(then, parts)
        readable = sum(image_fault(image) is None for image in lost) if not other else 0
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: expected what this program writes, got another structure; another folder keeps it"
        ) from None
    if readable:
        other = f"{readable} images that can be read now"
    if not other:
        try:
            # "c", copy on write: torch warns of memory that it may not write to.
            arrays = [np.load(folder / f"field-{number}.npy", mmap_mode="c") for number in range(len(model.right[0]))]
            if not all(
                array.dtype == np.float32 and array.shape == (len(document_ids), arrays[0].shape[1]) for array in arrays
            ):
                raise ValueError("vectors of another shape")
        except (OSError, ValueError, IndexError) as error:
            other = f"its files: {' '.join(str(error).split())[:100]}"
        else:
            say(f"{folder}: used again, {len(document_ids)} documents")
            model.encoder.lost.update(lost)
            return document_ids, {
                key: torch.from_numpy(array) for key, array in zip(model.right[0], arrays, strict=True)
            }
    say(f"{folder}: made again: {other}")
    return None
