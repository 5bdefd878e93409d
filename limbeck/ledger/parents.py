"""Checks that follow each record to its parents: prompt, raw answer, verdict, example, score. Needs no torch.

    raw answer in the journal <-- Completion --> Prompt
                                  Completion <-- Verdict (one each, in order)
                    kept, same split and teacher <-- Example

Files are given by name once they are known to lie in RUN; what they hold is not believed.
"""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import TypeAdapter, ValidationError

from limbeck.errors import LimbeckError, Problem
from limbeck.ledger.canonical import digest_bytes, digest_json
from limbeck.ledger.raw_answers import RawAnswers
from limbeck.records import Completion, Prompt, Score, Split, Verdict
from limbeck.rundir import RunDir
from limbeck.tables import read_records

_UNREADABLE = (pa.ArrowException, sqlite3.DatabaseError, OSError, ValueError, KeyError, TypeError, IndexError)
"""What readers raise on bytes that somebody changed."""

_REMEDY = "put back the files as the run wrote them, or run the same recipe again"


@dataclass
class _Answers:
    """What the records after the completions are held against, in a hundred bytes an answer: a million fit."""

    places: dict[bytes, int] = field(default_factory=dict)
    """Place of each completion, by its id, in their order."""
    prompts: array[int] = field(default_factory=lambda: array("q"))
    """Place of the prompt that each answers; -1 where there is none."""
    kinds: array[int] = field(default_factory=lambda: array("L"))
    """Teacher and split of each, as a place in `known_kinds`."""
    known_kinds: dict[tuple[str, str], int] = field(default_factory=dict)
    kept: bytearray | None = None
    """Whether each has a verdict to keep it."""

    def add(self, completion: Completion, prompt: int) -> None:
        kind = (completion.teacher, completion.split.value)
        self.places[_raw(completion.id)] = len(self.prompts)
        self.prompts.append(prompt)
        self.kinds.append(self.known_kinds.setdefault(kind, len(self.known_kinds)))


@dataclass
class _Known:
    """What has been read so far; None where the file is missing or cannot be read."""

    prompts: dict[bytes, int] | None = None
    """Place of each prompt, by its id."""
    held_out: bytearray = field(default_factory=bytearray)
    """Whether the prompt at each place is held out."""
    answers: _Answers | None = None
    notes: list[str] = field(default_factory=list)


def _raw(digest: str) -> bytes:
    """The bytes of a tagged digest, a third of its text. What is none keeps its text, which equals no digest."""
    try:
        found = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        found = b""
    return found if len(found) == 32 else digest.encode("utf-8", "surrogateescape")


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
    except _UNREADABLE as error:
        return [Problem(name, f"cannot be read: {type(error).__name__}: {error}", "the records of its stage", _REMEDY)]


