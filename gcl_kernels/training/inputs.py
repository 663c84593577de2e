"""The files of a training run: pairs to train on, judged pairs to be evaluated on, and the corpora they are ranked in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.training.data import Columns, PairFile, Pairs, read_documents, shown
from gcl_kernels.training.errors import DataError, EmptyError
from gcl_kernels.training.ranking import corpus_of, known_documents, minmax, say_contradictions
from gcl_kernels.training.sampler import Sampler
from gcl_kernels.training.scaling import spread
from gcl_kernels.training.train_options import TrainOptions

Documents = dict[str, dict[str, str]]
"""`{id: {field: value}}`."""

Tables = Mapping[str, Any]
"""Tables in memory by the names that stand for them among the files of a run."""


@dataclass
class TestFiles:
    """The judged pairs of each `--val-data` file that has rows, and the corpora by the file that they come from.

    The scores of `pairs` are those from which the grades are made, `scaling.spread` of the file's.
    """

    pairs: dict[str, Pairs] = field(default_factory=dict)
    corpora: dict[str, Documents] = field(default_factory=dict)
    corpus_of: dict[str, str] = field(default_factory=dict)


def columns_of(args: TrainOptions) -> Columns:
    """What the columns of the run's files mean."""
    left, right = (
        dict(zip(keys, kinds, strict=True))
        for keys, kinds in zip((args.left_keys, args.right_keys), args.img_or_txt, strict=True)
    )
    return Columns(left, right, args.weight_key, args.query_id_key, args.doc_id_key)


def pair_file(
    args: TrainOptions, path: str, *, check_images: str, ids_alone: bool = False, table: Any = None
) -> PairFile:
    """One of the run's files; of its documents the ids alone where a corpus has their fields, as in `evaluate`."""
    columns = columns_of(args)
    if ids_alone:
        columns = replace(columns, right={args.doc_id_key: "txt"})
    return PairFile(
        path, columns, separator=args.csv_separator, dataset_type=args.dataset_type, check_images=check_images,
        skip_bad_rows=args.skip_bad_rows, image_root=args.image_root, table=table,
    )  # fmt: skip


def expect_files(args: TrainOptions, tables: Tables) -> None:
    """Raise DataError for a test file that is not there, before the training file, a large one, is read.

    A name that may stand for others is left to its reader.
    """
    for path in (*args.val_data, *args.doc_meta):
        if path not in tables and not (os.path.lexists(path) or set(str(path)) & set("*?[{")):
            raise DataError(f"{path}: expected a readable file, got '{os.strerror(2)}'")


def read_pair_file(
    args: TrainOptions, path: str, say: Callable[[str], None], tables: Tables, *, ids_alone: bool = False
) -> PairFile:
    """One of the run's files or tables, and what it holds in words."""
    pairs = pair_file(args, path, check_images=args.check_images, ids_alone=ids_alone, table=tables.get(path))
    queries, documents = (len(ids.unique()) for ids in (pairs.query_numbers, pairs.document_numbers))
    say(f"{path}: {len(pairs)} pairs, {queries} queries, {documents} documents")
    if pairs.bad_count:
        lines = shown(pairs.bad_rows, pairs.bad_count)
        say("\n  ".join([f"{path}: {pairs.bad_count} bad rows skipped:", *lines]))
    return pairs


def read_training(args: TrainOptions, say: Callable[[str], None], tables: Tables) -> PairFile:
    """The `--train-data` file or table."""
    pairs = read_pair_file(args, args.train_data, say, tables)
    if count := repeated_pairs(pairs):
        say(f"warning: {args.train_data}: {count} pairs of query and document come more than once, with different scores; all "
            f"of their rows are trained on")  # fmt: skip
    return pairs


