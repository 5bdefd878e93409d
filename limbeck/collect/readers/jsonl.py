"""One JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import JsonValue

from limbeck.collect.readers.lines import lines
from limbeck.collect.readers.row import Columns, Raw
from limbeck.collect.rows import Wrong, not_utf8, shown
from limbeck.recipe import FilePrompts


def read_jsonl(source: FilePrompts, wanted: Columns) -> Iterator[Raw]:
    """A `Reader`. Which columns are wanted is seen row by row: lines need not have the same keys."""
    for number, line in enumerate(lines(source), 1):
        if line.strip():
            yield Raw(f"{source.path}:{number}", _json_row(line))


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
