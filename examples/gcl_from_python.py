"""Train with GCL on a CSV of your own from Python, and see what queries find.

    python examples/gcl_from_python.py                                   # a toy table, seconds on a CPU
    python examples/gcl_from_python.py --csv pairs.csv --left-keys query --right-keys title,image --weight-key score

A row is a query, a document and a score: how relevant the document is to the query, as clicks, purchases or a grade. A cell
of a column with "image" in its name is a path. The training options beside those here are fields of `TrainOptions`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcl_kernels.training import TrainOptions, train
from gcl_kernels.training.data import read_pairs
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.ranking import corpus_of, embed, embed_corpus, search

COLOURS, THINGS = ("red", "green", "blue", "black", "white"), ("mug", "lamp", "shirt", "chair")


def toy_rows() -> list[dict[str, Any]]:
    """Every colour of every thing as a query: 100 for the thing itself, 40 for the thing in another colour."""
    return [
        {"query": f"{colour} {thing}", "title": f"a {other} {thing}", "score": 100 if other == colour else 40}
        for thing in THINGS
        for colour in COLOURS
        for other in COLOURS
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Train, evaluate, search; returns the ids of the first documents of each query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="your file; default: the toy table")
    parser.add_argument("--left-keys", default="query", help="columns of the query, a comma between them")
    parser.add_argument("--right-keys", default="title", help="columns of the document, a comma between them")
    parser.add_argument("--weight-key", default="score", help="column of the score")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("logs"))
    args = parser.parse_args(argv)

    if args.csv:
        with args.csv.open(newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        rows = toy_rows()
    # Any table does in the place of the list: a pandas DataFrame, a pyarrow Table. Test on rows of other queries than you
    # train on, if you want to know how good the model is; here it is asked what it has been taught.
    options = TrainOptions(
        left_keys=args.left_keys.split(","),
        right_keys=args.right_keys.split(","),
        weight_key=args.weight_key,
        val_data=["the training rows"],
        image_root=args.csv.parent if args.csv else None,
        score_to_weight="linear",
        batch_size=args.batch_size,
        steps=args.steps,
        lr=2e-3,
        logs=args.out,
    )
    run = train(options, rows, {"the training rows": rows})

    # The checkpoint is an open_clip model; fields and their kinds are those that it was trained with.
    left, right = (dict(zip(*side, strict=True)) for side in zip(
        (options.left_keys, options.right_keys), options.img_or_txt, strict=True
    ))  # fmt: skip
    left_weights = dict(zip(options.left_keys, options.left_weights, strict=True))
    right_weights = dict(zip(options.right_keys, options.right_weights, strict=True))
    pairs = read_pairs("rows", left, right, options.weight_key, image_root=options.image_root, table=rows)
    encoder = FieldEncoder(*create_model(options.model, pretrained=str(run.checkpoint)))
    corpus = embed_corpus(encoder, corpus_of(pairs), (right, right_weights))
    queries = {key: cells[:: max(1, len(cells) // 5)] for key, cells in pairs.left.items()}
    found, _ = search(embed(encoder, queries, left, left_weights), corpus.embeddings, 3)
    shown = {}
    for query, places in zip(zip(*queries.values(), strict=True), found.tolist(), strict=True):
        shown[" ".join(query)] = [corpus.document_ids[place] for place in places]
        print(" ".join(query), "->", shown[" ".join(query)])
    return shown


if __name__ == "__main__":
    main()
