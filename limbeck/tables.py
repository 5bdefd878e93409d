"""Records in Parquet files: one column a field, what is not a scalar as JSON text.

JSON text rather than Arrow structs: free-form nested values break Arrow's struct inference, and text stays readable by
every tool. A file is written under a temporary name, synced, and renamed, so it exists whole or not at all.
"""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Generic, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from limbeck.rundir import atomic

R = TypeVar("R")

_ROWS = 2048
"""Rows that are Python objects at a time while a table is read. Reading ahead (`pre_buffer`) is off as well: it keeps
what was read of all row groups until the end.
"""

_GROUP = 4096
"""Rows of a row group."""
_PIECE = 512
"""Rows that become Arrow's together: a few milliseconds' work, so that who writes beside an event loop does not hold it
up for long."""

_encode = json.JSONEncoder(ensure_ascii=False).encode

_SCALARS: dict[type, pa.DataType] = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """The column type for an annotation, and whether its values are JSON text."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _arrow_type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return _arrow_type(inner[0]) if len(inner) == 1 else (pa.string(), True)
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return pa.string(), False
    if annotation in _SCALARS:
        return _SCALARS[annotation], False
    return pa.string(), True


@cache
def _columns(record: type) -> dict[str, tuple[pa.DataType, bool]]:
    return {
        name: _arrow_type(a)
        for name, a in typing.get_type_hints(record, include_extras=True).items()
        if not name.startswith("_") and name != "model_config"
    }


def schema(record: type) -> pa.Schema:
    """The Arrow schema of a record type (a frozen pydantic model or a NamedTuple)."""
    return pa.schema([(name, kind) for name, (kind, _) in _columns(record).items()])


class RecordFile(Generic[R]):
    """A Parquet file of records that is written as they come. A context manager; who makes it under a temporary name
    (`atomic`) has it whole or not at all.

    Law: the bytes hang on the records and their order alone, not on when they came. `dumpers` write the JSON text of
    some columns faster than it is written here, and not otherwise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        record: type[R],
        dumpers: Mapping[str, Callable[[Any], str]] = MappingProxyType({}),
    ):
        self.rows = 0
        """Added so far."""
        self._schema, columns = schema(record), _columns(record)
        self._values = attrgetter(*columns)
        texts = [(n, name) for n, (name, (_, text)) in enumerate(columns.items()) if text]
        self._texts = [(n, dumpers.get(name) or _dumper(record, name)) for n, name in texts]
        self._new: list[list[Any]] = []
        self._pieces: list[pa.Table] = []
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
        self._writer.close()

    def add(self, item: R) -> None:
        """Append a record."""
        self.add_values(list(self._values(item)))

    def add_values(self, row: list[Any]) -> None:
        """Append a record that was never made: the values of its fields in their order. The list is used up."""
        for n, dump in self._texts:
            if row[n] is not None:
                row[n] = dump(row[n])
        self._new.append(row)
        self.rows += 1
        if self.rows % _PIECE == 0:
            self._piece()
        if self.rows % _GROUP == 0:
            self._write()

    def _piece(self) -> None:
        columns = zip(*self._new, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._pieces.append(pa.table(arrays, schema=self._schema))
        self._new = []

    def _write(self) -> None:
        if self._new:
            self._piece()
        if self._pieces:
            self._writer.write_table(pa.concat_tables(self._pieces).combine_chunks())
            self._pieces = []


def _dumper(record: type, name: str) -> Callable[[Any], str]:
    """Values of a column that is JSON text, to that text."""
    if issubclass(record, tuple):
        return _encode
    dump = TypeAdapter(typing.get_type_hints(record, include_extras=True)[name]).dump_python
    return lambda value: _encode(dump(value))


def write_records(path: str | os.PathLike[str], records: Iterable[R], record: type[R]) -> int:
    """Write records to a Parquet file, whole or not at all; returns how many."""
    with atomic(path) as temporary, RecordFile(temporary, record) as file:
        for item in records:
            file.add(item)
    return file.rows


def read_records(path: str | os.PathLike[str], record: type[R]) -> Iterator[R]:
    """Read records back, a few at a time, so that memory does not grow with the file."""
    with pq.ParquetFile(Path(path), pre_buffer=False) as file:
        yield from records_of(file.iter_batches(batch_size=_ROWS), record)


def records_of(batches: Iterable[pa.RecordBatch], record: type[R]) -> Iterator[R]:
    """The records of a table that is read by somebody else."""
    columns, adapter = _columns(record), TypeAdapter(record)
    is_tuple, texts = issubclass(record, tuple), [name for name, (_, as_json) in columns.items() if as_json]
    for batch in batches:
        for row in batch.to_pylist():
            for name in texts:
                if row.get(name) is not None:  # files of an earlier version lack later columns
                    row[name] = json.loads(row[name])
            yield record(**row) if is_tuple else adapter.validate_python(row)


def count_records(path: str | os.PathLike[str]) -> int:
    """How many records a file has, by its own word: no row is read."""
    return pq.read_metadata(Path(path)).num_rows
