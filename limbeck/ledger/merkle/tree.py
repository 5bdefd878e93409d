"""Merkle trees by RFC 9162, section 2.1: roots, inclusion and consistency proofs.

A proof is made from subtree hashes, `subtree(a, b)` = MTH(D[a:b]), so that the same code serves a list in memory and a
file with a million leaves. Checking needs nothing but the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

Hash = bytes
"""32 bytes."""

EMPTY_ROOT = sha256().digest()
LEAF, NODE = b"\x00", b"\x01"

Subtree = Callable[[int, int], Hash]
"""`subtree(a, b)` is MTH over the leaves a to b - 1, a < b."""


def leaf_hash(data: bytes) -> Hash:
    """Hash of a leaf's data."""
    return sha256(LEAF + data).digest()


def node_hash(left: Hash, right: Hash) -> Hash:
    """Hash of two subtrees."""
    return sha256(NODE + left + right).digest()


def split(n: int) -> int:
    """The largest power of two below n; n is at least 2."""
    return 1 << (n - 1).bit_length() - 1


def root(hashes: Sequence[Hash], prefix: bytes = NODE) -> Hash:
    """MTH over leaf hashes, level by level: an odd one out at the end of a level moves up as it is."""
    if not hashes:
        return EMPTY_ROOT
    level = hashes
    while len(level) > 1:
        one = iter(level)
        above = [sha256(prefix + left + right).digest() for left, right in zip(one, one, strict=False)]
        level = [*above, level[-1]] if len(level) % 2 else above
    return level[0]


def subtree_of(hashes: Sequence[Hash], prefix: bytes = NODE) -> Subtree:
    """Subtree hashes of a list."""
    return lambda a, b: root(hashes[a:b], prefix)


def inclusion_path(subtree: Subtree, place: int, size: int) -> list[Hash]:
    """PATH(place, D[size]) of section 2.1.3.1, from the bottom up. Raises `ValueError` where there is no such leaf."""
    if not 0 <= place < size:
        raise ValueError(f"no leaf {place} in a tree of {size}")
    path, a, b = [], 0, size
    while b - a > 1:
        middle = a + split(b - a)
        if place < middle:
            path.append(subtree(middle, b))
            b = middle
        else:
            path.append(subtree(a, middle))
            a = middle
    return path[::-1]


def root_from_path(leaf: Hash, place: int, size: int, path: Sequence[Hash], prefix: bytes = NODE) -> Hash:
    """The root that an inclusion path leads to (section 2.1.3.2). Raises `ValueError` for one of the wrong length."""
    if not 0 <= place < size:
        raise ValueError(f"no leaf {place} in a tree of {size}")
    at, last, found = place, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ValueError("an inclusion path that is too long")
        if at % 2 or at == last:
            found = sha256(prefix + sibling + found).digest()
            while not at % 2 and at:
                at, last = at >> 1, last >> 1
        else:
            found = sha256(prefix + found + sibling).digest()
        at, last = at >> 1, last >> 1
    if last:
        raise ValueError("an inclusion path that is too short")
    return found


def consistency_proof(subtree: Subtree, old: int, new: int) -> list[Hash]:
    """PROOF(old, D[new]) of section 2.1.4.1. Raises `ValueError` unless 0 < old <= new."""
    if not 0 < old <= new:
        raise ValueError(f"no consistency proof from {old} to {new} leaves")
    proof, a, b, whole = [], 0, new, True
    while old != b:
        middle = a + split(b - a)
        if old <= middle:
            proof.append(subtree(middle, b))
            b = middle
        else:
            proof.append(subtree(a, middle))
            a, whole = middle, False
    return ([] if whole else [subtree(a, b)]) + proof[::-1]


def consistent(old: int, new: int, old_root: Hash, new_root: Hash, proof: Sequence[Hash]) -> bool:
    """Whether a proof shows that the tree of `new` leaves begins with that of `old` (section 2.1.4.2)."""
    if not 0 < old <= new or (old == new and proof):
        return False
    if old == new:
        return old_root == new_root
    hashes = [old_root, *proof] if old & (old - 1) == 0 else list(proof)
    if not hashes:
        return False
    at, last = old - 1, new - 1
    while at % 2:
        at, last = at >> 1, last >> 1
    first = second = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            return False
        if at % 2 or at == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while not at % 2 and at:
                at, last = at >> 1, last >> 1
        else:
            second = node_hash(second, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and first == old_root and second == new_root
