"""What a run leaves: the evaluations, their table, and results.json, which is written as the run goes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.memory import peak_memory, shown_peak
from gcl_kernels.training.preparing import Prepared
from gcl_kernels.training.ranking import Evaluation


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


def write_results(run: Prepared, step: int, **more: Any) -> None:
    """Write LOGS/NAME/results.json as it is after a step; `finished` is true in a run's last one alone."""
    options, validation = run.around.options, run.validation
    results = {
        "finished": False,
        "step": step,
        "steps": run.steps,
        "options": {key: value for key, value in vars(options).items() if value != -math.inf},
        "loss": run.losses,
        **run.learner.logits,
        "lost_images": run.encoder.lost,
        "history": validation.history,
        "metrics": {path: evaluation.means for path, evaluation in validation.evaluations.items()},
    }
    write_json_atomically(run.around.folder.results, results | more, indent=1)


def finish(run: Prepared) -> Run:
    """Measure, compare, write and say what has become of a run that has done its last step."""
    group, say, validation = run.around.group, run.around.journal.say, run.validation
    seconds, peak = time.perf_counter() - run.around.started, peak_memory(group.device)
    result = Run(losses=run.losses, seconds=seconds, peak_bytes=peak, checkpoint=run.checkpoint)
    if not group.first:
        return result
    if run.encoder.lost:
        say(f"{len(run.encoder.lost)} images could not be read and were missing values")
    validation.rank_at_random()
    result.evaluations, result.random = validation.evaluations, validation.random
    if result.evaluations:
        result.table = validation.table()
        say(result.table)
    write_results(
        run,
        max(run.steps, run.first_step),
        finished=True,
        seconds=seconds,
        peak_bytes=peak,
        random={path: evaluation.means for path, evaluation in result.random.items()},
        per_query={path: evaluation.rows() for path, evaluation in result.evaluations.items()},
    )
    if run.checkpoint:
        say(f"{seconds:.0f} s, {shown_peak(peak)}, step {run.steps}, checkpoint {run.checkpoint}")
    return result
