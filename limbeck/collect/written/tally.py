"""What became of the candidates of a source of written prompts, and when there is no use in having more written."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.errors import InputError, Problem
from limbeck.progress import Line
from limbeck.records import Digest, Message, Parent

TRIES = 20
"""Candidates for each prompt asked for, before giving up. SmolLM2-135M needs 1.4 for prompts of its own."""
VAIN = 320
"""Candidates that may be dropped one after the other. Where one in 20 is kept, as few as TRIES allows, any 320 are all
dropped by a chance of 0.95^320, less than one in ten million."""


class Piece(NamedTuple):
    """Something to start from, or that was written: a seed, a persona, a piece of a document, a prompt."""

    messages: tuple[Message, ...]
    parents: tuple[Parent, ...]
    """Rows of files that it is, or was made from."""
    before: tuple[Digest, ...] = ()
    """Prompts of the same source that it was made from."""

    @property
    def text(self) -> str:
        """What its user says."""
        return self.messages[-1].content


class Shown:
    """The line of a source of prompts, for two that know of different things: whoever has candidates written (this is a
    `Line` to him) and the `Tally` of what was kept of them. It moves by prompts that are kept, or by answers alone.
    """

    def __init__(self, line: Line, *, by_answers: bool = False):
        self._line, self._by_answers = line, by_answers
        self._written = self._kept = ""

    def advance(self, units: float = 1) -> None:
        """So many requests more were answered, which makes no prompt yet."""
        if self._by_answers:
            self._line.advance(units)

    def note(self, text: str) -> None:
        """How far the writing is."""
        self._written = text
        self._tell()

    def kept(self, kept: int, candidates: int, *, one_more: bool) -> None:
        """So many candidates were kept, of as many as were looked at."""
        self._kept = f"{kept:,} of {candidates:,} candidates kept"
        if one_more and not self._by_answers:
            self._line.advance()
        self._tell()

    def _tell(self) -> None:
        self._line.note(", ".join(part for part in (self._kept, self._written) if part))


class Tally:
    """The prompts of one source that were kept, and counts of all candidates. Shows on `line` how it goes."""

    def __init__(self, where: str, count: int, line: Shown):
        self.kept: list[Piece] = []
        self.candidates = 0
        self.tokens = 0
        """Of all candidates."""
        self.dropped: Counter[str] = Counter()
        self._where, self._count, self._line, self._in_vain = where, count, line, 0

    def keep(self, piece: Piece, tokens: int) -> None:
        """One candidate is a prompt."""
        self.kept.append(piece)
        self._in_vain = 0
        self._counted(tokens, one_more=True)

    def drop(self, reason: str, tokens: int) -> None:
        """One candidate is not."""
        self.dropped[reason] += 1
        self._in_vain += 1
        self._counted(tokens, one_more=False)

    def _counted(self, tokens: int, *, one_more: bool) -> None:
        self.candidates += 1
        self.tokens += tokens
        self._line.kept(len(self.kept), self.candidates, one_more=one_more)

    def refuse_vain(self) -> None:
        """To be asked before another candidate is looked at. Raises `InputError` with what was kept and dropped where
        there were `TRIES` candidates for each prompt, or none of the last `VAIN` was kept.
        """
        if self.candidates < TRIES * self._count and self._in_vain < VAIN:
            return
        share = f"{len(self.kept) / self.candidates:.1%}; " if self.candidates else ""
        dropped = ", ".join(f"{reason}: {n}" for reason, n in self.dropped.most_common())
        found = f"{len(self.kept)} of {self.candidates} candidates kept ({share}{dropped})"
        if self._in_vain >= VAIN:
            found += f", none of the last {self._in_vain}"
        expected = f"count: {self._count}, from at most {TRIES} candidates each and never {VAIN} in vain"
        remedy = (
            "raise max_tokens, change temperature, loosen the filters, give more to start from, lower count, or give "
            "prompts in a file"
        )
        problem = Problem(f"prompts: {self._where}", found, expected, remedy)
        raise InputError("the teacher writes too few prompts of use", [problem])

    def facts(self) -> dict[str, JsonValue]:
        """For the ledger."""
        return {
            "candidates": self.candidates,
            "candidate_tokens": self.tokens,
            "dropped": dict(sorted(self.dropped.items())),
        }
