"""Train an open_clip model on scored pairs: the run from its first check to its results.

    python -m gcl_kernels.training --train-data pairs.csv --left-keys "['query']" --right-keys "['title','image']" \\
        --weight-key score
    torchrun --nproc-per-node 8 -m gcl_kernels.training ...

The options are `gcl_kernels.training.TrainOptions`.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.training import checkpoint as checkpoints
from gcl_kernels.training import preflight, processes
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.feeding import Batch, Feeder, Place
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.folder import RunFolder
from gcl_kernels.training.inputs import Tables, TestFiles, expect_files, read_tests, read_training, training_rows
from gcl_kernels.training.journal import Journal
from gcl_kernels.training.learner import Learner
from gcl_kernels.training.memory import peak_memory, reset_peak_memory, shown_peak
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.ranking import Evaluation
from gcl_kernels.training.stopping import Stopped, Stopper
from gcl_kernels.training.tracking import Tracker, expect_packages
from gcl_kernels.training.train_options import TrainOptions
from gcl_kernels.training.validation import Validation

READ_SECONDS = 2.0
"""Losses are read, and processes agree on whether to stop, at intervals of about this time."""

CURVE_STEPS = 10
"""Steps between two points of a curve, unless --log-every-n-steps says otherwise."""


@dataclass
class Run:
    """What a training run leaves: one evaluation and one random ranking per `--val-data` file, and what it cost.

    `table` compares the evaluations; `peak_bytes` is None where the system does not tell.
    """

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    random: dict[str, Evaluation] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None
    checkpoint: Path | None = None
    table: str = ""


def train(options: TrainOptions, pairs: Any = None, tests: Mapping[str, Any] | None = None) -> Run:
    """Check, read, train, save, evaluate.

    Args:
        options: all that the command line has.
        pairs: the training rows in memory, in the place of `options.train_data`: a pandas DataFrame, a pyarrow Table or
            another table of Arrow's, or an iterable of mappings `{column: value}`. `options.image_root`, or the current
            folder, is what relative image paths start from.
        tests: such tables by name, for names in `options.val_data` that are no files: `{"held out": frame}`.

    Writes `LOGS/NAME/checkpoints/epoch_N.pt`, which `open_clip.create_model(MODEL, pretrained=FILE)` loads,
    `LOGS/NAME/out.log` and `LOGS/NAME/results.json`. Under torchrun every process calls it and all return the same
    losses; the first writes, and evaluates.

    Raises:
        TypeError: a table of a kind that is not read.
        InputError: files or options that cannot be used; nothing to learn; a name that has a run; a checkpoint that
            cannot be resumed or written; a loss that is not finite.
        Stopped: a signal has ended the run, after a checkpoint was saved if a step had been done.
    """
    if pairs is None and not options.train_data:
        raise InputError("train_data: expected a file, or pairs beside the options, got neither")
    if unknown := [name for name in tests or () if name not in options.val_data]:
        raise InputError(f"tests: expected names in val_data, {options.val_data}, got {unknown}")
    if pairs is not None:
        options = replace(options, train_data=options.train_data or "pairs")
    tables = {**(tests or {}), **({} if pairs is None else {options.train_data: pairs})}
    with processes.start() as group, Stopper() as stopper:
        folder = RunFolder(options.logs, options.name)
        training = _Training(options, group, folder, stopper, tables)
        try:
            if options.dry_run:
                group.alone(folder.look)
            else:
                group.alone(lambda: folder.hold(resumed=bool(options.resume)))
            return training.run()
        except Stopped as stopped:
            if training.saved:
                stopped.hint = (
                    f"--logs {options.logs} --name {options.name} --resume latest goes on after step {training.saved}"
                )
            raise
        finally:
            folder.close()


class _Training:
    """A run of one process among several."""

    def __init__(
        self, args: TrainOptions, group: processes.Processes, folder: RunFolder, stopper: Stopper, tables: Tables
    ) -> None:
        self.tables = tables
        self.args, self.group, self.folder, self.stopper = args, group, folder, stopper
        self.started = time.perf_counter()
        self.result = Run()
        self.first_step = self.saved = 0
        log = None if args.dry_run else folder.path / "out.log"
        self.journal = Journal(log, every=args.log_every_n_steps, silent=not group.first)
        reset_peak_memory(group.device)

    def run(self) -> Run:
        args, group = self.args, self.group
        # What takes seconds comes before what may take hours: a fault in it would come late.
        expect_files(args, self.tables)
        expect_packages(args.report_to)
        content = checkpoints.resume(args.resume, self.folder.checkpoints) if args.resume else None
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
        self.encoder = FieldEncoder(model, tokenizer, preprocess, workers=args.workers)
        self.learner = Learner(args, group, model, self.encoder)
        if content:
            self.learner.load(*content)
            # Reading may take hours, and needs the memory.
            content = content[0], content[1][checkpoints.OURS]
        elif group.first and not args.dry_run:
            self.folder.expect_room(self.learner.checkpoint_bytes)

        say = self.journal.say
        self.pairs = read_training(args, say, self.tables)
        tests = read_tests(args, say, self.tables) if group.first else TestFiles()
        self.scores, self.ids, self.sampler = training_rows(args, self.pairs, group.world)
        per_epoch = self.sampler.batches_per_epoch
        self.steps = args.epochs * per_epoch if args.steps is None else args.steps
        if self.steps:
            self.check(tokenizer, tests)
        # Reading takes each process its own time.
        group.meet()
        self.learner.begin()
        if args.dry_run:
            return self.dry_run()

        self.validation = Validation(args, self.encoder, tests, say)
        if content:
            self.resume(*content)
        elif args.resume and group.first:
            say(f"--resume {args.resume}: no checkpoint in {self.folder.checkpoints} yet, a new run")
        self.tracker = Tracker(args.report_to if group.first else "", self.folder.path, vars(args), self.first_step)
        if self.first_step < self.steps:
            self.announce()
            self.evaluate_what_was_due()
            self.loop()
        else:
            self.result.checkpoint = content[0] if content else None
            group.alone(lambda: self.evaluate(self.first_step))
        self.tracker.close()
        return self.results()

    def check(self, tokenizer: Any, tests: TestFiles) -> None:
        """Refuse a run that would learn nothing, and warn of one that learns little."""
        facts = preflight.facts_of(self.args, self.pairs, (self.scores, self.ids, self.sampler), tokenizer)
        preflight.expect_something_to_learn(self.args, facts)
        for warning in preflight.warnings_of(self.args, facts, tests) if self.group.first else ():
            self.journal.say(f"warning: {warning}")
        self.facts = facts

    def resume(self, path: Path, ours: dict[str, Any]) -> None:
        """Go on from where a checkpoint was saved."""
        group = self.group
        changed = checkpoints.changes(ours, vars(self.args), rows=len(self.pairs), world=group.world)
        if changed:
            self.journal.say(f"{path}: the run goes on, but differs from the one that was begun: {', '.join(changed)}")
        self.sampler.seek(ours["epoch"], ours["batch"])
        self.first_step = ours["step"]
        if path.parent == self.folder.checkpoints:
            self.saved = self.first_step
        self.validation.best, self.validation.history = ours["best"], ours["history"]
        self.result.losses = ours["losses"].tolist()
        checkpoints.set_random_state(ours["random"][group.rank % len(ours["random"])], group.device)
        self.journal.say(f"resumed from {path} at step {self.first_step} of {self.steps}")

    def announce(self) -> None:
        args, rows = self.args, self.sampler.batch_size
        kept = f"the {args.keep_last} newest checkpoints are kept" if args.keep_last else "all checkpoints are kept"
        fewer = " (there are no more)" if rows < args.batch_size * args.accum_freq * self.group.world else ""
        self.journal.say(
            f"{self.steps - self.first_step} steps of {rows} rows{fewer}, {len(self.sampler.rows)} rows an epoch; "
            f"{kept} in {self.folder.checkpoints}, of {self.learner.checkpoint_bytes / 2**20:.0f} MiB each (--keep-last)"
        )

    # ---- the loop

    def loop(self) -> None:
        args, group, feeder = self.args, self.group, self.feeder()
        self.folder.begun = True
        pending: list[Tensor] = []
        next_read, since = self.first_step + 1, time.perf_counter()
        with self.stopper.later():
            batches = self.journal.over(
                feeder.batches(self.steps - self.first_step), f"{args.name}: {args.score_to_weight}",
                first_step=self.first_step, steps=self.steps, rows=self.sampler.batch_size,
            )  # fmt: skip
            for step, batch in enumerate(batches, self.first_step + 1):
                pending.append(self.update(step - 1, batch))
                place = batch.place
                save_now, test_now = self.due(step, place, "save"), self.due(step, place, "val")
                on_curve = save_now or test_now or step % (args.log_every_n_steps or CURVE_STEPS) == 0
                stopping = self.stopper.asked if group.group is None else None
                if on_curve or step >= next_read or stopping:
                    stopping, seconds = self.read(pending, since, stopping)
                    pending, since = [], time.perf_counter()
                    next_read = step + max(1, int(READ_SECONDS / seconds))
                    loss, logits, lr = self.result.losses[-1], self.learner.logits, self.learner.lr
                    self.journal.after(step, loss, logits, lr)
                    if on_curve:
                        self.tracker.log(step, {"loss": loss, **logits, "lr": lr})
                if save_now or stopping:
                    self.save(step, place)
                if stopping:
                    raise Stopped(stopping)
                if test_now:
                    self.test(step, place, saved=save_now)
                    since = time.perf_counter()

    def feeder(self) -> Feeder:
        distinct = not self.learner.micro_batch
        return Feeder(self.pairs, self.encoder, self.sampler, self.group, distinct=distinct)

    def due(self, step: int, place: Place, what: str) -> bool:
        """Whether to `"save"` or to evaluate (`"val"`) after a step."""
        every, epochs = (getattr(self.args, f"{what}_{unit}") for unit in ("steps", "frequency"))
        return step == self.steps or due(step, every) or (place.ends_epoch and due(place.epochs_done, epochs))

    def file(self, step: int, place: Place) -> Path:
        """Where the checkpoint of a step goes."""
        whole = place.ends_epoch or step == self.steps
        return self.folder.checkpoints / (f"epoch_{max(place.epochs_done, 1)}.pt" if whole else f"step_{step}.pt")

    def update(self, step: int, batch: Batch) -> Tensor:
        lr = learning_rate(
            step, self.steps, min(self.args.warmup, self.steps // 10), self.args.lr, self.args.lr_scheduler
        )
        return self.learner.update(batch, self.scores[batch.rows], self.ids[batch.rows], lr)

    def read(self, pending: list[Tensor], since: float, stop: int | None) -> tuple[int | None, float]:
        """Add the losses of the steps since the last reading; the signal to stop at, and the seconds of a step.

        Reading waits for the device, so it is done for several steps at a time. All processes agree on what it returns.
        """
        losses = torch.stack(pending).double()
        seconds = (time.perf_counter() - since) / len(pending)
        if self.group.group is not None:
            asked = 0 if self.stopper.asked is None else 1
            shared = torch.cat([losses, losses.new_tensor([seconds, asked])])
            torch.distributed.all_reduce(shared)
            losses, seconds = shared[:-2] / self.group.world, shared[-2].item() / self.group.world
            stop = (self.stopper.asked or signal.SIGTERM) if shared[-1] else None
        done = self.result.losses
        if not losses.isfinite().all():
            place = int((~losses.isfinite()).nonzero()[0])
            raise InputError(f"step {len(done) + place + 1}: expected a finite loss, got {losses[place].item()}; a smaller "
                             f"--lr or --grad-clip-norm may help, and --resume goes on from the last checkpoint")  # fmt: skip
        done += losses.tolist()
        return stop, seconds

    def test(self, step: int, place: Place, *, saved: bool) -> None:
        """Evaluate, and save what that has changed: the history, and the best model so far."""
        with self.stopper.now():
            is_best = self.group.alone(lambda: self.evaluate(step))
        is_best, evaluated = map(any, zip(*self.group.gather((is_best, len(self.validation) > 0)), strict=True))
        # A checkpoint was saved before the evaluation, which may fail; now it holds the evaluation's history too.
        if is_best or (saved and evaluated):
            self.save(step, place, best=is_best)

    def evaluate(self, step: int) -> bool:
        is_best = self.validation.run(step)
        for path, found in self.validation.evaluations.items():
            self.tracker.log(step, {f"{Path(path).stem}/{name}": value for name, value in found.means.items()})
        return is_best

    def evaluate_what_was_due(self) -> None:
        """A run that ended between a checkpoint and the evaluation after it evaluates first."""
        step, place = self.first_step, Place.of(self.sampler)
        missing = step > 0 and self.due(step, place, "val") and not self.validation.has(step)
        if any(self.group.gather(self.group.first and missing)):
            self.test(step, place, saved=True)

    def save(self, step: int, place: Place, *, best: bool = False) -> None:
        states = self.group.gather(checkpoints.random_state(self.group.device))
        path = self.result.checkpoint = self.file(step, place)
        content = {"epoch": place.epochs_done, "name": self.args.name}
        content[checkpoints.OURS] = {
            "step": step, "epoch": place.epoch, "batch": place.number, "random": states, "best": self.validation.best,
            "history": self.validation.history, "losses": torch.tensor(self.result.losses, dtype=torch.float64),
            "options": vars(self.args), "rows": len(self.pairs),
        }  # fmt: skip

        def write() -> None:
            checkpoints.save(path, content | self.learner.state(), best=best)
            checkpoints.keep_last(path.parent, self.args.keep_last)

        self.group.alone(write)
        self.saved = step

    # ---- the end

    def results(self) -> Run:
        run, validation = self.result, self.validation
        run.seconds, run.peak_bytes = time.perf_counter() - self.started, peak_memory(self.group.device)
        if not self.group.first:
            return run
        if self.encoder.lost:
            self.journal.say(f"{len(self.encoder.lost)} images could not be read and were missing values")
        validation.rank_at_random()
        run.evaluations, run.random = validation.evaluations, validation.random
        if run.evaluations:
            run.table = validation.table()
            self.journal.say(run.table)
        results = {
            "options": {key: value for key, value in vars(self.args).items() if value != -math.inf},
            "loss": run.losses,
            **self.learner.logits,
            "seconds": run.seconds,
            "peak_bytes": run.peak_bytes,
            "lost_images": self.encoder.lost,
            "history": validation.history,
            "metrics": {path: evaluation.means for path, evaluation in run.evaluations.items()},
            "random": {path: evaluation.means for path, evaluation in run.random.items()},
            "per_query": {path: evaluation.rows() for path, evaluation in run.evaluations.items()},
        }
        write_json_atomically(self.folder.results, results, indent=1)
        if run.checkpoint:
            peak = shown_peak(run.peak_bytes)
            self.journal.say(f"{run.seconds:.0f} s, {peak}, step {self.steps}, checkpoint {run.checkpoint}")
        return run

    def dry_run(self) -> Run:
        """Two steps, the second timed, and the plan."""
        run, learner, sampler = self.result, self.learner, self.sampler
        reading, seconds = time.perf_counter() - self.started, 0.0
        for step, batch in enumerate(self.feeder().batches(min(2, self.steps))):
            before = time.perf_counter()
            run.losses.append(self.update(step, batch).item())
            seconds = time.perf_counter() - before
        run.seconds, run.peak_bytes = time.perf_counter() - self.started, peak_memory(self.group.device)
        weights = sum(weight.numel() for weight in learner.model.parameters())
        self.journal.say(
            f"plan: {self.steps} steps of {sampler.batch_size} rows on {self.group.world} process(es), "
            f"{len(sampler.rows)} rows an epoch\n"
            f"{preflight.described(self.facts)}\n"
            f"model: {self.args.model}, {weights / 1e6:.1f} M parameters, {learner.trained_weights / 1e6:.1f} M trained; a "
            f"checkpoint is about {learner.checkpoint_bytes / 2**20:.0f} MiB\n"
            f"{shown_peak(run.peak_bytes)} of a step on {self.group.device}\n"
            f"time: {reading:.0f} s of reading and building, {seconds:.2f} s a step, about "
            f"{self.steps * seconds / 60:.0f} min of training; evaluation comes on top\n"
            f"loss of the first step: {run.losses[0]:.3f}"
        )
        return run


def due(count: int, every: int) -> bool:
    """Whether it is time for what happens every so often, 0 being never."""
    return every > 0 and count % every == 0


def learning_rate(step: int, steps: int, warmup: int, peak: float, scheduler: str = "cosine") -> float:
    """Linear warm-up to `peak`, then half a cosine down to 0, or `peak` throughout (`"const"`); open_clip's schedules."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if scheduler == "const":
        return peak
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
