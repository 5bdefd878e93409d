"""What the terminal shows while batches are under way."""

from __future__ import annotations

from collections import Counter

from limbeck.collect.endpoints.prices import cap_words, dollars
from limbeck.progress import Line


class BatchStatus:
    """Counts, and writes a note beside the bar."""

    def __init__(self, line: Line, cap: int | None, priced: bool):
        self._line, self._cap, self._priced = line, cap, priced
        self.answers = self.tokens = self.spent = 0
        self.errors: Counter[str] = Counter()
        """Rows that were not answered, by outcome."""
        self._open: dict[str, tuple[str, int, int]] = {}

    def answered(self, tokens: int, *, ours: bool, shown: bool) -> None:
        """One more answer is on the disk; `ours` if this recipe pays for it, `shown` if the bar has not counted it."""
        self.answers += ours
        self.tokens += tokens if ours else 0
        if shown:
            self._line.advance()

    def advance(self, units: int) -> None:
        """So many answers are there of which the bar did not know."""
        self._line.advance(units)

    def looked(self, token: str, state: str, done: int, rows: int) -> None:
        """How a batch is."""
        self._open[token] = (state, done, rows)
        self.note()

    def over(self, token: str) -> None:
        """A batch is over."""
        self._open.pop(token, None)
        self.note()

    def note(self) -> None:
        """Show it."""
        self._line.note(self.text())

    def text(self) -> str:
        """Spend and cap, batches and how far they are, rows without an answer by kind."""
        parts = []
        if self._priced:
            cap = f" of {cap_words(dollars(self._cap))}" if self._cap is not None else ""
            parts.append(f"${dollars(self.spent):,.4f}{cap}")
        if self._open:
            states = Counter(state for state, *_ in self._open.values())
            done, rows = sum(d for _, d, _ in self._open.values()), sum(r for *_, r in self._open.values())
            told = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in states.most_common())
            parts.append(f"batches: {told}, {done:,} of {rows:,} rows")
        parts += [f"{kind} ×{count}" for kind, count in self.errors.most_common(4)]
        return "; ".join(parts)
