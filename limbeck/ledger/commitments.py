"""Checks of what the ledger commits to: the tree against the entries, and the example leaves against the tree and the
records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from limbeck.errors import LimbeckError, Problem
from limbeck.ledger.canonical import canonical
from limbeck.ledger.columns import Rows
from limbeck.ledger.merkle.fields import NEWEST, Encoded, Leaf, Version, commit, encode, entry_hash
from limbeck.ledger.merkle.hashing import commit_hashes
from limbeck.ledger.merkle.order import LeafSet, LeavesFactError, leaf_sets
from limbeck.ledger.merkle.salts import Salts
from limbeck.ledger.merkle.stored import WIDTH
from limbeck.ledger.merkle.tree import Hash
from limbeck.ledger.store import Ledger, Row
from limbeck.records import Entry

if TYPE_CHECKING:
    from limbeck.ledger.sealing import Row as LeafRow
    from limbeck.recipe import Recipe

_LEAVES = "leaves of version 1 or 2 in entries of the stage seal, none older than those before, and in no other"
_CHANGED = "somebody changed the ledger after it was written; compare with a copy kept elsewhere"
_PART = 4096
"""Leaf hashes that are Python objects at a time."""

_REMEDY = "put back the files as the run wrote them, or run the same recipe again"


@dataclass
class Tree:
    """What is known of a ledger's tree once it was checked."""

    problems: list[Problem] = field(default_factory=list)
    sets: tuple[LeafSet, ...] | None = None
    """All sets of examples; None where damaged entries hide them, and with them the place of everything after."""
    size: int = 0
    roots: dict[int, Hash] = field(default_factory=dict)
    """Roots over the first so many leaves, where an entry begins; none where the tree itself is broken."""
    latest: bytes = b""
    """The example leaves of the latest set, one hash after the other: as a list they take twice the room."""

    @property
    def version(self) -> Version:
        """Of the leaves of the latest set."""
        return self.sets[-1].fact.version if self.sets else NEWEST


def check_tree(ledger: Ledger, rows: Sequence[Row], entries: Sequence[Entry]) -> Tree:
    """Hold the stored tree against the entries, and take from it what later checks need."""
    known = Tree(problems=ledger.tree.problems())
    if len(entries) != len(rows):
        return known
    try:
        known.sets = leaf_sets(entries)
    except LeavesFactError as error:
        where = f"ledger.db: entry {error.index}: facts: leaves"
        known.problems.append(Problem(where, _short(error), _LEAVES, _CHANGED))
    if known.problems or known.sets is None:
        return known
    known.size = ledger.tree.size
    due = len(entries) + sum(s.fact.count for s in known.sets)
    if known.size != due:
        found = f"{known.size} leaves"
        known.problems.append(Problem("ledger.db: the tree", found, f"{due}, by its entries", _CHANGED))
        return known
    known.problems += _entries_in_tree(ledger, rows, known.sets)
    counts = {s.entry.index: s.fact.count for s in known.sets}
    place = 0
    for entry in entries:
        if entry.stage in ("checkpoint", "note"):
            known.roots[place] = ledger.tree.root(place)
        place += counts.get(entry.index, 0) + 1
    if known.sets:
        last = known.sets[-1]
        end = last.first + last.fact.count
        parts = (ledger.tree.leaves(a, min(a + _PART, end)) for a in range(last.first, end, _PART))
        known.latest = b"".join(b"".join(part) for part in parts)
    return known


def _entries_in_tree(ledger: Ledger, rows: Sequence[Row], sets: Sequence[LeafSet]) -> Iterator[Problem]:
    counts = {s.entry.index: s.fact.count for s in sets}
    place = 0
    for index, row in enumerate(rows):
        place += counts.get(index, 0)
        due, found = entry_hash(str(row.body).encode("utf-8", "surrogateescape")), ledger.tree.leaves(place, place + 1)
        if found != [due]:
            where = f"ledger.db: leaf {place}, of entry {index}"
            yield Problem(where, found[0].hex() if found else "nothing", due.hex(), _CHANGED)
        place += 1


def leaf_differences(
    root: Path, known: Tree, present: frozenset[str], salts_key: bytes | None
) -> tuple[list[Problem], list[str]]:
    """Every example leaf that is not what the tree, the records or its own salts say."""
    from limbeck.ledger.agreement import UNREADABLE
    from limbeck.ledger.sealing import LEAVES, known_salts

    if not known.sets or known.problems or LEAVES not in present:
        return [], []
    notes: list[str] = []
    salts = known_salts(known.sets[-1], salts_key)
    if salts_key and salts is None:
        due = known.sets[-1].fact.salts
        return [Problem("the salts' key", "another set's", due, "ask for the key of this run")], notes
    if salts is None:
        notes.append(
            f"the salts of {known.sets[-1].fact.count} examples are not known here: that their leaves are made of what "
            f"{LEAVES} says was not checked; who sealed them has the secret, and can hand over this run's key"
        )
    try:
        return list(_leaves(root, known, salts, present, notes)), notes
    except LimbeckError as error:
        return list(error.problems), notes
    except UNREADABLE as error:
        found = f"cannot be read: {type(error).__name__}: {_short(error)}"
        return [Problem(LEAVES, found, "the leaves of its stage", _REMEDY)], notes


