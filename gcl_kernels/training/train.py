"""Train an open_clip model on scored pairs: one script, top to bottom.

    python -m gcl_kernels.training --train-data pairs.csv --left-keys "['query']" --right-keys "['title','image']" \\
        --weight-key score

Flags that mean what they mean in open_clip bear open_clip's names; those of GCL bear Marqtune's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import gcl_kernels
from gcl_kernels.training.data import DataError, InputError, Pairs, read_documents, read_pairs, shown
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.evaluate import (
    Corpus,
    Evaluation,
    corpus_of,
    embed_corpus,
    evaluate,
    minmax_grades,
    random_ranking,
)
from gcl_kernels.training.openclip import TINY_MODEL, create_model

TABLE_METRICS = ("NDCG@10", "ERR", "RBP.9")


@dataclass
class Run:
    """What a training run leaves: one evaluation and one random ranking per ``--val-data`` file, and what it cost."""

    evaluations: dict[str, Evaluation]
    random: dict[str, Evaluation]
    losses: list[float]
    seconds: float
    peak_bytes: int
    checkpoint: Path


def parse_list(text: str) -> list[Any]:
    """A Python literal list, or values separated by commas: ``"['title', 'image']"`` or ``title,image``."""
    text = text.strip()
    if text[:1] in ("[", "("):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentTypeError(f"expected a Python list or comma-separated values, got {text}") from None
        return list(value) if isinstance(value, (list, tuple)) else [value]
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_weights(text: str) -> list[float]:
    """A list of numbers >= 0, not all 0."""
    try:
        weights = [float(value) for value in parse_list(text)]
    except (TypeError, ValueError):
        weights = []
    if not (weights and all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0):
        raise argparse.ArgumentTypeError(f"expected numbers >= 0, not all 0, got {text}")
    return weights


def parse_kinds(text: str) -> list[list[str]]:
    """``"[['txt'], ['txt', 'img']]"`` or ``"txt;txt,img"``: the kinds of the left fields, then of the right ones."""
    kinds = parse_list(text) if text.strip()[:1] in ("[", "(") else [parse_list(side) for side in text.split(";")]
    if len(kinds) != 2 or not all(isinstance(side, (list, tuple)) and set(side) <= {"txt", "img"} for side in kinds):
        raise argparse.ArgumentTypeError(f"expected two lists of 'txt' and 'img', got {text}")
    return [list(side) for side in kinds]


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: a finite number > 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Show a default where there is one to show."""
        return action.help if action.default in (None, [], False, -math.inf) else super()._get_help_string(action)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of ``python -m gcl_kernels.training``."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training", description="Train an open_clip model on (query, document, score) rows with GCL.",
        formatter_class=_Help,
    )  # fmt: skip
    lists = "a Python list or comma-separated"

    data = parser.add_argument_group("data")
    data.add_argument("--train-data", required=True, metavar="FILE", help="CSV or TSV with a header line")
    data.add_argument("--val-data", nargs="*", default=[], metavar="FILE", help="CSV or TSV files to evaluate on")
    data.add_argument("--doc-meta", nargs="*", default=[], metavar="FILE",
                      help="JSON {id: {field: value}}, corpus of each --val-data file; default: that file's documents",
                      )  # fmt: skip
    data.add_argument("--left-keys", required=True, type=parse_list, help=f"columns of the query, {lists}")
    data.add_argument("--right-keys", required=True, type=parse_list, help=f"columns of the document, {lists}")
    data.add_argument("--weight-key", "--weight_key", required=True, help="column of the score, a number >= 0")
    data.add_argument("--img-or-txt", type=parse_kinds, metavar="KINDS",
                      help="[['txt'], ['txt', 'img']]: kinds of the left and right columns; default: img where the name "
                      "contains 'image' or 'img'")  # fmt: skip
    data.add_argument("--query-id-key", help="column that identifies the query; default: the left columns together")
    data.add_argument("--doc-id-key", help="column that identifies the document; default: the right columns together")
    data.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    data.add_argument(
        "--skip-bad-rows", action="store_true", help="leave bad rows out and say which, instead of stopping"
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument("--score-to-weight", default="inverse_sqrt",
                      help="constant (plain CLIP), linear, inverse, inverse_sqrt, log")  # fmt: skip
    loss.add_argument("--score-scaling", choices=("minmax", "none"), default="minmax",
                      help="minmax: scores become int((s - min) / (max - min) * 99 + 1) over the training file, as in "
                      "evaluation; none: scores are in [1, s_max] already")  # fmt: skip
    loss.add_argument("--s-max", type=positive(float), default=100.0, help="largest score, with --score-scaling none")
    loss.add_argument("--min-score", type=float, default=-math.inf,
                      help="leave training rows with a lower score out: judged not relevant, so no positives")  # fmt: skip
    loss.add_argument(
        "--weight-normalize", choices=("mean", "none"), default="mean", help="divide weights by the batch mean"
    )
    loss.add_argument("--left-weights", type=parse_weights, help=f"weight of each left field, {lists}; default: equal")
    loss.add_argument(
        "--right-weights", type=parse_weights, help=f"weight of each right field, {lists}; default: equal"
    )
    loss.add_argument(
        "--cross-field-loss", action="store_true", help="add the mean of the loss over all pairs of fields"
    )

    train = parser.add_argument_group("training")
    train.add_argument("--model", default=TINY_MODEL, help="any open_clip model name")
    train.add_argument("--pretrained", help="open_clip's tag or a checkpoint file; default: random weights")
    train.add_argument("--context-length", type=positive(int), help="text tokens; default: the model's own")
    train.add_argument("--batch-size", type=positive(int), default=512)
    train.add_argument("--epochs", type=positive(int), default=10)
    train.add_argument("--steps", type=positive(int), help="number of batches in all, instead of --epochs")
    train.add_argument("--lr", type=positive(float), default=5e-4)
    train.add_argument("--wd", type=float, default=0.2)
    train.add_argument("--warmup", type=int, default=100, help="steps; at most a tenth of the run is used")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=positive(int), default=4, help="threads that decode images")
    train.add_argument(
        "--top-k", type=positive(int), default=1000, help="documents ranked for each query in evaluation"
    )
    train.add_argument("--logs", default="logs", metavar="DIR")
    train.add_argument("--name", help="results go to LOGS/NAME; default: the date and time")
    args = parser.parse_args(argv)

    if args.img_or_txt is None:
        args.img_or_txt = [
            ["img" if "image" in key.lower() or "img" in key.lower() else "txt" for key in keys]
            for keys in (args.left_keys, args.right_keys)
        ]
    for side, keys, kinds in zip(("left", "right"), (args.left_keys, args.right_keys), args.img_or_txt, strict=True):
        weights = getattr(args, f"{side}_weights") or [1.0] * len(keys)
        setattr(args, f"{side}_weights", weights)
        if not keys or len(set(keys)) != len(keys) or not all(isinstance(key, str) for key in keys):
            parser.error(f"--{side}-keys: expected different column names, got {keys}")
        if len(weights) != len(keys):
            parser.error(f"--{side}-weights: expected {len(keys)} weights as in --{side}-keys, got {len(weights)}")
        if len(kinds) != len(keys):
            parser.error(f"--img-or-txt: expected {len(keys)} {side} kinds as in --{side}-keys, got {len(kinds)}")
    if args.doc_meta and len(args.doc_meta) != len(args.val_data):
        files, corpora = len(args.val_data), len(args.doc_meta)
        parser.error(f"--doc-meta: expected one file for each of the {files} in --val-data, got {corpora}")
    if args.csv_separator is not None:
        args.csv_separator = str({"\\t": "\t", "tab": "\t"}.get(args.csv_separator, args.csv_separator))
        if len(args.csv_separator) != 1:
            parser.error(f"--csv-separator: expected one character, got '{args.csv_separator}'")
    if args.warmup < 0 or args.wd < 0:
        parser.error(f"expected --warmup and --wd >= 0, got {args.warmup} and {args.wd}")
    args.name = args.name or time.strftime("%Y_%m_%d-%H_%M_%S")
    return args


