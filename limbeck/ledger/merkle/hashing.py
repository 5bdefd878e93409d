"""Leaf hashes of thousands of examples at once: what `fields.commit` makes of one, only faster.

Nearly all that is left are SHA-256 and HKDF themselves, some forty calls an example: what is hashed is laid out by
numpy, column by column, and no example has an object of its own. That both ways agree is a law of the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from operator import add
from typing import NamedTuple

import numpy as np

from limbeck.ledger.merkle.fields import EXAMPLE, FIELD, FIELD_NODE, FIELDS, SHARE, Version
from limbeck.ledger.merkle.salts import SALT, Salts
from limbeck.ledger.merkle.tree import LEAF

_HASH = 32


class EncodedColumns(NamedTuple):
    """The canonical bytes of the values of some examples that stand together."""

    fields: tuple[Sequence[bytes], ...]
    """A column for each of `FIELDS`, in their order."""
    shares: Sequence[bytes]

    def texts(self) -> list[bytes]:
        """The canonical JSON object of each example's private fields."""
        return [_OBJECT % row for row in zip(*self.fields, strict=True)]


_OBJECT = b"{%b}" % b",".join(b'"%b":%%b' % name.encode() for name in FIELDS)


def commit_hashes(salts: Salts, first: int, told: EncodedColumns, version: Version) -> list[bytes]:
    """The leaf hashes of the examples from row `first` of their set on."""
    count = len(told.shares)
    if not count:
        return []
    own = np.frombuffer(b"".join(salts.rows(first, count, len(FIELDS) + 1)), np.uint8).reshape(count, -1, SALT)
    digests = np.empty((count, len(FIELDS), _HASH), np.uint8)
    for place, (name, column) in enumerate(zip(FIELDS, told.fields, strict=True)):
        digests[:, place] = _digests(map(add, _salted(own[:, place], name), column))
    while digests.shape[1] > 1:  # a whole tree: the number of fields is a power of two
        pairs = digests.reshape(-1, 2 * _HASH)
        digests = _digests(_rows(FIELD_NODE, pairs)).reshape(count, -1, _HASH)
    shares = _digests(map(add, _salted(own[:, -1], SHARE), told.shares))
    return [sha256(leaf).digest() for leaf in _rows(LEAF + EXAMPLE[version], digests[:, 0], shares)]


def _salted(salts: np.ndarray, name: str) -> list[bytes]:
    """What stands before a field's value, of each row."""
    ends = np.frombuffer(bytes([len(name)]) + name.encode(), np.uint8)
    return _rows(FIELD, salts, np.broadcast_to(ends, (len(salts), len(ends))))


def _rows(prefix: bytes, *parts: np.ndarray) -> list[bytes]:
    """The bytes of each row of some arrays, side by side, with a prefix."""
    before = np.broadcast_to(np.frombuffer(prefix, np.uint8), (len(parts[0]), len(prefix)))
    whole = np.concatenate((before, *parts), axis=1)
    return whole.view(f"V{whole.shape[1]}").ravel().tolist()


def _digests(datas: Iterable[bytes]) -> np.ndarray:
    found = b"".join([sha256(data).digest() for data in datas])
    return np.frombuffer(found, np.uint8).reshape(-1, _HASH)
