"""The steps of a run: batch after batch, saved and evaluated on the way."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from gcl_kernels.training import checkpoint as checkpoints
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.feeding import Batch, Feeder, Place
from gcl_kernels.training.preparing import Prepared
from gcl_kernels.training.results import write_results
from gcl_kernels.training.stopping import Stopped, Stopper
from gcl_kernels.training.tracking import Tracker

READ_SECONDS = 2.0
"""Losses are read, and processes agree on whether to stop, at intervals of about this time."""

CURVE_STEPS = 10
"""Steps between two points of a curve, unless --log-every-n-steps says otherwise."""


class Loop:
    """Takes a run from where it is to its last step; `learn` is the whole of it."""

    def __init__(self, run: Prepared, stopper: Stopper) -> None:
        self.run, self.stopper = run, stopper
        around = run.around
        self.args, self.group, self.folder, self.journal = around.options, around.group, around.folder, around.journal
        reports = self.args.report_to if self.group.first else ""
        self.tracker = Tracker(reports, self.folder.path, vars(self.args), run.first_step)

    def learn(self) -> None:
        if self.run.first_step < self.run.steps:
            self.announce()
            self.evaluate_what_was_due()
            self.steps()
        else:
            self.group.alone(lambda: self.evaluate(self.run.first_step))
        self.tracker.close()

    def announce(self) -> None:
        args, rows = self.args, self.run.sampler.batch_size
        kept = f"the {args.keep_last} newest checkpoints are kept" if args.keep_last else "all checkpoints are kept"
        fewer = " (there are no more)" if rows < args.batch_size * args.accum_freq * self.group.world else ""
        self.journal.say(
            f"{self.run.steps - self.run.first_step} steps of {rows} rows{fewer}, {len(self.run.sampler.rows)} rows an epoch; "
            f"{kept} in {self.folder.checkpoints}, of {self.run.learner.checkpoint_bytes / 2**20:.0f} MiB each (--keep-last)"
        )

    def steps(self) -> None:
        run, args, group = self.run, self.args, self.group
        self.folder.begun = True
        pending: list[Tensor] = []
        next_read, since = run.first_step + 1, time.perf_counter()
        with self.stopper.later():
            batches = self.journal.over(
                feeder_of(run).batches(run.steps - run.first_step), f"{args.name}: {args.score_to_weight}",
                first_step=run.first_step, steps=run.steps, rows=run.sampler.batch_size,
            )  # fmt: skip
            for step, batch in enumerate(batches, run.first_step + 1):
                pending.append(update(run, step - 1, batch))
                place = batch.place
                save_now, test_now = self.due(step, place, "save"), self.due(step, place, "val")
                on_curve = save_now or test_now or step % (args.log_every_n_steps or CURVE_STEPS) == 0
                stopping = self.stopper.asked if group.group is None else None
                if on_curve or step >= next_read or stopping:
                    stopping, seconds = self.read(pending, since, stopping)
                    pending, since = [], time.perf_counter()
                    next_read = step + max(1, int(READ_SECONDS / seconds))
                    loss, logits, lr = run.losses[-1], run.learner.logits, run.learner.lr
                    if self.journal.after(step, loss, logits, lr):
                        self.note(step)
                    if on_curve:
                        self.tracker.log(step, {"loss": loss, **logits, "lr": lr})
                if save_now or stopping:
                    self.save(step, place)
                if stopping:
                    raise Stopped(stopping)
                if test_now:
                    self.test(step, place, saved=save_now)
                    since = time.perf_counter()

    def note(self, step: int) -> None:
        """Write results.json as it is now; that it cannot be written is no reason to end a run that goes on."""
        with contextlib.suppress(InputError, OSError):
            write_results(self.run, step)

    def due(self, step: int, place: Place, what: str) -> bool:
        """Whether to `"save"` or to evaluate (`"val"`) after a step."""
        every, epochs = (getattr(self.args, f"{what}_{unit}") for unit in ("steps", "frequency"))
        return step == self.run.steps or due(step, every) or (place.ends_epoch and due(place.epochs_done, epochs))

    def file(self, step: int, place: Place) -> Path:
        """Where the checkpoint of a step goes."""
        whole = place.ends_epoch or step == self.run.steps
        return self.folder.checkpoints / (f"epoch_{max(place.epochs_done, 1)}.pt" if whole else f"step_{step}.pt")

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
        done = self.run.losses
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
        is_best, evaluated = map(any, zip(*self.group.gather((is_best, len(self.run.validation) > 0)), strict=True))
        # A checkpoint was saved before the evaluation, which may fail; now it holds the evaluation's history too.
        if is_best or (saved and evaluated):
            self.save(step, place, best=is_best)

    def evaluate(self, step: int) -> bool:
        is_best = self.run.validation.run(step)
        for path, found in self.run.validation.evaluations.items():
            self.tracker.log(step, {f"{Path(path).stem}/{name}": value for name, value in found.means.items()})
        self.note(step)
        return is_best

    def evaluate_what_was_due(self) -> None:
        """A run that ended between a checkpoint and the evaluation after it evaluates first."""
        step, place = self.run.first_step, Place.of(self.run.sampler)
        missing = step > 0 and self.due(step, place, "val") and not self.run.validation.has(step)
        if any(self.group.gather(self.group.first and missing)):
            self.test(step, place, saved=True)

    def save(self, step: int, place: Place, *, best: bool = False) -> None:
        states = self.group.gather(checkpoints.random_state(self.group.device))
        path = self.run.checkpoint = self.file(step, place)
        content = {"epoch": place.epochs_done, "name": self.args.name}
        content[checkpoints.OURS] = {
            "step": step, "epoch": place.epoch, "batch": place.number, "random": states, "best": self.run.validation.best,
            "history": self.run.validation.history, "losses": torch.tensor(self.run.losses, dtype=torch.float64),
            "options": vars(self.args), "rows": len(self.run.pairs),
        }  # fmt: skip

        def write() -> None:
            checkpoints.save(path, content | self.run.learner.state(), best=best)
            checkpoints.keep_last(path.parent, self.args.keep_last)
            self.note(step)

        self.group.alone(write)
        self.run.saved = step


def feeder_of(run: Prepared) -> Feeder:
    """What makes the inputs of its steps."""
    distinct = not run.learner.micro_batch
    return Feeder(run.pairs, run.encoder, run.sampler, run.around.group, distinct=distinct)


def update(run: Prepared, step: int, batch: Batch) -> Tensor:
    """One step, counted from 0, at its learning rate; returns the loss."""
    args = run.around.options
    lr = learning_rate(step, run.steps, min(args.warmup, run.steps // 10), args.lr, args.lr_scheduler)
    return run.learner.update(batch, run.scores[batch.rows], run.ids[batch.rows], lr)


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