def read_tests(args: TrainOptions, say: Callable[[str], None], tables: Tables) -> TestFiles:
    """The `--val-data` and `--doc-meta` files or tables.

    Raises:
        DataError: as their readers; a corpus without any value of the right fields, or without any judged document.
    """
    tests = TestFiles()
    kinds = columns_of(args).right
    metas = dict(zip(args.val_data, args.doc_meta, strict=False))
    for path in args.val_data:
        try:
            pairs = read_pair_file(
                args, path, say, tables, ids_alone=path in metas and args.doc_id_key is not None
            ).take()
        except EmptyError as error:
            say(f"{error}; passed over")
            continue
        meta = tests.corpus_of[path] = metas.get(path, path)
        new = meta not in tests.corpora
        if new:
            tests.corpora[meta] = (
                read_documents(
                    meta,
                    kinds,
                    check_images=args.check_images,
                    skip_bad_rows=args.skip_bad_rows,
                    image_root=args.image_root,
                    say=say,
                )
                if path in metas
                else corpus_of(pairs)
            )
        known_documents(path, pairs, tests.corpora[meta], say)
        say_contradictions(path, pairs, say)
        if new:
            expect_fields(meta, tests.corpora[meta], list(kinds), say)
        pairs.scores = spread(torch.tensor(pairs.scores, dtype=torch.float64), args.score_scaling).tolist()
        tests.pairs[path] = pairs
    return tests


def expect_fields(path: str, corpus: Documents, keys: list[str], say: Callable[[str], None]) -> None:
    """Raise DataError for a corpus in which no document has a value; say which fields no document has."""
    without = [key for key in keys if not any(document.get(key) for document in corpus.values())]
    if len(without) == len(keys):
        raise DataError(f"{path}: expected a document with a value in one of {keys}, got none among {len(corpus)}")
    for key in without:
        say(f"warning: {path}: none of the {len(corpus)} documents has a value in '{key}'")


def repeated_pairs(pairs: PairFile) -> int:
    """How many pairs of a query and a document come more than once, with different scores."""
    ids = torch.stack([pairs.query_numbers, pairs.document_numbers], dim=1)
    _, pair, counts = ids.unique(dim=0, return_inverse=True, return_counts=True)
    if len(counts) == len(ids):
        return 0
    low, high = (
        pairs.scores.new_zeros(len(counts)).scatter_reduce(0, pair, pairs.scores, how, include_self=False)
        for how in ("amin", "amax")
    )
    return int((low < high).sum())


def training_rows(args: TrainOptions, pairs: PairFile, world: int = 1) -> tuple[Tensor, Tensor, Sampler]:
    """The scores (N,), float32, and the ids (N, 2) of all rows, and the sampler of those that are trained on.

    Raises:
        DataError: scores out of range, none at `--min-score` or above, fewer rows than processes.
    """
    low, high = pairs.scores.min().item(), pairs.scores.max().item()
    if args.score_scaling == "none" and not 1 <= low <= high <= args.s_max:
        raise DataError(
            f"{args.train_data}: expected scores in [1, {args.s_max:g}] with --score-scaling none, got {low:g} to {high:g}"
        )
    scaled = pairs.scores if args.score_scaling == "none" else minmax(spread(pairs.scores, args.score_scaling))
    used = (pairs.scores >= args.min_score).nonzero().flatten()
    if len(used) == 0:
        raise DataError(f"{args.train_data}: expected a score >= --min-score {args.min_score:g}, got {high:g} at most")
    # A row's query and document are positives of each other in its own row alone; where they come again, with the same
    # query or the same document, other rows are no negatives.
    ids = torch.stack([pairs.query_numbers, pairs.document_numbers], dim=1)
    batch_size = min(args.batch_size * args.accum_freq * world, len(used))
    if batch_size < world:
        raise DataError(f"{args.train_data}: expected a row for each of {world} processes, got {batch_size} in all")
    distinct = ids[used] if args.false_negatives == "avoid" else None
    return scaled.float(), ids, Sampler(used, batch_size, seed=args.seed, least=world, ids=distinct)
