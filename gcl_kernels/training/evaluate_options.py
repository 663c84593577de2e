"""The command line of `python -m gcl_kernels.training.evaluate`: the GCL authors' flags, and the training command's names.

A flag may be written with dashes or underscores. What it leaves out comes from the checkpoint, then from the defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcl_kernels.training.options import Parser, parse_kinds, parse_list, parse_weights, positive, whole
from gcl_kernels.training.scaling import SCALINGS
from gcl_kernels.training.trained import fill_in, training_of


def parse_flag(text: str) -> bool:
    """The authors give their flags a value: `--overwrite-feature True`."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text}")
    return values[text.lower()]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Every option that evaluation needs; `notes` are lines to print, `given` the names of options on the command line.

    Lists are Python literals or comma-separated.
    """
    parser = Parser(
        "gcl_kernels.training.evaluate", description="Evaluate an open_clip model after the GCL protocol. Options may be written "
        "with dashes or underscores.",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument(
        "--test-csv", "--test_csv", "--val-data", metavar="FILE", help="judged pairs: CSV, TSV, Parquet or webdataset"
    )
    data.add_argument("--doc-meta", metavar="FILE", help="JSON {id: {field: value}}, the corpus")
    data.add_argument("--image-root", metavar="DIR",
                      help="folder that relative image paths start from; default: that of the file which names them")  # fmt: skip
    data.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    data.add_argument("--dataset-type", choices=("auto", "csv", "parquet", "webdataset"), default="auto",
                      help="auto: by the file's ending")  # fmt: skip
    data.add_argument("--gt-results-path", "--gt_results_path", type=Path, metavar="FILE",
                      help="ground truth to use if it is there, never overwritten; where to write it otherwise")  # fmt: skip

    model = parser.add_argument_group("model; what is left out is as the checkpoint was trained, if it says so")
    model.add_argument("--model-name", "--model_name", "--model", help="default: as trained, else ViT-B-32")
    model.add_argument("--pretrained", help="open_clip's tag or a checkpoint file; default: random weights")
    model.add_argument("--left-keys", type=parse_list, help="columns of the query; default: as trained, else text")
    model.add_argument("--right-keys", type=parse_list,
                       help="fields of the document; default: as trained, else image_local,title")  # fmt: skip
    model.add_argument("--left-weights", type=parse_weights, help="default: as trained, else equal")
    model.add_argument("--right-weights", type=parse_weights,
                       help="default: as trained, else 0.9,0.1 for image_local,title and equal for others")  # fmt: skip
    model.add_argument("--img-or-txt", type=parse_kinds, metavar="KINDS",
                       help="[['txt'], ['img', 'txt']] or txt;img,txt: kinds of the left and right fields; default: as "
                       "trained, else img where the name contains 'image' or 'img'")  # fmt: skip
    model.add_argument("--context-length", type=parse_list,
                       help="[[77], [0, 77]]; the largest counts, 0 is the model's own; default: as trained")  # fmt: skip
    model.add_argument("--weight-key", "--weight_key",
                       help="column of the score; default: as trained, else all judged pairs have grade 1; '' for none"
                       )  # fmt: skip
    model.add_argument("--score-scaling", type=lambda name: {"minmax": "linear"}.get(name, name), choices=(*SCALINGS, "none"),
                       help="how scores become grades 1 to 100; none is linear here; default: as trained, else linear"
                       )  # fmt: skip
    model.add_argument("--doc-id-key", help="default: as trained, else product_id")
    model.add_argument("--query-id-key",
                       help="default: as trained, else the left columns, each followed by _{!@#~}_")  # fmt: skip

    run = parser.add_argument_group("evaluation")
    run.add_argument("--top-q", type=int, default=2000,
                     help="queries drawn with the sum of their grades as weight, as the authors draw them; -1: all "
                     "(default 2000)")  # fmt: skip
    run.add_argument("--top-k", type=positive(int), default=1000, help="documents ranked for each query (default 1000)")
    run.add_argument("--batch-size", type=positive(int), default=256, help="rows embedded at a time (default 256)")
    run.add_argument(
        "--num-workers",
        "--num_workers",
        "--workers",
        type=whole,
        default=4,
        help="threads that decode images (default 4)",
    )
    run.add_argument("--metric-only", **FLAG, help="only metrics, of gt_results.json and retrieval.json")
    run.add_argument("--run-queries-cpu", **FLAG, help="search on the CPU")

    files = parser.add_argument_group("files")
    files.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    files.add_argument("--features-path", type=Path, metavar="FILE",
                       help="the corpus's embeddings, used again for the same model and corpus; default: features.pt in the "
                       "output directory")  # fmt: skip
    files.add_argument("--overwrite-feature", **FLAG, help="embed the corpus again, whatever lies at --features-path")
    files.add_argument("--overwrite-retrieval", **FLAG, help="accepted; retrieval.json is always of this run")
    files.add_argument(
        "--compare-with", type=Path, metavar="DIR", help="another output directory: paired tests per metric"
    )

    argv = [with_dashes(text) for text in (sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(argv)
    args.given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if not args.metric_only and not (args.test_csv and args.doc_meta):
        parser.error("expected --test-csv and --doc-meta, or --metric-only")
    if args.top_q < 1 and args.top_q != -1:
        parser.error(f"--top-q: expected a number > 0, or -1 for all, got {args.top_q}")
    args.training = training_of(args.pretrained)
    args.notes = fill_in(args, args.training.get("options", {}))
    args.weight_key = args.weight_key or None
    for side, keys, weights, kinds in zip(
        ("left", "right"), (args.left_keys, args.right_keys), (args.left_weights, args.right_weights), args.img_or_txt,
        strict=True,
    ):  # fmt: skip
        if not len(set(keys)) == len(keys) == len(weights) == len(kinds):
            parser.error(f"--{side}-keys, --{side}-weights and --img-or-txt: expected different names and as many of each, got "
                         f"{keys}, {weights} and {kinds}")  # fmt: skip
    if args.csv_separator is not None:
        args.csv_separator = str({"\\t": "\t", "tab": "\t"}.get(args.csv_separator, args.csv_separator))
        if len(args.csv_separator) != 1:
            parser.error(f"--csv-separator: expected one character, got '{args.csv_separator}'")
    return args


FLAG: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": parse_flag, "metavar": "True"}


def with_dashes(text: str) -> str:
    """An option as its parser stores it, whatever it is written with: `--left_keys=my_query` as `--left-keys=my_query`."""
    name, equals, value = text.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if text.startswith("--") else text
