"""Checks that follow each record to its parents: prompt, raw answer, verdict, example, score. Needs no torch.

    raw answer in the journal <-- Completion --> Prompt --> earlier Prompts that it was written from
                                  Completion <-- Verdict (one each, in order)
                    kept, same split and teacher <-- Example

Files are given by name once they are known to lie in RUN; what they hold is not believed.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Self, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from limbeck.errors import LimbeckError, Problem
from limbeck.ledger.agreement import (
    UNREADABLE,
    Answers,
    Earlier,
    Prompts,
    Twice,
    completions_agree,
    example_id,
    example_rows,
    examples_agree,
    prompts_agree,
    verdict_rows,
    verdicts_agree,
)
from limbeck.ledger.columns import batches, has_any, raw_digest
from limbeck.ledger.paths import read_bounded
from limbeck.ledger.raw_answers import NAMED, RawAnswers
from limbeck.records import Completion, Prompt, Score, Split
from limbeck.rundir import RunDir
from limbeck.tables import records_of, schema

R = TypeVar("R")

_LONGEST = 2**24
"""Bytes of a file of JSON."""

_REMEDY = "put back the files as the run wrote them, or run the same recipe again"


@dataclass
class _Known:
    """What has been read so far; None where the file is missing or cannot be read."""

    prompts: Prompts | None = None
    answers: Answers | None = None
    notes: list[str] = field(default_factory=list)


def record_differences(root: Path, present: frozenset[str]) -> tuple[list[Problem], list[str]]:
    """Every record that does not fit its parents, and notes on what could not be compared. `present` names
    the files and directories of RUN that may be read.
    """
    known, problems = _Known(), []
    for name, check in _CHECKS.items():
        if name in present:
            problems += _guarded(name, lambda check=check: list(check(root, known, present)))
    return problems, known.notes


def _guarded(name: str, check: Callable[[], list[Problem]]) -> list[Problem]:
    """A file that cannot be read is a difference of its own and ends no other check."""
    try:
        return check()
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:8])
        return [Problem(name, f"a row of another shape: {found}", "the records of its stage", _REMEDY)]
    except LimbeckError as error:
        return list(error.problems)
    except UNREADABLE as error:
        return [Problem(name, f"cannot be read: {type(error).__name__}: {error}", "the records of its stage", _REMEDY)]


def _prompts(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    known.prompts = prompts_agree(root / "prompts.parquet")
    if known.prompts is None:
        yield from _each_prompt(root / "prompts.parquet", known)


def _records(path: Path, record: type[R]) -> Iterator[R]:
    return records_of(batches(path, schema(record).names, all_=True), record)


def _each_prompt(path: Path, known: _Known) -> Iterator[Problem]:
    found, before, earlier = Prompts(), set[bytes](), Earlier()
    for row, prompt in enumerate(_records(path, Prompt)):
        where, key = f"prompts.parquet: row {row}", raw_digest(prompt.id)
        if (due := Prompt.id_of(prompt.messages, prompt.tools, prompt.json_schema)) != prompt.id:
            yield Problem(f"{where}: id", prompt.id, f"{due}, the digest of its messages", _REMEDY)
        if key in before:
            yield Problem(f"{where}: id", f"{prompt.id} a second time", "each prompt once", _REMEDY)
        before.add(key)
        earlier.add(row, prompt.parents or ())
        found.places.append(key)
        found.held_out.append(prompt.split == Split.HELD_OUT)
    found.places.settle()
    for row, name in earlier.missing(found.places):
        where = f"prompts.parquet: row {row}: parents"
        yield Problem(where, f"sha256:{name.hex()}, a prompt", "one of an earlier row", _REMEDY)
    known.prompts = found


def _completions(root: Path, known: _Known, present: frozenset[str]) -> Iterator[Problem]:
    """Every completion against its prompt, the recipe's terms, and the raw answer that it was read from."""
    terms = _terms(root, known) if "recipe.yaml" in present else None
    path = root / "completions.parquet"
    with _Journal(root, present) as journal:
        if journal.raw is not None:
            journal.raw.named = has_any(path, NAMED)
        if known.prompts is not None and journal.raw is not None:
            known.answers = completions_agree(path, known.prompts, terms, journal.raw)
        if known.answers is None:
            yield from _each_completion(path, known, terms, journal)
        known.notes += journal.notes()