def train(args: argparse.Namespace) -> Run:
    """Read, train, save, evaluate. ``args`` are those of :func:`parse_args`.

    Writes ``LOGS/NAME/checkpoints/epoch_N.pt``, which ``open_clip.create_model(MODEL, pretrained=FILE)`` loads, and
    ``LOGS/NAME/results.json``.

    Raises:
        InputError: files or options that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    reset_peak_memory(device)

    # ---- data
    left_kinds, right_kinds = (
        dict(zip(keys, kinds, strict=True))
        for keys, kinds in zip((args.left_keys, args.right_keys), args.img_or_txt, strict=True)
    )
    left_weights = dict(zip(args.left_keys, args.left_weights, strict=True))
    right_weights = dict(zip(args.right_keys, args.right_weights, strict=True))

    def read(path: str) -> Pairs:
        pairs = read_pairs(
            path, left_kinds, right_kinds, args.weight_key, separator=args.csv_separator, query_id_key=args.query_id_key,
            document_id_key=args.doc_id_key, skip_bad_rows=args.skip_bad_rows,
        )  # fmt: skip
        print(
            f"{path}: {len(pairs)} pairs, {len(set(pairs.query_ids))} queries, {len(set(pairs.document_ids))} documents"
        )
        if pairs.bad_rows:
            print(f"{path}: {len(pairs.bad_rows)} bad rows skipped:", *shown(pairs.bad_rows), sep="\n  ")
        return pairs

    pairs = read(args.train_data)
    tests = {path: read(path) for path in args.val_data}
    corpora = {
        path: read_documents(meta, right_kinds) for path, meta in zip(args.val_data, args.doc_meta, strict=False)
    }
    for path, corpus in corpora.items():
        if missing := [identity for identity in dict.fromkeys(tests[path].document_ids) if identity not in corpus]:
            raise DataError(
                f"{path}: expected all documents in the corpus of --doc-meta, got {len(missing)} that are not, "
                f"first '{missing[0]}'"
            )

    if args.score_scaling == "none" and not 1 <= min(pairs.scores) <= max(pairs.scores) <= args.s_max:
        raise DataError(
            f"{args.train_data}: expected scores in [1, {args.s_max:g}] with --score-scaling none, got "
            f"{min(pairs.scores):g} to {max(pairs.scores):g}"
        )
    scores = torch.tensor(minmax_grades(pairs.scores) if args.score_scaling == "minmax" else pairs.scores).float()
    used = [row for row, score in enumerate(pairs.scores) if score >= args.min_score]
    if not used:
        most = max(pairs.scores)
        raise DataError(f"{args.train_data}: expected a score >= --min-score {args.min_score:g}, got {most:g} at most")
    # The ids of a side are numbers shared with the other side: the same query's, or the same document's, other rows
    # are no negatives.
    query_number = {identity: number for number, identity in enumerate(dict.fromkeys(pairs.query_ids))}
    document_number = {identity: number for number, identity in enumerate(dict.fromkeys(pairs.document_ids))}
    ids = torch.tensor(
        [(query_number[q], document_number[d]) for q, d in zip(pairs.query_ids, pairs.document_ids, strict=True)]
    )

    # ---- model, loss, optimiser
    torch.manual_seed(args.seed)
    model, tokenizer, preprocess = create_model(
        args.model, pretrained=args.pretrained, context_length=args.context_length, device=device
    )
    encoder = FieldEncoder(model, tokenizer, preprocess, workers=args.workers)
    loss_options: dict[str, Any] = {
        "score_to_weight": args.score_to_weight,
        "s_max": args.s_max if args.score_scaling == "none" else 100.0,
        "normalize": None if args.weight_normalize == "none" else args.weight_normalize,
    }
    try:
        loss_of_sides = gcl_kernels.GCLLoss(
            **loss_options, lhs_field_weights=left_weights, rhs_field_weights=right_weights
        )
    except ValueError as error:
        raise InputError(f"--score-to-weight: {error}") from None
    # Equal field weights, the default, make it the mean over all (left, right) pairs of fields.
    loss_of_field_pairs = gcl_kernels.GCLLoss(**loss_options, field_mode="pairwise")

    # As in open_clip, gains and biases do not decay.
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for _, weight in named if weight.ndim < 2], "weight_decay": 0.0},
            {"params": [weight for _, weight in named if weight.ndim >= 2], "weight_decay": args.wd},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        eps=1e-6,
    )

    batch_size = min(args.batch_size, len(used))
    steps_per_epoch = len(used) // batch_size
    steps = args.steps or args.epochs * steps_per_epoch
    warmup = min(args.warmup, steps // 10)

    # ---- training
    model.train()
    losses: list[float] = []
    generator = torch.Generator().manual_seed(args.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    order: list[int] = []
    progress = tqdm(range(steps), desc=f"{args.name}: {args.score_to_weight}", unit="step", mininterval=1.0)
    for step in progress:
        if len(order) < batch_size:
            order = torch.randperm(len(used), generator=generator).tolist()
        rows, order = [used[place] for place in order[:batch_size]], order[batch_size:]

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, args.lr)
        with autocast:
            lhs, lhs_mask = encoder(rows_of(pairs.left, rows), left_kinds)
            rhs, rhs_mask = encoder(rows_of(pairs.right, rows), right_kinds)
            scale = model.logit_scale.exp()
            inputs = lhs, rhs, scores[rows].to(device), scale
            batch_ids = ids[rows].to(device)
            visible = {
                "lhs_ids": batch_ids,
                "rhs_ids": batch_ids,
                "lhs_field_mask": lhs_mask,
                "rhs_field_mask": rhs_mask,
            }
            loss = loss_of_sides(*inputs, **visible)
            if args.cross_field_loss:
                loss = loss + loss_of_field_pairs(*inputs, **visible)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", scale=f"{scale.item():.1f}", refresh=False)

    # ---- checkpoint, in open_clip's form
    folder = Path(args.logs) / args.name
    epoch = max(1, steps // steps_per_epoch)
    checkpoint = folder / "checkpoints" / f"epoch_{epoch}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"epoch": epoch, "name": args.name, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()},
        checkpoint,
    )

    # ---- evaluation
    left, right = (left_kinds, left_weights), (right_kinds, right_weights)
    evaluations, random = {}, {}
    embedded: dict[str, Corpus] = {}
    metas = dict(zip(args.val_data, args.doc_meta, strict=False))
    for path in tqdm(args.val_data, desc=f"{args.name}: evaluation", unit="file", disable=not args.val_data):
        # Test sets often share a corpus; it is embedded once.
        source = metas.get(path, path)
        if source not in embedded:
            documents = corpora[path] if path in corpora else corpus_of(tests[path])
            embedded[source] = embed_corpus(encoder, documents, right, batch_size=args.batch_size)
        evaluations[path] = evaluate(
            encoder, tests[path], embedded[source], left, top_k=args.top_k, batch_size=args.batch_size
        )
        random[path] = random_ranking(tests[path], evaluations[path].document_ids, top_k=args.top_k)
    run = Run(evaluations, random, losses, time.perf_counter() - started, peak_memory(device), checkpoint)
    (folder / "results.json").write_text(
        json.dumps(
            {
                "options": {key: value for key, value in vars(args).items() if value != -math.inf},
                "loss": losses,
                "seconds": run.seconds,
                "peak_bytes": run.peak_bytes,
                "metrics": {path: evaluation.means for path, evaluation in evaluations.items()},
                "random": {path: evaluation.means for path, evaluation in random.items()},
                "per_query": {path: evaluation.rows() for path, evaluation in evaluations.items()},
            },
            indent=1,
        )
    )
    return run


def rows_of(side: dict[str, list[str]], rows: list[int]) -> dict[str, list[str]]:
    """Those rows of every field."""
    return {key: [cells[row] for row in rows] for key, cells in side.items()}


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then half a cosine down to 0; open_clip's schedule."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak for :func:`peak_memory`, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Where it cannot be reset, the peak is that of the whole process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a CUDA device, resident in memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    # macOS counts bytes where others count KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def metrics_table(rows: Sequence[tuple[str, str, Evaluation]]) -> str:
    """A table of (test set, run, evaluation) with ``TABLE_METRICS``, means over the queries."""
    sets, runs = max(len(test) for test, _, _ in rows), max(len(run) for _, run, _ in rows)
    head = f"{'test set':<{sets}}  {'run':<{runs}}  {'queries':>7}  " + "  ".join(
        f"{name:>7}" for name in TABLE_METRICS
    )
    lines = [head, "-" * len(head)]
    for test, run, evaluation in rows:
        values = "  ".join(f"{evaluation.means[name]:7.3f}" for name in TABLE_METRICS)
        lines.append(f"{test:<{sets}}  {run:<{runs}}  {len(evaluation.query_ids):>7}  {values}")
    return "\n".join(lines)
