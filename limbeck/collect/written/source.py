"""A source of the recipe to the prompts that a teacher writes for it.

Candidates are numbered; how many are written at a time hangs on what was kept before alone, and they are looked at in
their order, so what is kept hangs neither on how many are under way nor on where a run was interrupted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from limbeck.collect.journal import Journal, held, journal_path
from limbeck.collect.shards import merge_shards
from limbeck.collect.teachers import Parsed
from limbeck.collect.written.author import Author, keep_here
from limbeck.collect.written.kinds import Kind, Task, bare, items, make_kind
from limbeck.collect.written.likeness import Likeness, alike
from limbeck.collect.written.tally import Piece, Shown, Tally
from limbeck.recipe import Recipe
from limbeck.recipe.prompts import WrittenPrompts, rows_of
from limbeck.records import Digest, Prompt, TeacherIdentity
from limbeck.rundir import RunDir

_WORD = re.compile(r"\w+")
_LEAST = 8
"""Requests of a wave, where the kind has no fewer: the last few prompts are not waited for one by one."""
_NO_LIST = "no list"


class Spent(NamedTuple):
    """What writing took."""

    requests: int
    prompt: int
    """Tokens."""
    completion: int
    """Tokens."""


class Written(NamedTuple):
    """What came of a source."""

    writer: TeacherIdentity
    licence: str
    """SPDX expression: what it was made from, and the weights that made it, where they are here."""
    requests: int
    """That were sent to the teacher, or found in the journal: what was written for nothing at the end of a round is
    among them."""
    tally: Tally


def write_source(recipe: Recipe, source: WrittenPrompts, known: Collection[Digest], run: RunDir) -> Written:
    """`source.count` prompts that are not among the `known` ids.

    Raises `InputError` with what was kept and dropped where too few candidates are of use (`Tally.refuse_vain`), and
    what asking a teacher raises; what was written by then is journaled.
    """
    kind = make_kind(source, recipe.seed)
    path = journal_path(recipe, run)
    by = source.by or recipe.teachers[0].name
    run.progress.begin(f"prompts: {source.count:,} of kind {source.kind} written by {by}")
    with held(path), Journal(path) as journal, run.progress.line("prompts", source.count, "prompts") as line:
        journal.close_open()
        merge_shards(journal)
        shown = Shown(line)
        author = Author(source, recipe, run, journal, shown)
        tally = Tally(f"{source.kind} by {author.identity.name}", source.count, shown)
        _Keeping(source, known, tally).fill(kind, author)
        keep_here(journal, run, author.asked)
    return Written(author.identity, _licence(source, author.licence), len(author.asked), tally)


class _Keeping:
    """Looks at candidates and keeps those that are of use."""

    def __init__(self, source: WrittenPrompts, known: Collection[Digest], tally: Tally):
        self._source, self._known, self._tally = source, known, tally
        self._taken: set[str] = set()
        self._likeness = None if source.similarity is None else Likeness(source.similarity)

    def fill(self, kind: Kind, author: Author) -> None:
        """Have candidates written until there are enough."""
        before: Sequence[Piece] = ()
        kept = self._tally.kept
        for number in range(kind.rounds):
            goal = self._source.count * (number + 1) // kind.rounds
            start = len(kept)

            def due(tasks: int, start: int = start, goal: int = goal) -> int:
                """Requests of the next wave: as many as are still needed by what came of the round's before."""
                got = len(kept) - start
                needed = math.ceil((goal - len(kept)) * tasks / got) if got else kind.wave
                return min(kind.wave, max(needed, _LEAST))

            for candidate in _candidates(kind, author, before, due) if start < goal else ():
                self._tally.refuse_vain()
                self.look(candidate)
                if len(kept) >= goal:
                    break  # before any more are written
            before = kept[0 if kind.remembers else start :] or before

    def look(self, candidate: _Candidate) -> None:
        """Keep or drop it."""
        task, text, ended, tokens = candidate
        words = [word.casefold() for word in _WORD.findall(text)]
        messages = task.make(text)
        if reason := self._why_not(task, ended, words, Prompt.id_of(messages)):
            self._tally.drop(reason, tokens)
            return
        self._taken.add(" ".join(words))
        if self._likeness is not None:
            self._likeness.add(words)
        self._tally.keep(Piece(messages, task.parents, task.before), tokens)

    def _why_not(self, task: Task, ended: str, words: list[str], name: Digest) -> str | None:
        if ended != "stop":
            return ended if ended == _NO_LIST else f"ended by {ended}"
        if len(words) < self._source.min_words:
            return "short"
        if len(words) > self._source.max_words:
            return "long"
        if " ".join(words) in self._taken or name in self._known:
            return "duplicate"
        if self._likeness is None or self._source.similarity is None:
            return None
        likened = [[word.casefold() for word in _WORD.findall(text)] for text in task.likened]
        if any(alike(words, other, self._source.similarity) for other in likened):
            return "like what it was made from"
        return "like another" if self._likeness.near(words) else None


class _Candidate(NamedTuple):
    task: Task
    text: str
    ended: str
    """Why its writing ended: `stop` where it is whole."""
    tokens: int
    """That were written for it, and for no other candidate."""


def _candidates(kind: Kind, author: Author, before: Sequence[Piece], due: Callable[[int], int]) -> Iterator[_Candidate]:
    """Candidates in waves: `due` says how large the next one is, after so many requests."""
    number = 0
    while True:
        wave = due(number)
        tasks = [task for n in range(number, number + wave) if (task := kind.task(before, n)) is not None]
        if not tasks:
            return
        for task, said, spent in _to_the_end(tasks, author):
            yield from _candidates_of(task, said, spent)
        number += wave


def _candidates_of(task: Task, said: Parsed, spent: Spent) -> Iterator[_Candidate]:
    if task.listed:
        yield from _listed(task, said)
    else:
        yield _Candidate(task, bare(said.text), said.finish_reason, spent.completion)


def sift(source: WrittenPrompts, tasks: Sequence[Task], author: Author, tally: Tally) -> Iterator[tuple[Spent, int]]:
    """What each of these tasks took, and how many prompts were kept of it."""
    keeping = _Keeping(source, (), tally)
    for task, said, spent in _to_the_end([*tasks], author):
        before = len(tally.kept)
        for candidate in _candidates_of(task, said, spent):
            keeping.look(candidate)
        yield spent, len(tally.kept) - before


def _to_the_end(tasks: list[Task], author: Author) -> Iterator[tuple[Task, Parsed, Spent]]:
    """Each task with what follows from it: the last one that was asked, its words, and what all of them took."""
    said = author.write(tasks)
    spent = [Spent(1, words.prompt_tokens, words.completion_tokens) for words in said]
    while True:
        going = [
            (n, then(text))
            for n, words in enumerate(said)
            if (then := tasks[n].then) and words.finish_reason == "stop" and (text := words.text.strip())
        ]
        if not going:
            return zip(tasks, said, spent, strict=True)
        for (n, task), words in zip(going, author.write([task for _, task in going]), strict=True):
            tasks[n], said[n] = task, words
            one = spent[n]
            spent[n] = Spent(
                one.requests + 1, one.prompt + words.prompt_tokens, one.completion + words.completion_tokens
            )


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
