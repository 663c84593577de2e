"""What a run says while it works: a bar on a terminal, lines elsewhere, and both kinds of run in out.log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

NAME = "gcl_kernels.training"
"""Of the logger to which all that a run says goes."""

FIRST_PAUSE, LONGEST_PAUSE, SHARE = 10.0, 300.0, 0.02
"""Seconds between two lines: 2% of the time so far, at least 10 s and at most 5 minutes."""


class OfFirstProcess(logging.Filter):
    """Lets through what the first process of a run says, and errors of all."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self._first = first

    def filter(self, record: logging.LogRecord) -> bool:
        return self._first or record.levelno >= logging.ERROR


class Screen(logging.Handler):
    """Standard output, above a bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "bar_says_it", False):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class LogFile(logging.Handler):
    """A file that lines are added to, with the time before each. One that cannot be written is no reason to end the run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        # Opened for each line: nothing to close, and the folder may go away with a run that has not begun.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{self.format(record)}\n")


def logger_of_run(path: Path | None, *, first: bool) -> logging.Logger:
    """The logger of one run: to the screen, to `path`, and to the handlers of the logger `gcl_kernels.training`.

    That logger's level counts, else it is INFO. With a handler of its own on the screen, the run adds none. The root logger
    gets nothing: open_clip gives it a handler by the way, and every line would come twice.
    """
    parent = logging.getLogger(NAME)
    # Of its own, since a process may do several runs.
    logger = logging.Logger(f"{NAME}.run", parent.level or logging.INFO)
    logger.propagate = False
    logger.addFilter(OfFirstProcess(first))
    if not any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in parent.handlers):
        logger.addHandler(Screen())
    if path is not None and first:
        logger.addHandler(LogFile(path))
    for handler in parent.handlers:
        logger.addHandler(handler)
    return logger


class Journal:
    """What is said of a run, by Python's `logging`.

    Args:
        path: the log file, which lines are added to; None writes none.
        every: a line after every so many steps; None leaves it to the clock.
        silent: say nothing at all, as all processes but the first.
    """

    def __init__(self, path: Path | None, *, every: int | None, silent: bool = False) -> None:
        self._silent, self._every = silent, every
        self._logger = logger_of_run(path, first=not silent)
        self._first = self._steps = self._rows = self._last_step = 0
        self._bar: Any = None
        self._start = self._last = time.perf_counter()

    def say(self, text: str) -> None:
        """A line for the screen and the log."""
        self._logger.info(text)

    def warn(self, text: str) -> None:
        """A line of level WARNING."""
        self._logger.warning(f"warning: {text}")

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

    def after(self, step: int, loss: float, logits: Mapping[str, float], lr: float) -> bool:
        """A step whose loss is known: on the bar, and in a line where one is due; whether one was.

        `logits`: what `Learner.logits` says.
        """
        if self._silent:
            return False
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", scale=f"{logits['logit_scale']:.1f}", refresh=False)
        now = time.perf_counter()
        pause = min(max(FIRST_PAUSE, SHARE * (now - self._start)), LONGEST_PAUSE)
        by_clock = self._every is None and now - self._last >= pause
        by_count = self._every is not None and step % self._every == 0
        if not (by_clock or by_count or step in (self._first + 1, self._steps)):
            return False
        speed = (step - self._last_step) / max(now - self._last, 1e-9)
        rest = (self._steps - step) / speed
        of_logits = "  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in logits.items())
        line = (
            f"step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}  {of_logits}  "
            f"{self._rows * speed:.0f} rows/s  {clock(rest)} to go"
        )
        self._last, self._last_step = now, step
        shows_bar = self._bar is not None and not self._bar.disable
        self._logger.info(line, extra={"bar_says_it": shows_bar})
        return True


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