def _each_completion(path: Path, known: _Known, terms: dict[str, str] | None, journal: _Journal) -> Iterator[Problem]:
    answers, twice = Answers(), Twice(len(known.prompts.held_out) if known.prompts else 0)
    journal.forget()
    for row, completion in enumerate(_records(path, Completion)):
        where = f"completions.parquet: row {row}"
        place = known.prompts.places.get(raw_digest(completion.prompt_id)) if known.prompts is not None else -1
        if twice.seen(completion.prompt_id, completion.sample, completion.teacher, place):
            yield _second(where, completion)
        yield from _against_prompt(where, completion, known.prompts, place)
        if terms is not None and terms.get(completion.teacher) != completion.terms:
            due = terms.get(completion.teacher, f"a teacher of the recipe: {', '.join(sorted(terms))}")
            yield Problem(f"{where}: terms of {completion.teacher}", completion.terms, due, _REMEDY)
        yield from journal.differences(where, completion)
        answers.add(raw_digest(completion.id), completion.teacher, completion.split.value, place)
    known.answers = answers
    if twice.scattered:
        yield from _scattered(path)


def _scattered(path: Path) -> Iterator[Problem]:
    keys: set[tuple[str, int, str]] = set()
    for row, completion in enumerate(_records(path, Completion)):
        key = (completion.prompt_id, completion.sample, completion.teacher)
        if key in keys:
            yield _second(f"completions.parquet: row {row}", completion)
        keys.add(key)


def _second(where: str, completion: Completion) -> Problem:
    key = (completion.prompt_id, completion.sample, completion.teacher)
    return Problem(where, f"{key} a second time", "one answer a prompt, sample and teacher", _REMEDY)


