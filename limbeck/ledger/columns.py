"""Tables read by column: digests of records and places of digests, without an object for each row of a million."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import pairwise
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from limbeck.ledger.canonical import canonical
from limbeck.ledger.pages import dictionaries

ROWS = 2048
"""Rows that are Python objects at a time. Reading ahead (`pre_buffer`) is off: it keeps what was read of all row groups
until the end.
"""
LONGEST_BATCH = 2**28
"""Bytes of a column that are unpacked at a time."""
_AHEAD = 64
_ROLES = frozenset({"system", "user", "assistant", "tool"})


read_value = json.JSONDecoder().raw_decode
"""A JSON value at the beginning of a text, and where it ends: half the time of `json.loads`."""


class Messages(NamedTuple):
    """Chat messages of a table's cell."""

    value: list[dict[str, str]]
    digest: str
    """Of their canonical JSON."""


def read_messages(text: str) -> Messages | None:
    """Messages as `json` reads them, and their digest; None for anything that is not plainly a list of them."""
    value, end = read_value(text)
    if type(value) is not list or end != len(text):
        return None
    parts = []
    for one in value:
        if type(one) is not dict or len(one) != 2:
            return None
        role, content = one.get("role"), one.get("content")
        if role not in _ROLES or type(content) is not str:
            return None
        parts.append(f'{{"content":{quoted(content)},"role":"{role}"}}')
    return Messages(value, digest_text(f"[{','.join(parts)}]"))


def digest_text(text: str) -> str:
    """Tagged digest of canonical JSON that was put together as text."""
    return "sha256:" + sha256(text.encode()).hexdigest()


def completion_digest(text: str, reasoning: str | None, finish_reason: str, calls: str | None = None) -> str:
    """Digest of an answer by itself, whoever gave it to whatever prompt. `calls` are the functions that it called, as
    JSON; where there are none, nothing of them stands in it.

    Raises:
        ValueError, RecursionError: calls that are no JSON that canonical JSON can say.
    """
    thought = "null" if reasoning is None else quoted(reasoning)
    called = f',"tool_calls":{canonical(json.loads(calls)).decode()}' if calls not in (None, "[]") else ""
    return digest_text(
        f'{{"finish_reason":{quoted(finish_reason)},"reasoning":{thought},"text":{quoted(text)}{called}}}'
    )


def completion_key(prompt: str, sample: int, teacher: str, text: str, reasoning: str | None, finish: str) -> bytes:
    """The bytes of `Completion.id`."""
    thought = "null" if reasoning is None else quoted(reasoning)
    said = f"{quoted(text)},{thought},{quoted(finish)}"
    return sha256(f"[{quoted(prompt)},{sample},{quoted(teacher)},{said}]".encode()).digest()


def example_id(completion: str, tokens: bytes, mask: bytes) -> str:
    """`Example.id`: its parent, and its tokens and mask as bytes."""
    parts = sha256(tokens).hexdigest(), sha256(mask).hexdigest()
    return digest_text(f'[{quoted(completion)},"sha256:{parts[0]}","sha256:{parts[1]}"]')


def raw_digest(digest: str) -> bytes:
    """The bytes of a tagged digest, a third of its text. What is none keeps its text, which equals no digest."""
    try:
        found = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        found = b""
    return found if len(found) == 32 else digest.encode("utf-8", "surrogateescape")


class Places:
    """Where digests of 32 bytes stand among those that were appended, in some 50 bytes a digest: a million fit."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._hint = 0
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._exact = False

    def __len__(self) -> int:
        return len(self._data) // 32

    def __iter__(self) -> Iterator[bytes]:
        return (bytes(self._data[at : at + 32]) for at in range(0, len(self._data), 32))

    def append(self, digest: bytes) -> None:
        """The next one."""
        self._data += digest
        self._sorted = None

    def settle(self) -> None:
        """From now on a digest that is there twice has the first of its places, whatever was asked before."""
        self._exact = self.twice()

    def get(self, digest: bytes) -> int:
        """The place of a digest, -1 where it is not there. Questions in the order of the places cost next to nothing:
        children stand in the order of their parents.
        """
        if len(digest) != 32:
            return -1
        if self._exact:
            return self._search(digest)
        data, at = self._data, 32 * self._hint
        found = data.find(digest, at, at + 32 * _AHEAD)
        if found < 0 or found % 32:
            return self._search(digest)
        self._hint = found // 32
        return self._hint

    def _search(self, digest: bytes) -> int:
        order, heads = self._index()
        head = np.frombuffer(digest, ">u8", 1)[0]
        for at in range(int(np.searchsorted(heads, head)), len(heads)):
            place = int(order[at])
            if heads[at] != head:
                break
            if self._data[32 * place : 32 * place + 32] == digest:
                self._hint = place
                return place
        return -1

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Places in the order of the first eight bytes of what stands there, and those bytes."""
        if self._sorted is None:
            heads = np.frombuffer(bytes(self._data), ">u8").reshape(-1, 4)[:, 0].astype(np.uint64)
            order = np.argsort(heads, kind="stable")
            self._sorted = order, heads[order]
        return self._sorted

    def twice(self) -> bool:
        """Whether any digest is there more than once."""
        order, heads = self._index()
        return any(self._search_all(int(order[at])) for at in np.flatnonzero(heads[1:] == heads[:-1]))

    def _search_all(self, place: int) -> bool:
        digest = self._data[32 * place : 32 * place + 32]
        order, heads = self._index()
        head = np.frombuffer(bytes(digest), ">u8", 1)[0]
        first, last = np.searchsorted(heads, head), np.searchsorted(heads, head, side="right")
        return sum(self._data[32 * p : 32 * p + 32] == digest for p in map(int, order[first:last])) > 1


