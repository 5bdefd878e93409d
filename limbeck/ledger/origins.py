"""Where the prompt of an example came from: who wrote it, and from what. Read beside the examples, which stand in the
order of their prompts, so that a million of them take no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.ledger.columns import batches
from limbeck.ledger.merkle.fields import Version
from limbeck.records import Digest

_ROWS = 1024
_MOST_HELD = 2**26
"""Characters that are held of prompts which are not asked for in their order: no run writes examples so."""
COMPLETION, ROW = "completion", "row"
"""What a parent is: the answer that an example is of; a row of a file, where an earlier version did not say more."""


class Origin(NamedTuple):
    """These columns of a prompt."""

    writer: str | None
    """The model that wrote it, where one did."""
    parents: str | None
    """What it was written from, as JSON (`records.Parent`)."""


class Origins:
    """The prompts of a run. Asked in their order they are read once; otherwise those that a model wrote are held."""

    def __init__(self, run: Path):
        self._path = run / "prompts.parquet"
        self._rows = self._read()
        self._at, self._found = "", Origin(None, None)
        self._held: dict[Digest, Origin] | None = None

    def get(self, prompt: Digest) -> Origin:
        """Of the prompt of this id. Raises what readers raise for damaged bytes."""
        if prompt == self._at:
            return self._found
        if self._held is None:
            for name, origin in self._rows:
                if name == prompt:
                    self._at, self._found = name, origin
                    return origin
            self._held = self._hold()
        self._at, self._found = prompt, self._held.get(prompt, Origin(None, None))
        return self._found

    def _hold(self) -> dict[Digest, Origin]:
        held, size = dict[Digest, Origin](), 0
        for name, origin in self._read():
            if origin != (None, None):
                held[name] = origin
                size += len(name) + len(origin.writer or "") + len(origin.parents or "")
            if size > _MOST_HELD:
                raise ValueError("prompts in another order than the examples, and more of them than are held")
        return held

    def _read(self) -> Iterator[tuple[Digest, Origin]]:
        for batch in batches(self._path, ("id", *Origin._fields), _ROWS):
            names, *told = (batch.column(name).to_pylist() for name in ("id", *Origin._fields))
            yield from zip(names, map(Origin._make, zip(*told, strict=True)), strict=True)


def parents_of(completion: Digest, told: str | None, version: Version) -> JsonValue:
    """What a leaf says an example was made from; `told` is what its prompt was written from.

    Raises:
        ValueError, KeyError, TypeError: that is not what prompts.parquet holds.
    """
    if version == 1:
        return [completion]
    found: list[JsonValue] = [[parent.get("kind") or ROW, parent["id"]] for parent in json.loads(told or "[]")]
    return [[COMPLETION, completion], *found]
