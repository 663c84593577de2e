"""Requests that come while others are answered wait, and are then answered together, beside the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.to_thread


class Turns:
    """Calls `answer` with up to `most` requests at a time, in the order they came, in one thread at a time.

    `answer` gives a result or an exception for each.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]], most: int) -> None:
        self._answer, self._most = answer, most
        self._waiting: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._limiter = anyio.CapacityLimiter(1)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, request: Any) -> Any:
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, result))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await result

    async def _work(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            taken = [(request, result) for request, result in taken if not result.done()]
            try:
                requests = [request for request, _ in taken]
                answers = await anyio.to_thread.run_sync(self._answer, requests, limiter=self._limiter)
            except Exception as error:
                answers = [error] * len(taken)
            for (_, result), answer in zip(taken, answers, strict=True):
                if result.done():
                    continue
                if isinstance(answer, Exception):
                    result.set_exception(answer)
                else:
                    result.set_result(answer)
