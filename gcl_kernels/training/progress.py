"""How far long work is: a bar in a terminal, else a line now and then, so that a batch job's log shows that it is alive."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines, where there is no terminal."""


class Progress:
    """A context in which `add(count)` says that so many of `total` things named `what` are done."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()
        # `disable=None`: no bar without a terminal.
        self._bar: Any = tqdm(total=total, desc=what, unit="", unit_scale=True, leave=False, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= SECONDS:
            self._said = now
            rate = self._done / (now - self._started)
            print(
                f"{self._what}: {self._done} of {self._total}, {rate:.0f}/s, "
                f"about {(self._total - self._done) / rate:.0f} s left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
