"""Where everything stands in the tree: each entry's leaf comes right after the example leaves that it brought."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from limbeck.ledger.merkle.fields import Version
from limbeck.records import Digest, Entry

SEAL = "seal"
"""The stage that brings example leaves."""


class LeavesFact(BaseModel):
    """The fact `leaves` of a seal entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Version
    count: Annotated[int, Field(ge=0, lt=2**53)]
    nonce: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hex; the salts' key is extracted with it."""
    salts: Digest
    """Names the salts' key."""


class LeavesFactError(ValueError):
    """The fact `leaves` of an entry is not of its form."""

    def __init__(self, index: int, why: ValueError):
        super().__init__(str(why))
        self.index = index


class LeafSet(NamedTuple):
    """The example leaves that one entry brought."""

    entry: Entry
    fact: LeavesFact
    first: int
    """Place in the tree of row 0."""


def leaves_fact(entry: Entry) -> LeavesFact | None:
    """What an entry says of its example leaves; None for those that bring none. Raises `ValueError`."""
    if entry.stage != SEAL:
        if "leaves" in entry.facts:
            raise ValueError(f"an entry of stage {entry.stage} with leaves")
        return None
    return LeavesFact.model_validate(entry.facts.get("leaves"))


def leaf_sets(entries: Iterable[Entry]) -> tuple[LeafSet, ...]:
    """All sets, oldest first. Raises `LeavesFactError` where an entry's fact is malformed, or of an older version than
    one before: no release writes that, and it would hide what the newer version shows.
    """
    found, place = list[LeafSet](), 0
    for entry in entries:
        try:
            fact = leaves_fact(entry)
            if fact is not None and found and fact.version < found[-1].fact.version:
                raise ValueError(f"version {fact.version} after version {found[-1].fact.version}")
        except ValueError as error:
            raise LeavesFactError(entry.index, error) from None
        if fact is not None:
            found.append(LeafSet(entry, fact, place))
            place += fact.count
        place += 1
    return tuple(found)


def size_before(entries: Sequence[Entry], index: int) -> int:
    """Leaves that stand in the tree before anything that entry `index` brought. Raises `ValueError`."""
    return index + sum(s.fact.count for s in leaf_sets(entries[:index]))
