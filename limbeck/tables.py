"""Records in Parquet files: one column a field, what is not a scalar as JSON text.

JSON text rather than Arrow structs: free-form nested values break Arrow's struct inference, and text stays readable by
every tool. A file is written under a temporary name, synced, and renamed, so it exists whole or not at all.
"""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from limbeck.rundir import atomic

R = TypeVar("R")

_ROWS = 2048
"""Rows that are Python objects at a time while a table is read. Reading ahead (`pre_buffer`) is off as well: it keeps
what was read of all row groups until the end.
"""

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


def write_records(path: str | os.PathLike[str], records: Iterable[R], record: type[R], *, batch: int = 4096) -> int:
    """Write records to a Parquet file, whole or not at all; returns how many."""
    columns, adapter, count = _columns(record), TypeAdapter(record), 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema(record), compression="zstd") as writer:
        for chunk in _chunks(records, batch):
            rows: dict[str, list[Any]] = {name: [] for name in columns}
            for item in chunk:
                values = item._asdict() if isinstance(item, tuple) else adapter.dump_python(item)  # type: ignore[attr-defined]
                for name, (_, as_json) in columns.items():
                    value = values[name]
                    rows[name].append(json.dumps(value, ensure_ascii=False) if as_json and value is not None else value)
            writer.write_table(pa.table(rows, schema=schema(record)))
            count += len(chunk)
    return count


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


def _chunks(items: Iterable[R], size: int) -> Iterator[Sequence[R]]:
    chunk: list[R] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
