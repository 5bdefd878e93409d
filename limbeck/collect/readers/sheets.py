"""Comma- and tab-separated values, with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from limbeck.collect.readers.lines import lines
from limbeck.collect.readers.row import Columns, Raw, columns
from limbeck.collect.rows import Wrong
from limbeck.recipe import FilePrompts

_LARGEST_FIELD = 1 << 26
"""Characters in one field. The csv module's own limit is for the whole process, and too small for documents."""


def read_csv(source: FilePrompts, wanted: Columns) -> Iterator[Raw]:
    """A `Reader`."""
    return _read(source, wanted, ",", "CSV")


def read_tsv(source: FilePrompts, wanted: Columns) -> Iterator[Raw]:
    """A `Reader`. Fields are quoted as in CSV."""
    return _read(source, wanted, "\t", "TSV")


def _read(source: FilePrompts, wanted: Columns, delimiter: str, named: str) -> Iterator[Raw]:
    delimiters = "commas" if delimiter == "," else "tabs"
    csv.field_size_limit(_LARGEST_FIELD)
    reader = csv.reader(lines(source), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        where = f"{source.path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Raw(
                where,
                Wrong(
                    f"not {named} ({error})",
                    named,
                    "quote fields that hold quotes or line ends",
                ),
            )
            continue
        if not any(cells):
            continue
        if names is None:
            names = cells
            columns(source, names, wanted)
        elif len(cells) != len(names):
            yield Raw(
                where,
                Wrong(
                    f"{len(cells)} fields", f"{len(names)}, as in the header", f"quote fields that hold {delimiters}"
                ),
            )
        else:
            yield Raw(where, dict(zip(names, cells, strict=True)))
