"""What every reader gives, and what is said where a source cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from pydantic import JsonValue

from limbeck.collect.rows import Wrong, shown
from limbeck.errors import Problem, PromptError
from limbeck.recipe import DatasetPrompts, FilePrompts

S = TypeVar("S", contravariant=True)


class Raw(NamedTuple):
    """A row as it was written, or what is wrong with it."""

    where: str
    """`FILE:LINE`, or `NAME: row N` where there are no lines; both count from 1."""
    row: dict[str, JsonValue] | Wrong


class Columns(NamedTuple):
    """The columns that prompts are made of."""

    names: tuple[str, ...]
    every: bool
    """Whether all of them are needed, and not one."""
    also: tuple[str, ...] = ("tools", "json_schema")
    """Columns that may stand beside them."""


class Reader(Protocol[S]):
    """Reads one kind of source.

    Laws: rows come in the source's order, one at a time; a row that is wrong is given as `Wrong` and ends nothing.
    Raises `PromptError` where the source as a whole cannot be read, or is a table without a wanted column.
    """

    def __call__(self, source: S, wanted: Columns) -> Iterator[Raw]:
        """The rows."""
        ...


def unreadable(source: FilePrompts | DatasetPrompts, found: str, expected: str, remedy: str) -> PromptError:
    """The error for a source that cannot be read at all."""
    return PromptError("the prompts cannot be read", [Problem(source.name, found, expected, remedy)])


def columns(source: FilePrompts | DatasetPrompts, there: Sequence[str], wanted: Columns) -> list[str]:
    """Those columns of a table that are wanted. Raises `PromptError` where one is missing, or there twice."""
    found = [name for name in there if name in wanted.names]
    lacking = [name for name in wanted.names if name not in found]
    if lacking and (wanted.every or not found):
        named = lacking if wanted.every else wanted.names
        expected = f"a column {(' and ' if wanted.every else ' or ').join(named)}"
        remedy = "name the column that holds the prompts with `column:`"
        if wanted.every:
            remedy = "correct the name in `template:`"
        raise unreadable(source, f"columns {shown(', '.join(there), 200)}", expected, remedy)
    if twice := [name for name in found if found.count(name) > 1]:
        raise unreadable(source, f"column {twice[0]} twice", "each column once", "rename one of them")
    return found + [name for name in there if name in wanted.also and name not in found]
