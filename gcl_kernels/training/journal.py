"""What a run says while it works: a bar on a terminal, lines elsewhere, and both kinds of run in out.log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE, SHARE = 10.0, 300.0, 0.02
"""Seconds between two lines: 2% of the time so far, at least 10 s and at most 5 minutes."""


class Journal:
    """What is said of a run.

    Args:
        path: the log file, which lines are added to; None writes none.
        every: a line after every so many steps; None leaves it to the clock.
        silent: say nothing at all, as all processes but the first.
    """

    def __init__(self, path: Path | None, *, every: int | None, silent: bool = False) -> None:
        self._path, self._silent, self._every = None if silent else path, silent, every
        self._first = self._steps = self._rows = self._last_step = 0
        self._bar: Any = None
        self._start = self._last = time.perf_counter()

    def say(self, text: str) -> None:
        """A line for the screen and the log."""
        if self._silent:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        self._log(text)

    def over(self, batches: Iterable[T], name: str, *, first_step: int, steps: int, rows: int) -> Iterator[T]:
        """The batches of `rows` rows for the steps after `first_step` up to `steps`, with a bar on a terminal."""
        self._first = self._last_step = first_step
        self._steps, self._rows = steps, rows
        self._start = self._last = time.perf_counter()
        self._bar = tqdm(
            batches, desc=name, unit="step", mininterval=1.0, initial=first_step, total=steps,
            disable=True if self._silent else None,
        )  # fmt: skip
        return iter(self._bar)

    def after(self, step: int, loss: float, logits: Mapping[str, float], lr: float) -> None:
        """A step whose loss is known: on the bar, and in a line where one is due. `logits`: what `Learner.logits` says."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", scale=f"{logits['logit_scale']:.1f}", refresh=False)
        now = time.perf_counter()
        pause = min(max(FIRST_PAUSE, SHARE * (now - self._start)), LONGEST_PAUSE)
        by_clock = self._every is None and now - self._last >= pause
        by_count = self._every is not None and step % self._every == 0
        if not (by_clock or by_count or step in (self._first + 1, self._steps)):
            return
        speed = (step - self._last_step) / max(now - self._last, 1e-9)
        rest = (self._steps - step) / speed
        of_logits = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in logits.items())
        line = (
            f"step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}  {of_logits}  "
            f"{self._rows * speed:.0f} rows/s  {clock(rest)} to go"
        )
        self._last, self._last_step = now, step
        # A bar that is shown says it all.
        if self._bar is not None and not self._bar.disable:
            self._log(line)
        else:
            self.say(line)

    def _log(self, line: str) -> None:
        # A log that cannot be written is no reason to end the run.
        if self._path is not None:
            with (
                contextlib.suppress(OSError),
                self._path.open("a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
