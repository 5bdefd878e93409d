"""A set of digests that takes 32 bytes an entry and little more.

Python's own set holds an object of 120 bytes for each such text, beside the set's own table.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSet

from limbeck.records import Digest

_WIDTH = 32
_TAG = "sha256:"
_EMPTY = bytes(_WIDTH)
_GONE = b"\xff" * _WIDTH
"""Where an entry was removed. Like `_EMPTY`, no SHA-256 that anybody will ever see."""
_LEAST = 1024
"""Slots of the smallest table."""
_FULL = 0.8
"""Share of slots in use at which the table grows."""
_GROWTH = 1.5


class DigestSet(MutableSet[Digest]):
    """A set of tagged SHA-256 digests: open addressing with linear probing, in one bytearray.

    Law: behaves as `set` does, but for the order of iteration.
    """

    def __init__(self) -> None:
        self._slots, self._used, self._count = _LEAST, 0, 0
        self._table = bytearray(_LEAST * _WIDTH)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Digest]:
        for raw in self._entries(self._table):
            yield _TAG + raw.hex()

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and self._find(_raw(value))[0]

    def add(self, value: Digest) -> None:
        """See `set.add`."""
        found, at = self._find(raw := _raw(value))
        if found:
            return
        self._used += self._table[at : at + _WIDTH] == _EMPTY
        self._table[at : at + _WIDTH] = raw
        self._count += 1
        if self._used > self._slots * _FULL:
            self._grow()

    def discard(self, value: Digest) -> None:
        """See `set.discard`."""
        found, at = self._find(_raw(value))
        if found:
            self._table[at : at + _WIDTH] = _GONE
            self._count -= 1

    def _find(self, raw: bytes) -> tuple[bool, int]:
        """Whether it is there, and where in the table; if it is not, where it belongs."""
        table, end, free = self._table, self._slots * _WIDTH, -1
        at = int.from_bytes(raw[:8], "little") % self._slots * _WIDTH
        while (entry := table[at : at + _WIDTH]) != raw:
            if entry == _EMPTY:
                return False, at if free < 0 else free
            if free < 0 and entry == _GONE:
                free = at
            at = (at + _WIDTH) % end
        return True, at

    @staticmethod
    def _entries(table: bytearray) -> Iterator[bytes]:
        for at in range(0, len(table), _WIDTH):
            entry = bytes(table[at : at + _WIDTH])
            if entry not in (_EMPTY, _GONE):
                yield entry

    def _grow(self) -> None:
        entries = self._entries(self._table)
        self._slots = max(_LEAST, int(self._count / _FULL * _GROWTH))
        self._used, self._table = self._count, bytearray(self._slots * _WIDTH)
        for raw in entries:
            at = self._find(raw)[1]
            self._table[at : at + _WIDTH] = raw


def _raw(value: str) -> bytes:
    raw = bytes.fromhex(value.removeprefix(_TAG))
    if len(raw) != _WIDTH:
        raise ValueError(f"not a SHA-256 digest: {value}")
    return raw
