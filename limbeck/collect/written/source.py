"""A source of the recipe to the prompts that a teacher writes for it.

Candidates are numbered; they are written a fixed number at a time and looked at in their order, so what is kept hangs
neither on how many are under way nor on where a run was interrupted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from limbeck.collect.journal import Journal, held, journal_path
from limbeck.collect.shards import merge_shards
from limbeck.collect.teachers import Parsed
from limbeck.collect.written.author import Author
from limbeck.collect.written.kinds import Kind, Piece, Task, bare, items, make_kind
from limbeck.errors import InputError, Problem
from limbeck.progress import Line
from limbeck.recipe import Recipe
from limbeck.recipe.prompts import WrittenPrompts, rows_of
from limbeck.records import Digest, Prompt, TeacherIdentity
from limbeck.rundir import RunDir

_TRIES = 20
"""Candidates for each prompt asked for, before giving up."""
_WORD = re.compile(r"\w+")
_NO_LIST = "no list"


@dataclass
class Written:
    """What came of a source."""

    writer: TeacherIdentity
    licence: str
    """SPDX expression: what it was made from, and the weights that made it, where they are here."""
    prompts: list[Piece] = field(default_factory=list)
    candidates: int = 0
    tokens: int = 0
    """Of all candidates."""
    dropped: Counter[str] = field(default_factory=Counter)


def write_source(recipe: Recipe, source: WrittenPrompts, known: Collection[Digest], run: RunDir) -> Written:
    """`source.count` prompts that are not among the `known` ids.

    Raises `InputError` with the share kept after 20 candidates for each prompt asked for, and what asking a teacher
    raises; what was written by then is journaled.
    """
    kind = make_kind(source, recipe.seed)
    path = journal_path(recipe, run)
    with held(path), Journal(path) as journal, run.progress.line("prompts", source.count, "prompts") as line:
        journal.close_open()
        merge_shards(journal)
        author = Author(source, recipe, run, journal, line)
        written = Written(author.identity, _licence(source, author.licence))
        _Keeping(source, known, written, line).fill(kind, author)
        if journal.path != run / "journal.db":  # RUN holds its own evidence
            with Journal(run / "journal.db") as own:
                journal.copy_to(own, author.asked)
    return written


class _Keeping:
    """Looks at candidates and keeps those that are of use."""

    def __init__(self, source: WrittenPrompts, known: Collection[Digest], written: Written, line: Line):
        self._source, self._known, self._written, self._line = source, known, written, line
        self._taken: set[str] = set()
        self._words: list[list[str]] = []

    def fill(self, kind: Kind, author: Author) -> None:
        """Have candidates written until there are enough."""
        before: Sequence[Piece] = ()
        count, left = self._source.count, _TRIES * self._source.count
        for number in range(kind.rounds):
            goal = count * (number + 1) // kind.rounds
            start = len(self._written.prompts)
            for candidate in _candidates(kind, author, before) if start < goal else ():
                if left == 0:
                    raise self._too_few()
                left -= 1
                self._look(candidate)
                if len(self._written.prompts) >= goal:
                    break  # before any more are written
            before = self._written.prompts[0 if kind.remembers else start :] or before

    def _look(self, candidate: _Candidate) -> None:
        task, text, ended, tokens = candidate
        written = self._written
        written.candidates += 1
        written.tokens += tokens
        words = [word.casefold() for word in _WORD.findall(text)]
        messages = task.make(text)
        if reason := self._why_not(task, ended, words, Prompt.id_of(messages)):
            written.dropped[reason] += 1
            return
        self._taken.add(" ".join(words))
        self._words.append(words)
        written.prompts.append(Piece(messages, task.parents))
        self._line.advance()

    def _why_not(self, task: Task, ended: str, words: list[str], name: Digest) -> str | None:
        if ended != "stop":
            return ended if ended == _NO_LIST else f"ended by {ended}"
        if len(words) < self._source.min_words:
            return "short"
        if len(words) > self._source.max_words:
            return "long"
        if " ".join(words) in self._taken or name in self._known:
            return "duplicate"
        if self._source.similarity is None:
            return None
        likened = [[word.casefold() for word in _WORD.findall(text)] for text in task.likened]
        if any(alike(words, other, self._source.similarity) for other in likened):
            return "like what it was made from"
        if any(alike(words, other, self._source.similarity) for other in self._words):
            return "like another"
        return None

    def _too_few(self) -> InputError:
        written = self._written
        dropped = ", ".join(f"{reason}: {n}" for reason, n in written.dropped.most_common())
        found = f"{len(written.prompts)} of {written.candidates} candidates kept ({dropped})"
        expected = f"count: {self._source.count}, from at most {_TRIES} candidates each"
        remedy = "raise max_tokens or temperature, give more to start from, loosen the filters, or lower count"
        problem = Problem(f"prompts: {self._source.kind} by {written.writer.name}", found, expected, remedy)
        return InputError("the teacher writes too few prompts of use", [problem])


def alike(one: list[str], other: list[str], limit: float) -> bool:
    """Whether two texts are more similar than `limit`: twice their longest common subsequence, over the words of both
    (the F-measure of ROUGE-L).
    """
    from rapidfuzz.distance import Indel  # only where prompts are written

    return Indel.normalized_similarity(one, other, score_cutoff=limit) > limit


class _Candidate(NamedTuple):
    task: Task
    text: str
    ended: str
    """Why its writing ended: `stop` where it is whole."""
    tokens: int
    """That were written for it, and for no other candidate."""


def _candidates(kind: Kind, author: Author, before: Sequence[Piece]) -> Iterator[_Candidate]:
    number = 0
    while True:
        tasks = [task for n in range(number, number + kind.wave) if (task := kind.task(before, n)) is not None]
        if not tasks:
            return
        for task, said, tokens in _to_the_end(tasks, author):
            yield from (
                _listed(task, said) if task.listed else [_Candidate(task, bare(said.text), said.finish_reason, tokens)]
            )
        number += kind.wave


def _to_the_end(tasks: list[Task], author: Author) -> Iterator[tuple[Task, Parsed, int]]:
    """Each task with what follows from it: the last one that was asked, its words, and the tokens of all."""
    said = author.write(tasks)
    tokens = [words.completion_tokens for words in said]
    while True:
        going = [
            (n, then(text))
            for n, words in enumerate(said)
            if (then := tasks[n].then) and words.finish_reason == "stop" and (text := words.text.strip())
        ]
        if not going:
            return zip(tasks, said, tokens, strict=True)
        for (n, task), words in zip(going, author.write([task for _, task in going]), strict=True):
            tasks[n], said[n] = task, words
            tokens[n] += words.completion_tokens


def _listed(task: Task, said: Parsed) -> Iterator[_Candidate]:
    """The items of a list; one that was cut off lacks the end of its last."""
    if said.finish_reason not in ("stop", "length"):
        yield _Candidate(task, "", said.finish_reason, said.completion_tokens)
        return
    found = items(said.text)
    if not found:
        ended = _NO_LIST if said.finish_reason == "stop" else said.finish_reason
        yield _Candidate(task, "", ended, said.completion_tokens)
    for number, text in enumerate(found, 1):
        ended = said.finish_reason if number == len(found) else "stop"
        # A list is paid for once.
        yield _Candidate(task, bare(text), ended, said.completion_tokens if number == 1 else 0)


def _licence(source: WrittenPrompts, weights: str | None) -> str:
    parts = dict.fromkeys([rows.licence for _, rows in rows_of(source)] + ([weights] if weights else []))
    return "unknown" if "unknown" in parts else " AND ".join(parts)
