"""What the terminal shows while requests are under way."""

from __future__ import annotations

import time
from collections import Counter

from limbeck.collect.endpoints.prices import cap_words, dollars
from limbeck.progress import Line

_EVERY = 0.2
"""Seconds between two notes."""


class Status:
    """Counts, and writes a note beside the bar now and then."""

    def __init__(self, line: Line, cap: int | None, priced: bool):
        self._line, self._cap, self._priced = line, cap, priced
        self._noted = 0.0
        self.answers = self.tokens = self.active = self.spent = 0
        self.errors: Counter[str] = Counter()
        """Requests that were not answered, by outcome."""

    def answered(self, spent: int) -> None:
        """One more answer is on the disk; so much was spent in all."""
        self.answers, self.spent = self.answers + 1, spent
        self._line.advance()
        self._note()

    def failed(self, outcome: str) -> None:
        """A request was not answered."""
        self.errors[outcome] += 1
        self._note()

    def _note(self) -> None:
        now = time.monotonic()
        if now - self._noted >= _EVERY:
            self.tell()

    def tell(self) -> None:
        """Write the note."""
        self._noted = time.monotonic()
        self._line.note(self.text())

    def text(self) -> str:
        """Spend and cap, requests under way, errors by kind."""
        money = []
        if self._priced:
            cap = f" of {cap_words(dollars(self._cap))}" if self._cap is not None else ""
            money = [f"${dollars(self.spent):,.4f}{cap}"]
        errors = [f"{kind} ×{count}" for kind, count in self.errors.most_common(4)]
        return ", ".join([*money, f"{self.active} at once", *errors])
