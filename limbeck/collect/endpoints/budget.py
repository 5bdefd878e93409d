"""The cap on money: the most that a request can cost is set aside before it is sent.

Law: what is spent and what is set aside together never pass the cap, so the bill never does, as long as no request
costs more than was set aside for it. Should one do so, everything set aside later grows by the same factor.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from fractions import Fraction


class Budget:
    """Money of one recipe, in picodollars. Knows nothing of time; `Purse` lets requests wait for it."""

    def __init__(self, cap: int | None, spent: int = 0):
        self.cap = cap
        self.spent = spent
        """What was billed, and what may have been."""
        self.held = 0
        """What is set aside for requests that are under way."""
        self._factor = Fraction(1)

    def hold(self, worst: int) -> int | None:
        """Set the worst case of a request aside; gives what was set aside, or None where the cap leaves no room for
        it.
        """
        amount = worst if self._factor == 1 else math.ceil(worst * self._factor)  # the product takes 3 µs
        if self.cap is not None and self.spent + self.held + amount > self.cap:
            return None
        self.held += amount
        return amount

    def settle(self, held: int, cost: int) -> None:
        """A request is over: it cost so much, and what was held for it is free again."""
        self.held -= held
        self.spent += cost
        if held and cost > held:
            self._factor *= Fraction(cost, held)

    @property
    def left(self) -> int | None:
        """What could still be set aside; None without a cap."""
        return None if self.cap is None else self.cap - self.spent - self.held


class CapReachedError(Exception):
    """Nothing is under way, and the next request does not fit under the cap."""


class Purse:
    """A `Budget` that requests wait for, first come, first served: what was set aside for others may come free."""

    def __init__(self, budget: Budget):
        self.budget = budget
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    async def hold(self, worst: int) -> int:
        """Set aside, as soon as there is room. Raises `CapReachedError` where there never will be."""
        if not self._waiting and (held := self.budget.hold(worst)) is not None:
            return held
        if not self.budget.held:
            raise CapReachedError
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((worst, waiter))
        return await waiter

    def settle(self, held: int, cost: int) -> None:
        """See `Budget.settle`; those who wait for it are served."""
        self.budget.settle(held, cost)
        while self._waiting:
            worst, waiter = self._waiting[0]
            if waiter.done():
                self._waiting.popleft()
                continue
            got = self.budget.hold(worst)
            if got is None and self.budget.held:
                return
            self._waiting.popleft()
            if got is None:
                waiter.set_exception(CapReachedError())
            else:
                waiter.set_result(got)
