"""Rows of JSONL, Parquet and CSV files to chat messages, every wrong row named.

A file is read a piece at a time, so memory does not grow with it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from limbeck.collect.contents import NotThis, Wanted, wanted_of
from limbeck.collect.rows import Wrong, messages_of, not_utf8, shown
from limbeck.errors import Problem, PromptError
from limbeck.recipe import FilePrompts
from limbeck.records import Digest, Message, Prompt

_LISTED = 20
"""Wrong rows that an error lists; the rest are counted."""

_LARGEST_FIELD = 1 << 26
"""Characters in one CSV field. The csv module's own limit is for the whole process, and too small for
documents.
"""

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv"}


class FileRow(NamedTuple):
    """One row that is in order."""

    where: str
    """`FILE:LINE`, or `FILE: row N` of a Parquet file; both count from 1."""
    id: Digest
    messages: tuple[Message, ...]
    wanted: Wanted = Wanted()


class RawRow(NamedTuple):
    """One row as it was read."""

    where: str
    row: dict[str, JsonValue] | Wrong


def iter_file_prompts(source: FilePrompts) -> Iterator[FileRow]:
    """The prompts of a file in its order, duplicates included; after `source.limit` different ones it
    ends.

    Raises `PromptError` after the last row if any row was wrong, listing the first 20 of them; at once
    where the file is missing, of an unknown format, has no column with prompts, or holds no prompt at all.
    So nothing may be spent on a row before the last one has been read.
    """
    problems: list[Problem] = []
    wrong, rows, seen = 0, 0, set()
    for where, raw in _READERS[_format(source)](source):
        found = raw if isinstance(raw, Wrong) else messages_of(raw, source.column, Path(source.path).parent)
        wanted = Wanted()
        if not isinstance(raw, Wrong) and not isinstance(found, Wrong):
            try:
                wanted = wanted_of(raw)
            except NotThis as error:
                found = Wrong(*error.told)
        if isinstance(found, Wrong):
            wrong += 1
            if wrong <= _LISTED:
                problems.append(Problem(where, *found))
            continue
        row = FileRow(where, Prompt.id_of(found, *wanted), found, wanted)
        rows += 1
        yield row
        if source.limit is not None:
            seen.add(row.id)
            if len(seen) == source.limit:
                break
    if wrong:
        listed = f", the first {_LISTED} of them" if wrong > _LISTED else ""
        raise PromptError(f"{source.path}: {wrong} wrong row{'s' if wrong > 1 else ''}{listed}", problems)
    if not rows:
        raise _unreadable(source, "no prompts", "at least one row", "put prompts into the file, or use another")


def _format(source: FilePrompts) -> str:
    path = Path(source.path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "not a file" if path.exists() else "no such file"
        raise _unreadable(source, found, "a JSONL, Parquet or CSV file", "check `path` of the prompts")
    if source.format != "auto":
        return source.format
    if path.suffix.lower() not in _SUFFIXES:
        raise _unreadable(
            source,
            f"suffix {shown(path.suffix) if path.suffix else 'none'}",
            f"one of {', '.join(_SUFFIXES)}",
            "rename the file, or say `format: jsonl`, `parquet` or `csv` beside its `path`",
        )
    return _SUFFIXES[path.suffix.lower()]


def _unreadable(source: FilePrompts, found: str, expected: str, remedy: str) -> PromptError:
    return PromptError("the prompts cannot be read", [Problem(source.path, found, expected, remedy)])


def _lines(source: FilePrompts) -> Iterator[str]:
    """Lines with their ends, a byte order mark left out; bytes that are not UTF-8 become lone surrogates."""
    try:
        with open(source.path, "rb") as file:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").decode("utf-8", "surrogateescape")
    except PermissionError as error:
        raise _unreadable(source, str(error.strerror), "a file that may be read", "check its permissions") from None


def read_jsonl(source: FilePrompts) -> Iterator[RawRow]:
    """Where each row of a JSONL file stands, and what it holds. Raises `PromptError` where it may not be read."""
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            yield RawRow(f"{source.path}:{number}", _json_row(line))


def _json_row(line: str) -> dict[str, JsonValue] | Wrong:
    expected = '{"messages": [...]} or {"prompt": "..."} on each line'
    if lone := not_utf8(line):
        return Wrong(f"{lone}: {shown(line.strip())}", "UTF-8 text", "write the file as UTF-8")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also integers of more than 4,300 digits
        why = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        at = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        return Wrong(f"not JSON ({why}{at}): {shown(line.strip())}", expected, "write one JSON object a line")
    if not isinstance(row, dict):
        return Wrong(shown(row), expected, "write one JSON object a line")
    return row


def _read_csv(source: FilePrompts) -> Iterator[RawRow]:
    csv.field_size_limit(_LARGEST_FIELD)
    reader = csv.reader(_lines(source), strict=True)
    names: list[str] | None = None
    while True:
        where = f"{source.path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(
                where,
                Wrong(
                    f"not CSV ({error})",
                    "comma-separated values",
                    "quote fields that hold quotes or line ends",
                ),
            )
            continue
        if not any(cells):
            continue
        if names is None:
            names = _header(source, cells)
        elif len(cells) != len(names):
            yield RawRow(
                where,
                Wrong(f"{len(cells)} fields", f"{len(names)}, as in the header", "quote fields that hold commas"),
            )
        else:
            yield RawRow(where, dict(zip(names, cells, strict=True)))


def _header(source: FilePrompts, names: list[str]) -> list[str]:
    """The names if one of them can hold prompts."""
    wanted = [source.column] if source.column else ["messages", "prompt"]
    there = [name for name in names if name in wanted]
    if not there:
        raise _unreadable(
            source,
            f"columns {shown(', '.join(names), 200)}",
            f"a column {' or '.join(wanted)}",
            "name the column that holds the prompts with `column:`",
        )
    if len(set(there)) < len(there):
        raise _unreadable(source, f"column {there[0]} twice", "each column once", "rename one of them")
    return names


def _read_parquet(source: FilePrompts) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(source.path) as file:
            wanted = [source.column] if source.column else ["messages", "prompt"]
            names = file.schema_arrow.names
            names = [name for name in _header(source, names) if name in wanted] + [n for n in _MORE if n in names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for index in range(batch.num_rows):
                    number += 1
                    yield RawRow(f"{source.path}: row {number}", _parquet_row(batch, index))
    except (pa.ArrowException, OSError) as error:
        reason = shown(str(error).strip().split("\n")[0], 200)
        raise _unreadable(
            source, f"not a Parquet file, or a damaged one ({reason})", "Parquet", "write it again"
        ) from None


def _parquet_row(batch: pa.RecordBatch, index: int) -> dict[str, JsonValue] | Wrong:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return Wrong(
            f"bytes that are not UTF-8 ({shown(error.object[error.start : error.end])})",
            "UTF-8 text",
            "write it as UTF-8",
        )


_MORE = ("tools", "json_schema")
"""Columns that may stand beside the prompt's."""

_READERS = {"jsonl": read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
