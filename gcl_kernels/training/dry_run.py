"""Two steps and the plan: what a run would take, without doing it."""

from __future__ import annotations

import time

from gcl_kernels.training import preflight
from gcl_kernels.training.loop import feeder_of, update
from gcl_kernels.training.memory import peak_memory, shown_peak
from gcl_kernels.training.preparing import Prepared
from gcl_kernels.training.results import Run


def dry_run(run: Prepared) -> Run:
    """Two steps, the second timed, and the plan."""
    around, learner, sampler, steps = run.around, run.learner, run.sampler, run.steps
    assert run.facts  # `TrainOptions` refuses a dry run without steps
    result = Run()
    reading, seconds = time.perf_counter() - around.started, 0.0
    for step, batch in enumerate(feeder_of(run).batches(min(2, steps))):
        before = time.perf_counter()
        result.losses.append(update(run, step, batch).item())
        seconds = time.perf_counter() - before
    result.seconds, result.peak_bytes = time.perf_counter() - around.started, peak_memory(around.group.device)
    weights = sum(weight.numel() for weight in learner.model.parameters())
    around.journal.say(
        f"plan: {steps} steps of {sampler.batch_size} rows on {around.group.world} process(es), "
        f"{len(sampler.rows)} rows an epoch\n"
        f"{preflight.described(run.facts)}\n"
        f"model: {around.options.model}, {weights / 1e6:.1f} M parameters, {learner.trained_weights / 1e6:.1f} M trained; a "
        f"checkpoint is about {learner.checkpoint_bytes / 2**20:.0f} MiB\n"
        f"{shown_peak(result.peak_bytes)} of a step on {around.group.device}\n"
        f"time: {reading:.0f} s of reading and building, {seconds:.2f} s a step, about "
        f"{steps * seconds / 60:.0f} min of training; evaluation comes on top\n"
        f"loss of the first step: {result.losses[0]:.3f}"
    )
    return result