def batches(path: Path, names: Sequence[str], rows: int = ROWS, *, all_: bool = False) -> Iterator[pa.RecordBatch]:
    """Some columns of a table of evidence, or `all_` that it may have, a few rows at a time: of the type that they have
    to have, and with nothing missing where something has to be.

    Raises `ValueError` for other columns and for more than is unpacked at a time, and what pyarrow raises for damaged
    bytes.
    """
    largest = dictionaries(path, names)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        there = file.schema_arrow.names
        due = [name for name in names if name in there or name not in _LATER]
        if len(set(there)) < len(there) or not set(due) <= set(there) or (all_ and due != there):
            raise ValueError(f"columns {', '.join(there)[:200]}, not {', '.join(names)}")
    # One value of a dictionary can stand for all of a batch: those of large ones are counted, then written out.
    coded = [name for name, size in largest.items() if size * rows > LONGEST_BATCH and name not in ("tokens", "mask")]
    with pq.ParquetFile(path, pre_buffer=False, read_dictionary=coded) as file:
        for batch in file.iter_batches(batch_size=rows, columns=due):
            nothing = pa.nulls(batch.num_rows, pa.string())
            columns = [_sound(name, batch.column(name)) if name in due else nothing for name in names]
            yield pa.record_batch(columns, names=list(names))


def has_any(path: Path, names: Sequence[str]) -> bool:
    """Whether a table has one of these columns, which may be of a later version. Raises what `batches` does."""
    dictionaries(path, names)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return not {*names}.isdisjoint(file.schema_arrow.names)


def _sound(name: str, column: pa.Array) -> pa.Array:
    """A column of a batch, written out and of its type. Raises `ValueError`."""
    if isinstance(column, pa.DictionaryArray):
        lengths = pc.binary_length(column.dictionary).take(column.indices)  # pyright: ignore[reportAttributeAccessIssue]
        if (size := int(lengths.fill_null(0).to_numpy().sum(dtype=np.int64))) > LONGEST_BATCH:
            raise ValueError(f"{size} bytes in a few rows of {name}, more than are read")
        column = column.dictionary_decode()
    due = _TYPES.get(name, pa.string())
    found = column.type.value_type if pa.types.is_list(column.type) else column.type
    if found != due or pa.types.is_list(column.type) != (name in ("tokens", "mask")):
        raise ValueError(f"{name} is of type {column.type}, not {due}")
    if column.null_count and name not in _MAY_BE_MISSING:
        raise ValueError(f"{name} is missing in a row")
    return column


_TYPES = {
    "created": pa.timestamp("us", tz="UTC"),
    "leaf": pa.binary(32),
    "mask": pa.bool_(),
    "tokens": pa.int32(),
    **dict.fromkeys(("sample", "prompt_tokens", "completion_tokens"), pa.int64()),
    "keep": pa.bool_(),
}
"""Of columns that are no text; of lists, that of what is in them."""
_LATER = frozenset({"batch", "tools", "tool_calls", "json_schema", "mismatch", "parents", "answer_id", "fingerprint"})
"""Columns that tables of earlier versions lack: nothing is in them then."""
_MAY_BE_MISSING = frozenset({"reasoning", "weights", "writer"}) | _LATER


_COLLECTED = 50_000
"""Objects that are made before garbage is looked for; Python's own number is 700."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Look for cyclic garbage once in so many allocations. Rows are many objects and leave none: looking at all of them
    again and again takes an eighth of the processor's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _COLLECTED), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Rows:
    """Rows of tables that come in pieces, as many at a time as are asked for."""

    def __init__(self, pieces: Iterator[pa.Table]):
        self._pieces, self._left = pieces, None

    def take(self, count: int) -> pa.Table:
        """The next so many; fewer at the end. Raises what the pieces raise."""
        parts: list[pa.Table] = [] if self._left is None else [self._left]
        while sum(part.num_rows for part in parts) < count and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
        if not parts:
            return pa.table({})
        whole = pa.concat_tables(parts)
        self._left = whole.slice(count) if whole.num_rows > count else None
        return whole.slice(0, count)


def as_bytes(column: pa.ListArray, kind: str) -> Iterator[bytes]:
    """Each list of a column as the bytes of an array. No list is made of Python's numbers: rows have hundreds."""
    if column.null_count or column.values.null_count:
        raise ValueError("a list, or something in it, that is missing")
    values = column.values.to_numpy(zero_copy_only=False).astype(kind)
    return (values[a:b].tobytes() for a, b in pairwise(column.offsets.to_pylist()))
