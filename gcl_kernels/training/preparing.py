"""A run before its first step: everything read, made and checked, or as a checkpoint holds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.training import checkpoint as checkpoints
from gcl_kernels.training import preflight
from gcl_kernels.training.data import PairFile
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.folder import RunFolder
from gcl_kernels.training.inputs import Tables, TestFiles, expect_files, read_tests, read_training, training_rows
from gcl_kernels.training.journal import Journal
from gcl_kernels.training.learner import Learner
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.processes import Processes
from gcl_kernels.training.sampler import Sampler
from gcl_kernels.training.tracking import expect_packages
from gcl_kernels.training.train_options import TrainOptions
from gcl_kernels.training.validation import Validation


@dataclass(frozen=True)
class Surroundings:
    """Where a run works: its options, its processes, its folder, what it speaks through, and its tables by name."""

    options: TrainOptions
    group: Processes
    folder: RunFolder
    journal: Journal
    tables: Tables
    started: float = field(default_factory=time.perf_counter)


@dataclass
class Prepared:
    """A run that is ready for its next step.

    Args:
        pairs: the rows, of which `scores` (N,) and `ids` (N, 2) are in memory, and `sampler` draws batches.
        steps: of the whole run; `first_step` of them are done.
        facts: what there is to learn; None for a run without steps.
        losses: of the steps so far.
        saved: the step of the newest checkpoint in the run's own folder, `checkpoint` that checkpoint or the one begun from.
    """

    around: Surroundings
    pairs: PairFile
    encoder: FieldEncoder
    learner: Learner
    scores: Tensor
    ids: Tensor
    sampler: Sampler
    steps: int
    facts: preflight.Facts | None
    validation: Validation
    first_step: int = 0
    losses: list[float] = field(default_factory=list)
    saved: int = 0
    checkpoint: Path | None = None


def prepare(around: Surroundings) -> Prepared:
    """Read, make and check all that a run needs. What takes seconds comes before what may take hours: a fault in it would
    come late."""
    args, group, say = around.options, around.group, around.journal.say
    expect_files(args, around.tables)
    expect_packages(args.report_to)
    content = checkpoints.resume(args.resume, around.folder.checkpoints, say) if args.resume else None
    encoder, tokenizer = encoder_of(args, group, say)
    learner = Learner(args, group, encoder.model, encoder)
    if content:
        learner.load(*content)
        # Reading may take hours, and needs the memory.
        content = content[0], content[1][checkpoints.OURS]
    elif group.first and not args.dry_run:
        around.folder.expect_room(learner.checkpoint_bytes)

    pairs = read_training(args, say, around.tables)
    tests = read_tests(args, say, around.tables) if group.first else TestFiles()
    rows = scores, ids, sampler = training_rows(args, pairs, group.world)
    steps = args.epochs * sampler.batches_per_epoch if args.steps is None else args.steps
    facts = preflight.facts_of(args, pairs, rows, tokenizer) if steps else None
    if facts:
        preflight.expect_something_to_learn(args, facts)
        for warning in preflight.warnings_of(args, facts, tests) if group.first else ():
            around.journal.warn(warning)
    # Reading takes each process its own time.
    group.meet()
    learner.begin()
    validation = Validation(args, encoder, tests, say)
    run = Prepared(around, pairs, encoder, learner, scores, ids, sampler, steps, facts, validation)
    if args.dry_run:
        return run
    if content:
        go_on(run, *content)
    elif args.resume:
        say(f"--resume {args.resume}: no checkpoint in {around.folder.checkpoints} yet, a new run")
    return run


def encoder_of(args: TrainOptions, group: Processes, say: Callable[[str], None]) -> tuple[FieldEncoder, Any]:
    """The model as it is before training, with what makes its inputs, and its tokenizer."""
    torch.manual_seed(args.seed)
    model, tokenizer, preprocess = group.in_turn(
        lambda: create_model(
            args.model,
            pretrained=args.pretrained,
            context_length=args.context_length,
            device=group.device,
            biased=args.loss == "sigmoid",
        )
    )
    return FieldEncoder(model, tokenizer, preprocess, workers=args.workers, say=say), tokenizer


def go_on(run: Prepared, path: Path, ours: dict[str, Any]) -> None:
    """Go on from where a checkpoint was saved; its weights are loaded already."""
    group, say = run.around.group, run.around.journal.say
    changed = checkpoints.changes(ours, vars(run.around.options), rows=len(run.pairs), world=group.world)
    if changed:
        say(f"{path}: the run goes on, but differs from the one that was begun: {', '.join(changed)}")
    run.sampler.seek(ours["epoch"], ours["batch"])
    run.first_step, run.checkpoint = ours["step"], path
    if path.parent == run.around.folder.checkpoints:
        run.saved = run.first_step
    run.validation.best, run.validation.history = ours["best"], ours["history"]
    run.losses = ours["losses"].tolist()
    checkpoints.set_random_state(ours["random"][group.rank % len(ours["random"])], group.device)
    say(f"resumed from {path} at step {run.first_step} of {run.steps}")