def _leaves(
    root: Path, known: Tree, salts: Salts | None, present: frozenset[str], notes: list[str]
) -> Iterator[Problem]:
    from limbeck.ledger.sealing import LEAVES, leaves, read_rows

    recipe, version = _recipe(root, present, notes), known.version
    if recipe is not None and _all_agree(root, recipe, known, salts):
        return
    again = leaves(recipe, root, version) if recipe else None
    hashes = (known.latest[i : i + WIDTH] for i in range(0, len(known.latest), WIDTH))

    def agrees(place: int, row: LeafRow, leaf: Leaf) -> bool:
        told = encode(leaf)
        same = told.text() == row.fields and told.share.decode() == row.share
        return same and (salts is None or commit(salts, place, told, version).hash == row.leaf)

    for place, (row, due, leaf) in enumerate(zip_longest(read_rows(root), hashes, again or ())):
        if row is not None and leaf is not None and row.leaf == due and agrees(place, row, leaf):
            continue
        salted = _Salted(salts, place, version) if salts else None
        yield from _row_differences(f"{LEAVES}: row {place}", row, due, leaf, salted, again is not None)


class _Salted(NamedTuple):
    """What a row's hash is made with."""

    salts: Salts
    row: int
    version: Version

    def hash(self, told: Encoded) -> Hash:
        return commit(self.salts, self.row, told, self.version).hash


def _row_differences(
    where: str, row: LeafRow | None, due: Hash | None, leaf: Leaf | None, salted: _Salted | None, again: bool
) -> Iterator[Problem]:
    """What is wrong with one row. `salted` are the salts and the number of the row, where they are known; `again` says
    whether leaves were made again, of which `leaf` is this row's.
    """
    from limbeck.ledger.sealing import parse_row

    if row is None or due is None:
        found, expected = ("no row", "a row") if row is None else ("a row", "no more leaves in the ledger's tree")
        yield Problem(where, found, expected, _REMEDY)
        return
    if row.leaf != due:
        yield Problem(f"{where}: leaf", row.leaf.hex(), f"{due.hex()}, as the ledger's tree", _REMEDY)
    told = encode(leaf) if leaf else None
    if told is None or told.text() != row.fields or told.share.decode() != row.share:
        said = parse_row(row)
        told = encode(said)
        if told.text() != row.fields or told.share.decode() != row.share:
            yield Problem(where, "values that are not canonical JSON", "RFC 8785", _REMEDY)
        if again:
            yield from _against_records(where, said, leaf)
    if salted and (made := salted.hash(told)) != due:
        yield Problem(f"{where}: hash of fields and salts", made.hex(), f"{due.hex()}, as the tree", _REMEDY)


def _against_records(where: str, said: Leaf, leaf: Leaf | None) -> Iterator[Problem]:
    if leaf is None:
        yield Problem(where, "a row", "no more examples", _REMEDY)
        return
    for name, value in said.values.items():
        if value != leaf.values[name]:
            yield Problem(f"{where}: {name}", _told(value), f"{_told(leaf.values[name])}, as its records", _REMEDY)
    if said.share != leaf.share:
        shares = _told(said.share.value()), f"{_told(leaf.share.value())}, as its example"
        yield Problem(f"{where}: share", *shares, _REMEDY)


def _recipe(root: Path, present: frozenset[str], notes: list[str]) -> Recipe | None:
    """The recipe by which the leaves can be made again, where all records are there and it is one of this version."""
    from limbeck.rundir import RunDir

    if not {"recipe.yaml", "prompts.parquet", "completions.parquet", "verdicts.parquet", "examples"} <= present:
        return None
    try:
        return RunDir(root).recipe()
    except (ValueError, OSError, RecursionError, yaml.YAMLError, LimbeckError):
        notes.append("recipe.yaml is not a recipe of this version; leaves were not compared with the records")
        return None


def _all_agree(root: Path, recipe: Recipe, known: Tree, salts: Salts | None) -> bool:
    """Whether every row is what the tree, the records and its salts say, asked by column. What cannot be read does not
    agree.
    """
    from limbeck.ledger.agreement import UNREADABLE
    from limbeck.ledger.leaf_columns import leaf_columns
    from limbeck.ledger.sealing import leaves_table, read_tables

    try:
        rows, place = Rows(read_tables(root)), 0
        for told in leaf_columns(recipe, root, known.version):
            count = len(told.shares)
            due = known.latest[WIDTH * place : WIDTH * (place + count)]
            if len(due) != WIDTH * count:
                return False
            hashes = [due[i : i + WIDTH] for i in range(0, len(due), WIDTH)]
            if salts is not None and commit_hashes(salts, place, told, known.version) != hashes:
                return False
            if not leaves_table(told, hashes).equals(rows.take(count)):
                return False
            place += count
        return WIDTH * place == len(known.latest) and rows.take(1).num_rows == 0
    except (*UNREADABLE, LimbeckError):
        return False


def _told(value: object) -> str:
    text = canonical(value).decode()
    return text if len(text) < 200 else f"{text[:180]} ... ({len(text)} characters)"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
