"""A set of digests that takes the same memory however many they are.

Python's own set holds an object of 120 bytes for each such text, beside the set's own table. SQLite keeps a few MiB of
a table in memory and the rest in a file of its own, which has no name and is gone with the process.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Iterator, MutableSet

from limbeck.records import Digest

_TAG = "sha256:"
_WIDTH = 32
_CACHE = 16 * 1024
"""KiB of the table that are in memory: 300,000 digests, which never touch the disk."""
_TOGETHER = 4096
"""Digests that are read together where all are gone through."""


class DigestSet(MutableSet[Digest]):
    """A set of tagged SHA-256 digests, in SQLite's temporary database.

    Law: behaves as `set` does, but for the order of iteration, which is that of the digests. Where there is no room for
    its file, `sqlite3.OperationalError` says so; SQLITE_TMPDIR or TMPDIR names another place for it.
    """

    def __init__(self) -> None:
        # In autocommit mode, so that what follows is one transaction that never ends: nothing has to survive.
        self._db = db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        weakref.finalize(self, db.close)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{_CACHE}"):
            db.execute(f"PRAGMA {setting}")
        db.execute("CREATE TABLE digests (raw BLOB PRIMARY KEY) WITHOUT ROWID")
        db.execute("BEGIN")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Digest]:
        rows = self._db.execute("SELECT raw FROM digests ORDER BY raw")
        while some := rows.fetchmany(_TOGETHER):
            yield from (_TAG + raw.hex() for (raw,) in some)

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        return self._db.execute("SELECT 1 FROM digests WHERE raw = ?", (_raw(value),)).fetchone() is not None

    def add(self, value: Digest) -> None:
        """See `set.add`."""
        self._count += self._db.execute("INSERT OR IGNORE INTO digests VALUES (?)", (_raw(value),)).rowcount

    def discard(self, value: Digest) -> None:
        """See `set.discard`."""
        self._count -= self._db.execute("DELETE FROM digests WHERE raw = ?", (_raw(value),)).rowcount


def _raw(value: str) -> bytes:
    raw = bytes.fromhex(value.removeprefix(_TAG))
    if len(raw) != _WIDTH:
        raise ValueError(f"not a SHA-256 digest: {value}")
    return raw