def _prompts(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    places: dict[bytes, int] = {}
    for row, prompt in enumerate(read_records(root / "prompts.parquet", Prompt)):
        where, key = f"prompts.parquet: row {row}", _raw(prompt.id)
        if (due := Prompt.id_of(prompt.messages, prompt.tools, prompt.json_schema)) != prompt.id:
            yield Problem(f"{where}: id", prompt.id, f"{due}, the digest of its messages", _REMEDY)
        if key in places:
            yield Problem(f"{where}: id", f"{prompt.id} a second time", "each prompt once", _REMEDY)
        places[key] = row
        known.held_out.append(prompt.split == Split.HELD_OUT)
    known.prompts = places


def _completions(root: Path, known: _Known, present: frozenset[str]) -> Iterator[Problem]:
    """Every completion against its prompt, the recipe's terms, and the raw answer that it was read from."""
    answers, twice = _Answers(), _Twice(len(known.held_out))
    terms = _terms(root, known) if "recipe.yaml" in present else None
    with _Journal(root, present) as journal:
        for row, completion in enumerate(read_records(root / "completions.parquet", Completion)):
            where = f"completions.parquet: row {row}"
            place = known.prompts.get(_raw(completion.prompt_id), -1) if known.prompts is not None else -1
            if twice.seen(completion, place):
                yield _second(where, completion)
            yield from _against_prompt(where, completion, known, place)
            if terms is not None and terms.get(completion.teacher) != completion.terms:
                due = terms.get(completion.teacher, f"a teacher of the recipe: {', '.join(sorted(terms))}")
                yield Problem(f"{where}: terms of {completion.teacher}", completion.terms, due, _REMEDY)
            yield from journal.differences(where, completion)
            answers.add(completion, place)
        known.answers = answers
        if twice.scattered:
            yield from _scattered(root / "completions.parquet")
        if journal.unread:
            known.notes.append(f"raw answers of a form that only their digest was compared of: {journal.unread}")


class _Twice:
    """Tells whether a prompt, sample and teacher came before. Answers of one prompt stand together, so only those of
    the prompt at hand need be remembered; a prompt that comes back is told, and all keys are then read once more.
    """

    def __init__(self, prompts: int):
        self._opened = bytearray(prompts)
        self._prompt = ""
        self._keys: set[tuple[int, str]] = set()
        self.scattered = False

    def seen(self, completion: Completion, place: int) -> bool:
        if completion.prompt_id != self._prompt:
            self._prompt, self._keys = completion.prompt_id, set()
            if place >= 0:
                self.scattered |= bool(self._opened[place])
                self._opened[place] = 1
        key = (completion.sample, completion.teacher)
        known = key in self._keys
        self._keys.add(key)
        return known


def _scattered(path: Path) -> Iterator[Problem]:
    keys: set[tuple[str, int, str]] = set()
    for row, completion in enumerate(read_records(path, Completion)):
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
        self._raw: RawAnswers | None = None
        self._problem: list[Problem] = []

    def __enter__(self) -> Self:
        if self._path is not None:
            self._problem = _guarded("journal.db", self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self._raw is not None:
            self._raw.__exit__()

    def _open(self) -> list[Problem]:
        if self._path is not None:
            self._raw = RawAnswers(self._path)
        return []

    @property
    def unread(self) -> int:
        """Answers of a form that this version cannot read."""
        return self._raw.unread if self._raw else 0

    def differences(self, where: str, completion: Completion) -> list[Problem]:
        """How a completion differs from its raw answer; once, why the journal cannot be read."""
        if self._raw is not None:
            try:
                return self._raw.differences(where, completion)
            except sqlite3.DatabaseError as error:
                self._raw.__exit__()
                self._raw = None
                found = f"cannot be read: {type(error).__name__}: {error}"
                return [Problem("journal.db", found, "the records of its stage", _REMEDY)]
        told, self._problem = self._problem, []
        return told


def _against_prompt(where: str, completion: Completion, known: _Known, place: int) -> Iterator[Problem]:
    if known.prompts is None:
        return
    if place < 0:
        yield Problem(f"{where}: prompt_id", completion.prompt_id, "a prompt of prompts.parquet", _REMEDY)
        return
    if not completion.answers(completion.prompt_id):
        found = Prompt.id_of(completion.messages)
        yield Problem(f"{where}: messages", found, f"those of its prompt, {completion.prompt_id}", _REMEDY)
    split = Split.HELD_OUT if known.held_out[place] else Split.TRAIN
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
    answers = known.answers
    kept = bytearray(len(answers.prompts) if answers else 0)
    due = iter(answers.places) if answers else None
    verdicts = read_records(root / "verdicts.parquet", Verdict)
    for row, (verdict, answer) in enumerate(zip_longest(verdicts, due) if due else ((v, None) for v in verdicts)):
        where = f"verdicts.parquet: row {row}"
        if verdict is None or (due is not None and _raw(verdict.completion) != answer):
            found = verdict.completion if verdict else "no verdict"
            expected = f"sha256:{answer.hex()}" if answer else "nothing more"
            yield Problem(where, found, f"{expected}, as completions.parquet", _REMEDY)
        if verdict is None:
            continue
        if verdict.keep == bool(verdict.filter):
            yield Problem(f"{where}: filter", repr(verdict.filter), "a filter if dropped, none if kept", _REMEDY)
        place = answers.places.get(_raw(verdict.completion)) if answers else None
        if verdict.keep and place is not None:
            kept[place] = 1
    if answers:
        answers.kept = kept


class _ExampleRow(NamedTuple):
    """One row of RUN/examples, its lists as bytes."""

    id: str
    prompt_id: str
    completion: str
    teacher: str
    split: str
    tokens: bytes
    mask: bytes


def _examples(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    counts: dict[str, Counter[str]] = {}
    answers = known.answers
    kinds = list(answers.known_kinds) if answers else []
    for place, row in enumerate(_example_rows(root / "examples" / "examples.parquet")):
        where = f"examples: row {place}"
        due = digest_json([row.completion, digest_bytes(row.tokens), digest_bytes(row.mask)])
        if due != row.id:
            yield Problem(f"{where}: id", row.id, f"{due}, the digest of its parent, tokens and mask", _REMEDY)
        parent = answers.places.get(_raw(row.completion)) if answers else None
        if answers and answers.kept is not None and not (parent is not None and answers.kept[parent]):
            yield Problem(f"{where}: parent", row.completion, "a completion with a verdict to keep it", _REMEDY)
        if answers and parent is not None:
            teacher, split = kinds[answers.kinds[parent]]
            prompt = (
                known.prompts.get(_raw(row.prompt_id), -2) if known.prompts is not None else answers.prompts[parent]
            )
            if prompt != answers.prompts[parent]:
                yield Problem(f"{where}: prompt_id", row.prompt_id, "that of its completion", _REMEDY)
            for name, found, expected in (("teacher", row.teacher, teacher), ("split", row.split, split)):
                if found != expected:
                    yield Problem(f"{where}: {name}", found, f"{expected}, as its completion", _REMEDY)
        told = counts.setdefault(row.split, Counter())
        told["examples"] += 1
        told["tokens"] += len(row.mask)
        told["supervised"] += sum(row.mask)
    manifest = json.loads((root / "examples" / "manifest.json").read_text(encoding="utf-8"))
    for split, said in manifest["counts"].items():
        found = dict(counts.get(split, Counter(examples=0, tokens=0, supervised=0)))
        if found != said:
            yield Problem(f"examples: split {split}", str(found), f"{said}, as its manifest", _REMEDY)


def _example_rows(path: Path) -> Iterator[_ExampleRow]:
    """Read here and not by `limbeck.render`, so that the two must agree."""
    names = ("id", "prompt_id", "completion", "teacher", "split")
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=1024):
            columns = [batch.column(name).to_pylist() for name in names]
            lists = [_as_bytes(batch.column(name), kind) for name, kind in (("tokens", "<i4"), ("mask", "?"))]
            yield from map(_ExampleRow, *columns, *lists)


def _as_bytes(column: pa.ListArray, kind: str) -> Iterator[bytes]:
    """Each list of a column as the bytes of an array. No list is made of Python's numbers: rows have hundreds."""
    if column.null_count or column.values.null_count:
        raise ValueError("a list, or something in it, that is missing")
    values = column.values.to_numpy(zero_copy_only=False).astype(kind)
    return (values[a:b].tobytes() for a, b in pairwise(column.offsets.to_pylist()))


def _scores(root: Path, _: _Known, __: frozenset[str]) -> Iterator[Problem]:
    scores = TypeAdapter(list[Score]).validate_json((root / "scores.json").read_bytes())
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
