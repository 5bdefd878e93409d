"""A progress that can be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.progress import Line, Progress


class Watched(Progress):
    """A progress that keeps what it was told, in its order."""

    def __init__(self):
        super().__init__(None)
        self.told: list[str | float] = []

    @contextmanager
    def line(self, name: str, total: float | None, unit: str) -> Iterator[Line]:
        yield self

    def begin(self, text: str) -> None:
        self.told.append(text)

    def advance(self, units: float = 1) -> None:
        self.told.append(units)

    def note(self, text: str) -> None:
        self.told.append(text)
