"""Train an open_clip model on scored pairs: the run from its first check to its results.

    python -m gcl_kernels.training --train-data pairs.csv --left-keys "['query']" --right-keys "['title','image']" \\
        --weight-key score
    torchrun --nproc-per-node 8 -m gcl_kernels.training ...

The options are `gcl_kernels.training.TrainOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gcl_kernels.training import processes
from gcl_kernels.training.dry_run import dry_run
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.folder import RunFolder
from gcl_kernels.training.journal import Journal
from gcl_kernels.training.loop import Loop
from gcl_kernels.training.memory import reset_peak_memory
from gcl_kernels.training.preparing import Prepared, Surroundings, prepare
from gcl_kernels.training.results import Run, finish
from gcl_kernels.training.stopping import Stopped, Stopper
from gcl_kernels.training.train_options import TrainOptions


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
        if options.train_data in (tests or {}):
            raise InputError(f"tests: expected other names than that of the training rows, got '{options.train_data}'")
    tables = {**(tests or {}), **({} if pairs is None else {options.train_data: pairs})}
    with processes.start() as group, Stopper() as stopper:
        reset_peak_memory(group.device)
        folder = RunFolder(options.logs, options.name)
        log = None if options.dry_run else folder.path / "out.log"
        journal = Journal(log, every=options.log_every_n_steps, silent=not group.first)
        around = Surroundings(options, group, folder, journal, tables)
        prepared: Prepared | None = None
        try:
            group.alone(folder.look if options.dry_run else lambda: folder.hold(resumed=bool(options.resume)))
            prepared = prepare(around)
            if options.dry_run:
                return dry_run(prepared)
            Loop(prepared, stopper).learn()
            return finish(prepared)
        except Stopped as stopped:
            if prepared and prepared.saved:
                stopped.hint = (
                    f"--logs {options.logs} --name {options.name} --resume latest goes on after step {prepared.saved}"
                )
            raise
        finally:
            folder.close()
