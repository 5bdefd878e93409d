"""The tree as it lies in ledger.db: leaf hashes in blocks of 256, and the roots of complete subtrees.

Rows are only ever inserted. The stored subtrees make a proof in a tree of a million leaves a matter of a few reads;
`problems` recomputes them from the leaf hashes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator

from limbeck.errors import Problem
from limbeck.ledger.merkle.tree import EMPTY_ROOT, Hash, consistency_proof, inclusion_path, node_hash, root, split

BLOCK = 256
"""Leaves under a stored subtree of level 1; children under one of the levels above."""
WIDTH = 32
"""Bytes of a hash."""
_SHORT = f"CASE WHEN length(data) <= {BLOCK * WIDTH} THEN data END"
"""A block that is too long to be one is not read."""

_CHANGED = "somebody changed the ledger after it was written; compare with a copy kept elsewhere"


class StoredTree:
    """The tree in an open ledger."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    @property
    def size(self) -> int:
        """Leaves."""
        row = self._db.execute("SELECT first, length(data) FROM hashes ORDER BY first DESC LIMIT 1").fetchone()
        return row[0] + row[1] // WIDTH if row else 0

    def append(self, hashes: Iterable[Hash]) -> None:
        """Add leaves; the caller holds the transaction."""
        size = self.size
        open_block = b"".join(self.leaves(size - size % BLOCK, size))
        for hash_ in _blocks(hashes, BLOCK - size % BLOCK):
            data = b"".join(hash_)
            self._db.execute("INSERT INTO hashes VALUES (?, ?)", (size, data))
            size, open_block = size + len(hash_), open_block + data
            if size % BLOCK == 0:
                self._close(1, size // BLOCK - 1, root(_cut(open_block)))
                open_block = b""

    def _close(self, level: int, place: int, hash_: Hash) -> None:
        """A subtree is complete, and maybe the one that it ends."""
        self._db.execute("INSERT INTO subtrees VALUES (?, ?, ?)", (level, place, hash_))
        if (place + 1) % BLOCK == 0:
            first = place + 1 - BLOCK
            row = self._db.execute(
                "SELECT hash FROM subtrees WHERE level = ? AND place BETWEEN ? AND ? ORDER BY place",
                (level, first, place),
            )
            self._close(level + 1, place // BLOCK, root([bytes(h) for (h,) in row]))

    def leaves(self, a: int, b: int) -> list[Hash]:
        """Leaf hashes a to b - 1."""
        if a >= b:
            return []
        rows = self._db.execute(
            "SELECT first, data FROM hashes WHERE first >= ? AND first < ? ORDER BY first", (a - a % BLOCK, b)
        )
        found: list[Hash] = []
        for first, data in rows:
            hashes = _cut(bytes(data))
            found += hashes[max(0, a - first) : b - first]
        return found

    def subtree(self, a: int, b: int) -> Hash:
        """MTH over the leaves a to b - 1, from stored subtrees where they are complete."""
        n = b - a
        if n == 0:
            return EMPTY_ROOT
        if n < BLOCK:
            return root(self.leaves(a, b))
        level, under = 1, BLOCK
        while under < n:
            level, under = level + 1, under * BLOCK
        if under == n and a % n == 0:
            found = self._db.execute(
                "SELECT hash FROM subtrees WHERE level = ? AND place = ?", (level, a // n)
            ).fetchone()
            if found:
                return bytes(found[0])
        middle = a + split(n)
        return node_hash(self.subtree(a, middle), self.subtree(middle, b))

    def root(self, size: int | None = None) -> Hash:
        """The root over the first `size` leaves, or all."""
        return self.subtree(0, self.size if size is None else size)

    def path(self, place: int, size: int) -> list[Hash]:
        """The inclusion path of a leaf in the tree of the first `size` leaves."""
        return inclusion_path(self.subtree, place, size)

    def consistency(self, old: int, new: int) -> list[Hash]:
        """That the first `new` leaves begin with the first `old`."""
        return consistency_proof(self.subtree, old, new)

    def problems(self) -> list[Problem]:
        """Every block of leaf hashes that is not where or what it has to be, and every stored subtree that is not the
        root of what lies under it.
        """
        problems: list[Problem] = []
        due: dict[tuple[int, int], Hash] = {}
        size, block = 0, b""
        for first, data in self._db.execute(f"SELECT first, {_SHORT} FROM hashes ORDER BY first"):
            whole = isinstance(data, bytes) and len(data) % WIDTH == 0 and 0 < len(data) <= BLOCK * WIDTH
            if first != size or not whole or len(block) + len(data) > BLOCK * WIDTH:
                told = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
                expected = f"whole hashes from leaf {size} on, to the next multiple of {BLOCK} at most"
                return [*problems, Problem(f"ledger.db: hashes from leaf {first} on", told, expected, _CHANGED)]
            size, block = size + len(data) // WIDTH, block + data
            if size % BLOCK == 0:
                due[1, size // BLOCK - 1] = root(_cut(block))
                block = b""
        due |= _above(due)
        found: dict[tuple[int, int], bytes] = {}
        before: tuple[int, int] | None = None
        for level, place, h in self._db.execute("SELECT level, place, hash FROM subtrees ORDER BY level, place"):
            if type(level) is not int or type(place) is not int or (before is not None and (level, place) <= before):
                told, expected = f"level {str(level)[:40]}, place {str(place)[:40]}", "ascending levels and places"
                return [*problems, Problem("ledger.db: subtrees", told, expected, _CHANGED)]
            before = level, place
            found[before] = h if isinstance(h, bytes) and len(h) == WIDTH else b""
        return problems + [
            Problem(
                f"ledger.db: subtree {key[1]} of level {key[0]}",
                found[key].hex() if key in found else "nothing",
                due[key].hex() if key in due else "nothing",
                _CHANGED,
            )
            for key in sorted({*found, *due}, key=repr)
            if found.get(key) != due.get(key)
        ]


def _above(level: dict[tuple[int, int], Hash]) -> dict[tuple[int, int], Hash]:
    """The complete subtrees of all levels above a whole level 1."""
    above: dict[tuple[int, int], Hash] = {}
    number, hashes = 1, [level[key] for key in sorted(level)]
    while len(hashes) >= BLOCK:
        number += 1
        whole = len(hashes) // BLOCK * BLOCK
        hashes = [root(hashes[i : i + BLOCK]) for i in range(0, whole, BLOCK)]
        above |= {(number, place): h for place, h in enumerate(hashes)}
    return above


def _blocks(hashes: Iterable[Hash], first: int) -> Iterator[list[Hash]]:
    """The hashes in blocks: the first fills the block that is open."""
    block: list[Hash] = []
    room = first
    for one in hashes:
        block.append(one)
        if len(block) == room:
            yield block
            block, room = [], BLOCK
    if block:
        yield block


def _cut(data: bytes) -> list[Hash]:
    return [data[i : i + WIDTH] for i in range(0, len(data), WIDTH)]
