"""Ctrl-C and the signals that ask a process to end: the step at hand is finished and saved first."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
"""The names that a platform may have: Windows alone has SIGBREAK."""

AGAIN_SECONDS = 2.0
"""A second signal within this time is the first one once more, as where a terminal and a launcher both send it."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the run. `number` is the signal's, `hint` says from where the run goes on."""

    def __init__(self, number: int, hint: str = "") -> None:
        super().__init__(number)
        self.number, self.hint = number, hint

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.hint or 'nothing is saved yet'}"


class Stopper:
    """In its `with` block a signal raises `Stopped`; within `later()` it only sets `asked`, unless it is sent twice."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._since = 0.0
        self._wait = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        # Only the main thread may set handlers; in another one signals do what they did before.
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """What is done here ends before the process does; `asked` says whether it is to."""
        yield from self._waiting(True)

    @contextlib.contextmanager
    def now(self) -> Iterator[None]:
        """Within `later()`, what may be broken off at any moment."""
        yield from self._waiting(False)

    def _waiting(self, wait: bool) -> Iterator[None]:
        before, self._wait = self._wait, wait
        try:
            if self.asked is not None and not wait:
                raise Stopped(self.asked)
            yield
        finally:
            self._wait = before

    def _handle(self, number: int, _: FrameType | None) -> None:
        first, now = self.asked is None, time.monotonic()
        if first:
            self.asked, self._since = number, now
        if not self._wait or (not first and now - self._since > AGAIN_SECONDS):
            raise Stopped(number)
