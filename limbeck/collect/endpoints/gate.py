"""Lets requests wait for a `Pacer`, first come, first served."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from limbeck.collect.endpoints.pacing import Pacer


class Gate:
    """Requests wait here until the pacer lets them go. Who tells the pacer what became of one calls `turn` after."""

    def __init__(self, pacer: Pacer):
        self.pacer = pacer
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, asyncio.Future[float]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def leave(self, tokens: int) -> float:
        """Returns when a request of so many tokens may leave, with the time."""
        if not self._waiting and self.pacer.wait(now := self._loop.time(), tokens) == 0:
            self.pacer.left(now, tokens)
            return now
        waiter: asyncio.Future[float] = self._loop.create_future()
        self._waiting.append((tokens, waiter))
        self.turn()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.pacer.cancelled()
                self.turn()
            raise

    def turn(self) -> None:
        """Let go whoever may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            tokens, waiter = self._waiting[0]
            if waiter.done():
                self._waiting.popleft()
                continue
            now = self._loop.time()
            wait = self.pacer.wait(now, tokens)
            if wait > 0:
                if wait < math.inf:
                    self._timer = self._loop.call_later(wait, self.turn)
                return
            self._waiting.popleft()
            self.pacer.left(now, tokens)
            waiter.set_result(now)
