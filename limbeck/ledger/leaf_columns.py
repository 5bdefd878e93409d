"""The values of a run's leaves, read and made canonical by column: what `sealing.leaves` and `fields.encode` make one
by one, only faster. That both ways agree is a law of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from limbeck.ledger.canonical import canonical
from limbeck.ledger.columns import completion_digest
from limbeck.ledger.merkle.fields import NOT_ASKED, Share, Version, share_bytes
from limbeck.ledger.merkle.hashing import EncodedColumns
from limbeck.ledger.origins import Origins, parents_of
from limbeck.ledger.sealing import (
    Answer,
    Example,
    answers_of,
    examples_of,
    iso_micros,
    sampling_of,
    weights_of,
    without_completion,
    writers_of,
)
from limbeck.recipe import Recipe

ROWS = 4096
"""Examples that are Python objects at a time."""
_REMEMBERED = 4096
K = TypeVar("K")


class _Known(dict[K, bytes]):
    """Canonical bytes of values that come again and again: most rows share their teacher, terms and time."""

    def __init__(self, make: Callable[[K], bytes]):
        self._make = make

    def __missing__(self, key: K) -> bytes:
        if len(self) >= _REMEMBERED:
            self.clear()
        self[key] = found = self._make(key)
        return found


class _Shared(NamedTuple):
    """What is remembered from one group of rows to the next."""

    values: _Known[str | None]
    times: _Known[int]
    samplings: _Known[tuple[str, int]]
    weights: _Known[tuple[str | None, str | None]]
    parents: _Known[str | None]
    """What follows the completion, up to the end of the list."""
    writers: _Known[tuple[str, str | None]]
    shares: _Known[tuple[str, str, int]]


def leaf_columns(recipe: Recipe, run: Path, version: Version) -> Iterator[EncodedColumns]:
    """The leaves of a run, in the order of its examples, `ROWS` at a time.

    Raises `StaleError` where records do not belong together, and what readers raise for damaged bytes.
    """

    def sampling(drawn: tuple[str, int]) -> bytes:
        return canonical(sampling_of(recipe, *drawn, version))

    def parents(told: str | None) -> bytes:
        return canonical(parents_of("", told, version)).split(b'""', 1)[1]

    def weights(said: tuple[str | None, str | None]) -> bytes:
        return canonical(weights_of(*said, version))

    shared = _Shared(
        *(_Known(canonical), _Known(_time), _Known(sampling), _Known(weights), _Known(parents)),
        *(_Known(_writers), _Known(_share)),
    )
    origins, answers, place = Origins(run), answers_of(run), 0
    for examples in _groups(examples_of(run / "examples" / "examples.parquet")):
        told: list[Answer] = []
        for example in examples:
            for name, answer in answers:
                if name == example.completion:
                    told.append(answer)
                    break
            else:
                raise without_completion(place + len(told), example)
        place += len(examples)
        yield _encoded(examples, told, origins, shared, version)


def _groups(examples: Iterator[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        group.append(example)
        if len(group) == ROWS:
            yield group
            group = []
    if group:
        yield group


def _encoded(
    examples: list[Example], told: list[Answer], origins: Origins, shared: _Shared, version: Version
) -> EncodedColumns:
    ids, parents, splits, teachers, tokens = (list(column) for column in zip(*examples, strict=True))
    column: dict[str, list[Any]] = dict(zip(Answer._fields, map(list, zip(*told, strict=True)), strict=True))
    said = map(completion_digest, *(column[name] for name in ("text", "reasoning", "finish_reason", "tool_calls")))
    known = shared.values.__getitem__
    writers, made_from = zip(*map(origins.get, column["prompt_id"]), strict=True)
    written = zip(column["model"], writers, strict=True)
    begin = b"[" if version == 1 else b'[["completion",'
    fields = (
        _quoted(said),
        list(map(shared.times.__getitem__, column["created"])),
        _quoted(ids),
        [canonical(NOT_ASKED)] * len(examples),
        list(map(known, column["model"])),
        [
            begin + parent + more
            for parent, more in zip(_quoted(parents), map(shared.parents.__getitem__, made_from), strict=True)
        ],
        _quoted(column["prompt_id"]),
        list(map(known, column["provider"])),
        _quoted(column["request_id"]),
        _responses(column["response"], column["answer_id"], version),
        list(map(known, column["route"])),
        list(map(shared.samplings.__getitem__, zip(column["teacher"], column["sample"], strict=True))),
        list(map(known, column["teacher"])),
        list(map(known, column["terms"])),
        list(map(shared.weights.__getitem__, zip(column["weights"], column["fingerprint"], strict=True))),
        list(map(shared.writers.__getitem__, written)),
    )
    return EncodedColumns(fields, list(map(shared.shares.__getitem__, zip(teachers, splits, tokens, strict=True))))


def _responses(digests: list[str], ids: list[str | None], version: Version) -> list[bytes]:
    """`response_of`, of each: no two have the same."""
    found = _quoted(digests)
    if version == 1:
        return found
    named = [b"null" if one is None else quoted(one).encode() for one in ids]
    return [b'{"digest":%b,"id":%b}' % pair for pair in zip(found, named, strict=True)]


def _quoted(values: Iterable[str]) -> list[bytes]:
    return list(map(str.encode, map(quoted, values)))


def _time(micros: int) -> bytes:
    return canonical(iso_micros(micros))


def _writers(who: tuple[str, str | None]) -> bytes:
    return canonical(writers_of(*who))


def _share(counted: tuple[str, str, int]) -> bytes:
    teacher, split, tokens = counted
    told = Share.model_validate({"class": teacher, "split": split, "tokens": tokens})
    return share_bytes(canonical(told.teacher), told.split, told.tokens)