class _Journal:
    """The journal beside the completions. That it is missing or damaged is one difference, and ends no other check."""

    def __init__(self, root: Path, present: frozenset[str]):
        self._path = root / "journal.db" if "journal.db" in present else None
        self.raw: RawAnswers | None = None
        self._problem: list[Problem] = []

    def __enter__(self) -> Self:
        if self._path is not None:
            self._problem = _guarded("journal.db", self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self.raw is not None:
            self.raw.__exit__()

    def _open(self) -> list[Problem]:
        if self._path is not None:
            self.raw = RawAnswers(self._path)
        return []

    def notes(self) -> Iterator[str]:
        """What of the answers was not compared."""
        if self.raw is not None and self.raw.unread:
            yield f"raw answers of a form that only their digest was compared of: {self.raw.unread}"
        if self.raw is not None and self.raw.unnamed:
            yield (
                "raw answers with an id or a fingerprint of their provider, for which completions.parquet, of an "
                f"earlier version, has no column: {self.raw.unnamed}"
            )

    def forget(self) -> None:
        """What was counted so far: the answers are read once more."""
        if self.raw is not None:
            self.raw.unread = self.raw.unnamed = 0

    def differences(self, where: str, completion: Completion) -> list[Problem]:
        """How a completion differs from its raw answer; once, why the journal cannot be read."""
        if self.raw is not None:
            try:
                return self.raw.differences(where, completion)
            except sqlite3.DatabaseError as error:
                self.raw.__exit__()
                self.raw = None
                found = f"cannot be read: {type(error).__name__}: {error}"
                return [Problem("journal.db", found, "the records of its stage", _REMEDY)]
        told, self._problem = self._problem, []
        return told


def _against_prompt(where: str, completion: Completion, prompts: Prompts | None, place: int) -> Iterator[Problem]:
    if prompts is None:
        return
    if place < 0:
        yield Problem(f"{where}: prompt_id", completion.prompt_id, "a prompt of prompts.parquet", _REMEDY)
        return
    if not completion.answers(completion.prompt_id):
        found = Prompt.id_of(completion.messages)
        yield Problem(f"{where}: messages", found, f"those of its prompt, {completion.prompt_id}", _REMEDY)
    split = Split.HELD_OUT if prompts.held_out[place] else Split.TRAIN
    if completion.split != split:
        yield Problem(f"{where}: split", completion.split, f"{split}, as its prompt", _REMEDY)


def _terms(root: Path, known: _Known) -> dict[str, str] | None:
    """The terms of each teacher, by the recipe; None where another version of limbeck wrote it."""
    try:
        return {teacher.name: teacher.terms for teacher in RunDir(root).recipe().teachers}
    except (ValueError, OSError, RecursionError, yaml.YAMLError, LimbeckError):
        known.notes.append("recipe.yaml is not a recipe of this version; terms were not compared")
        return None


def _verdicts(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    path, answers = root / "verdicts.parquet", known.answers
    kept = verdicts_agree(path, answers) if answers else None
    if kept is None:
        kept = bytearray(len(answers.places) if answers else 0)
        yield from _each_verdict(path, answers, kept)
    if answers:
        answers.kept = kept


def _each_verdict(path: Path, answers: Answers | None, kept: bytearray) -> Iterator[Problem]:
    due = iter(answers.places) if answers else None
    verdicts = verdict_rows(path)
    for row, (verdict, answer) in enumerate(zip_longest(verdicts, due) if due else ((v, None) for v in verdicts)):
        where = f"verdicts.parquet: row {row}"
        if verdict is None or (due is not None and raw_digest(verdict.completion) != answer):
            found = verdict.completion if verdict else "no verdict"
            expected = f"sha256:{answer.hex()}" if answer else "nothing more"
            yield Problem(where, found, f"{expected}, as completions.parquet", _REMEDY)
        if verdict is None:
            continue
        if verdict.keep == bool(verdict.filter):
            yield Problem(f"{where}: filter", repr(verdict.filter), "a filter if dropped, none if kept", _REMEDY)
        place = answers.places.get(raw_digest(verdict.completion)) if answers else -1
        if verdict.keep and place >= 0:
            kept[place] = 1


def _examples(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    path = root / "examples" / "examples.parquet"
    counts = examples_agree(path, known.prompts, known.answers) if known.prompts and known.answers else None
    if counts is None:
        counts = dict[str, Counter[str]]()
        yield from _each_example(path, known, counts)
    manifest = json.loads(read_bounded(root / "examples" / "manifest.json", _LONGEST))
    if not isinstance(manifest, dict) or not isinstance(said_of := manifest.get("counts"), dict):
        raise ValueError("a manifest without counts")
    for split, said in said_of.items():
        found = dict(counts.get(split, Counter(examples=0, tokens=0, supervised=0)))
        if found != said:
            yield Problem(f"examples: split {split}", str(found), f"{said}, as its manifest", _REMEDY)


def _each_example(path: Path, known: _Known, counts: dict[str, Counter[str]]) -> Iterator[Problem]:
    answers = known.answers
    kinds = list(answers.known_kinds) if answers else []
    for place, row in enumerate(example_rows(path)):
        where = f"examples: row {place}"
        if (due := example_id(row.completion, row.tokens, row.mask)) != row.id:
            yield Problem(f"{where}: id", row.id, f"{due}, the digest of its parent, tokens and mask", _REMEDY)
        parent = answers.places.get(raw_digest(row.completion)) if answers else -1
        if answers and answers.kept is not None and not (parent >= 0 and answers.kept[parent]):
            yield Problem(f"{where}: parent", row.completion, "a completion with a verdict to keep it", _REMEDY)
        if answers and parent >= 0:
            teacher, split = kinds[answers.kinds[parent]]
            due = answers.prompts[parent]
            if known.prompts is not None and (known.prompts.places.get(raw_digest(row.prompt_id)) != due or due < 0):
                yield Problem(f"{where}: prompt_id", row.prompt_id, "that of its completion", _REMEDY)
            for name, found, expected in (("teacher", row.teacher, teacher), ("split", row.split, split)):
                if found != expected:
                    yield Problem(f"{where}: {name}", found, f"{expected}, as its completion", _REMEDY)
        told = counts.setdefault(row.split, Counter())
        told["examples"] += 1
        told["tokens"] += len(row.mask)
        told["supervised"] += row.mask.count(1)


def _scores(root: Path, _: _Known, __: frozenset[str]) -> Iterator[Problem]:
    scores = TypeAdapter(list[Score]).validate_json(read_bounded(root / "scores.json", _LONGEST))
    for place, score in enumerate(scores):
        if (score.value is None) == (score.unscored is None):
            yield Problem(
                f"scores.json: {place}: {score.name} of {score.subject}",
                f"{score.value}, {score.unscored}",
                "a value, or the reason why there is none",
                _REMEDY,
            )


_CHECKS: dict[str, Callable[[Path, _Known, frozenset[str]], Iterator[Problem]]] = {
    "prompts.parquet": _prompts,
    "completions.parquet": _completions,
    "verdicts.parquet": _verdicts,
    "examples": _examples,
    "scores.json": _scores,
}
"""In the order in which a check needs what an earlier one read."""
