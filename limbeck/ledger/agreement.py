"""Whether the records of a run agree with their parents, asked by column and as fast as a million of them need.

Each function reads one file whole and gives what the checks after it are held against, or None as soon as anything is
not plainly as it has to be. Nothing is told here: `limbeck.ledger.parents` then reads the file again, record by record,
and says which row differs and how, or that none does. That both ways agree is a law of the tests.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import zstandard
from pydantic import TypeAdapter

from limbeck.ledger.columns import (
    Places,
    as_bytes,
    batches,
    completion_key,
    example_id,
    raw_digest,
    read_messages,
)
from limbeck.ledger.raw_answers import Expected, RawAnswers
from limbeck.records import Completion, Parent, Prompt, Verdict
from limbeck.tables import schema

UNREADABLE = (
    pa.ArrowException,
    sqlite3.DatabaseError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    RecursionError,
)
"""What readers raise on bytes that somebody changed."""
_UNPACKING = (zlib.error, zstandard.ZstdError)

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Prompts:
    """What answers are held against."""

    places: Places = field(default_factory=Places)
    held_out: bytearray = field(default_factory=bytearray)
    """Whether the prompt at each place is held out."""


_MOST_EARLIER = 2**22
"""Some 200 MB: a few bytes of a packed column can stand for any number of them."""


class Earlier:
    """Prompts that others were written from: each has to be an earlier row of the same table."""

    def __init__(self) -> None:
        self._rows: array[int] = array("q")
        self._ids = Places()

    def add(self, row: int, parents: Iterable[Parent]) -> None:
        """What the prompt in a row was written from. Raises `ValueError` for more than are held."""
        for parent in parents:
            if parent.kind == "prompt":
                if len(self._rows) == _MOST_EARLIER:
                    raise ValueError(f"more than {_MOST_EARLIER} earlier prompts that others were written from")
                self._rows.append(row)
                self._ids.append(raw_digest(parent.id))

    def missing(self, prompts: Places) -> Iterator[tuple[int, bytes]]:
        """Row and parent of each that is none, once all prompts are known."""
        for row, name in zip(self._rows, self._ids, strict=True):
            if not 0 <= prompts.get(name) < row:
                yield row, name


@dataclass
class Answers:
    """What the records after the completions are held against."""

    places: Places = field(default_factory=Places)
    """Of each completion, by its id, in their order."""
    prompts: array[int] = field(default_factory=lambda: array("q"))
    """Place of the prompt that each answers; -1 where there is none."""
    kinds: array[int] = field(default_factory=lambda: array("L"))
    """Teacher and split of each, as a place in `known_kinds`."""
    known_kinds: dict[tuple[str, str], int] = field(default_factory=dict)
    kept: bytearray | None = None
    """Whether each has a verdict to keep it."""

    def add(self, key: bytes, teacher: str, split: str, prompt: int) -> None:
        """The next completion, by the bytes of its id."""
        self.places.append(key)
        self.prompts.append(prompt)
        self.kinds.append(self.known_kinds.setdefault((teacher, split), len(self.known_kinds)))


class Twice:
    """Tells whether a prompt, sample and teacher came before. Answers of one prompt stand together, so only those of
    the prompt at hand need be remembered; a prompt that comes back is told, and all keys are then read once more.
    """

    def __init__(self, prompts: int):
        self._opened = bytearray(prompts)
        self._prompt = ""
        self._keys: set[tuple[int, str]] = set()
        self.scattered = False

    def seen(self, prompt: str, sample: int, teacher: str, place: int) -> bool:
        """Whether it did, among the answers of the prompt at hand."""
        if prompt != self._prompt:
            self._prompt, self._keys = prompt, set()
            if place >= 0:
                self.scattered |= bool(self._opened[place])
                self._opened[place] = 1
        key = (sample, teacher)
        known = key in self._keys
        self._keys.add(key)
        return known


def _quiet(ask: Callable[P, T | None]) -> Callable[P, T | None]:
    """What cannot be read does not agree."""

    def asked(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return ask(*args, **kwargs)
        except (*UNREADABLE, *_UNPACKING):
            return None

    return asked


def _rows(path: Path, record: type) -> Iterator[list[Any]]:
    """A table's columns in pieces, in the order of the record's fields. Raises `ValueError` for a table of others."""
    names = schema(record).names
    for batch in batches(path, names, all_=True):
        yield [_values(batch.column(name)) for name in names]


def _values(column: pa.Array) -> list[Any]:
    """Times as microseconds since 1970."""
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


@_quiet
def prompts_agree(path: Path) -> Prompts | None:
    """Every prompt's id is the digest of its messages, and none comes twice. Prompts with tools or a schema of their
    own are left to the slower way.
    """
    found, earlier = Prompts(), Earlier()
    for columns in _rows(path, Prompt):
        ids, messages, _, _, splits, _, tools, schemas, parents = columns
        for name, text, split, tool, form, made_from in zip(
            ids, messages, splits, tools, schemas, parents, strict=True
        ):
            told = read_messages(text)
            plain = tool is None and form is None
            if not plain or told is None or told.digest != name or split not in ("train", "held_out"):
                return None
            if made_from is not None:
                earlier.add(len(found.places), _PARENTS.validate_json(made_from))
            found.places.append(bytes.fromhex(name[7:]))
            found.held_out.append(split == "held_out")
    return None if found.places.twice() or any(earlier.missing(found.places)) else found


_PARENTS = TypeAdapter(tuple[Parent, ...])


@_quiet
def completions_agree(path: Path, prompts: Prompts, terms: Mapping[str, str] | None, raw: RawAnswers) -> Answers | None:
    """Every completion fits its prompt, the recipe's terms, and the raw answer that it was read from. Those with more
    than text are left to the slower way.
    """
    answers, twice, sound = Answers(), Twice(len(prompts.held_out)), {None: True}
    places, held_out = prompts.places, prompts.held_out
    for columns in _rows(path, Completion):
        told = dict(zip(schema(Completion).names, columns, strict=True))
        if any(value is not None for name in _BEYOND_TEXT for value in told[name]):
            return None
        messages = list(map(read_messages, told["messages"]))
        for prompt_id, sample, asked, text, reasoning, finish, teacher, weights, under, split in zip(
            *(told["prompt_id"], told["sample"], messages, told["text"], told["reasoning"], told["finish_reason"]),
            *(told["teacher"], told["weights"], told["terms"], told["split"]),
            strict=True,
        ):
            if asked is None or asked.digest != prompt_id:
                return None
            place = places.get(bytes.fromhex(prompt_id[7:]))
            if (
                place < 0
                or split != ("held_out" if held_out[place] else "train")
                or twice.seen(prompt_id, sample, teacher, place)
                or twice.scattered
                or (terms is not None and terms.get(teacher) != under)
                or not (weights in sound or _DIGEST.fullmatch(weights))
            ):
                return None
            sound[weights] = True
            answers.add(completion_key(prompt_id, sample, teacher, text, reasoning, finish), teacher, split, place)
        told["messages"] = [one.value for one in messages if one]
        if not raw.agree(list(map(Expected, *(told[name] for name in Expected._fields)))):
            return None
    return answers


_BEYOND_TEXT = ("tools", "tool_calls", "json_schema", "mismatch")


def verdict_rows(path: Path) -> Iterator[Verdict]:
    """Verdicts of exactly their columns and types. Raises `ValueError`."""
    for columns in _rows(path, Verdict):
        yield from map(Verdict, *columns)


@_quiet
def verdicts_agree(path: Path, answers: Answers) -> bytearray | None:
    """There is one verdict for each completion, in their order; which of them are kept."""
    kept, names = bytearray(), iter(answers.places)
    for columns in _rows(path, Verdict):
        _, _, _, completions, keeps, filters, _ = columns
        for completion, keep, filter_ in zip(completions, keeps, filters, strict=True):
            if raw_digest(completion) != next(names, None) or keep == bool(filter_):
                return None
            kept.append(keep)
    return kept if next(names, None) is None else None


class ExampleRow(NamedTuple):
    """One row of RUN/examples, its lists as bytes."""

    id: str
    prompt_id: str
    completion: str
    teacher: str
    split: str
    tokens: bytes
    mask: bytes


def example_rows(path: Path) -> Iterator[ExampleRow]:
    """Read here and not by `limbeck.render`, so that the two must agree."""
    names = ("id", "prompt_id", "completion", "teacher", "split")
    for batch in batches(path, (*names, "tokens", "mask"), 1024):
        columns = [batch.column(name).to_pylist() for name in names]
        lists = [as_bytes(batch.column(name), kind) for name, kind in (("tokens", "<i4"), ("mask", "?"))]
        yield from map(ExampleRow, *columns, *lists)


Counts = dict[str, dict[str, int]]
"""Examples, tokens and supervised tokens of each split."""


@_quiet
def examples_agree(path: Path, prompts: Prompts, answers: Answers) -> Counts | None:
    """Every example has the digest of what it is made of, and a kept completion with its prompt, teacher and split."""
    kinds = list(answers.known_kinds)
    counts: dict[str, Counter[str]] = {}
    if answers.kept is None:
        return None
    for row in example_rows(path):
        if example_id(row.completion, row.tokens, row.mask) != row.id:
            return None
        parent = answers.places.get(raw_digest(row.completion))
        if parent < 0 or not answers.kept[parent] or kinds[answers.kinds[parent]] != (row.teacher, row.split):
            return None
        prompt = answers.prompts[parent]
        if prompt < 0 or prompts.places.get(raw_digest(row.prompt_id)) != prompt:
            return None
        told = counts.setdefault(row.split, Counter())
        told["examples"] += 1
        told["tokens"] += len(row.mask)
        told["supervised"] += row.mask.count(1)
    return {split: dict(told) for split, told in counts.items()}
