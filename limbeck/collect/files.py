"""Rows of files and data sets to chat messages, every wrong row named.

A source is read a piece at a time, so memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.collect.contents import NotThis, Wanted, wanted_of
from limbeck.collect.digests import DigestSet
from limbeck.collect.readers.jsonl import read_jsonl
from limbeck.collect.readers.lines import PACKED
from limbeck.collect.readers.parquet import read_parquet
from limbeck.collect.readers.row import Columns, Raw, Reader, unreadable
from limbeck.collect.readers.sheets import read_csv, read_tsv
from limbeck.collect.rows import Wrong, messages_of, shown
from limbeck.collect.templates import Rendering
from limbeck.errors import Problem, PromptError
from limbeck.recipe import DatasetPrompts, FilePrompts
from limbeck.records import Digest, Message, Prompt

_LISTED = 20
"""Wrong rows that an error lists; the rest are counted."""

_READERS: dict[str, Reader[FilePrompts]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
}
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}


class FileRow(NamedTuple):
    """One row that is in order."""

    where: str
    """`FILE:LINE`, or `NAME: row N` where there are no lines; both count from 1."""
    id: Digest
    messages: tuple[Message, ...]
    wanted: Wanted = Wanted()


def iter_file_prompts(source: FilePrompts | DatasetPrompts) -> Iterator[FileRow]:
    """The prompts of a source in its order, duplicates included; after `source.limit` different ones it ends.

    Raises `PromptError` after the last row if any row was wrong, listing the first 20 of them; at once
    where the source is missing, of an unknown format, has no column with prompts, or holds no prompt at all.
    So nothing may be spent on a row before the last one has been read.
    """
    problems: list[Problem] = []
    rendering = Rendering(source.template, source.name) if source.template else None
    base = Path(source.path).parent if isinstance(source, FilePrompts) else Path()
    wrong, rows, seen = 0, 0, DigestSet()
    for where, raw in _raw_rows(source, rendering):
        found, wanted = _read(raw, source.column, rendering, base)
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
        raise PromptError(f"{source.name}: {wrong} wrong row{'s' if wrong > 1 else ''}{listed}", problems)
    if not rows:
        raise unreadable(source, "no prompts", "at least one row", "put prompts into the file, or use another")


def _read(
    raw: dict[str, JsonValue] | Wrong, column: str | None, rendering: Rendering | None, base: Path
) -> tuple[tuple[Message, ...] | Wrong, Wanted]:
    """The messages of a row, and what it asks for beside an answer in words."""
    if isinstance(raw, Wrong):
        return raw, Wanted()
    found = rendering.messages(raw) if rendering else messages_of(raw, column, base)
    try:
        return found, wanted_of(raw)
    except NotThis as error:
        return found if isinstance(found, Wrong) else Wrong(*error.told), Wanted()


def _raw_rows(source: FilePrompts | DatasetPrompts, rendering: Rendering | None) -> Iterator[Raw]:
    if rendering:
        wanted = Columns(rendering.columns, every=True)
    else:
        wanted = Columns((source.column,) if source.column else ("messages", "prompt"), every=False)
    if isinstance(source, FilePrompts):
        return _READERS[_format(source)](source, wanted)
    from limbeck.collect.readers.datasets import read_dataset  # its package takes seconds to load

    return read_dataset(source, wanted)


def _format(source: FilePrompts) -> str:
    path = Path(source.path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "not a file" if path.exists() else "no such file"
        raise unreadable(source, found, "a JSONL, Parquet, CSV or TSV file", "check `path` of the prompts")
    if source.format != "auto":
        return source.format
    named = path.with_suffix("") if path.suffix.lower() in PACKED else path
    found = _SUFFIXES.get(named.suffix.lower())
    if found is None:
        raise unreadable(
            source,
            f"suffix {shown(named.suffix) if named.suffix else 'none'}",
            f"one of {', '.join(_SUFFIXES)}; all but .parquet with or without {' or '.join(PACKED)}",
            "rename the file, or say `format: jsonl`, `parquet`, `csv` or `tsv` beside its `path`",
        )
    if found == "parquet" and named != path:
        expected = "a Parquet file as it is: it is packed inside"
        raise unreadable(source, f"suffix {shown(path.suffix)}", expected, "unpack it")
    return found
