"""The journal: every request and the raw bytes of its answer, on disk before anyone parses them.

One SQLite file in WAL mode with `synchronous=FULL`: a group of answers is one transaction, and when
`put_group` returns, the group has been through fsync and outlives a kill and a power cut, whole. An answer
once written is never written over: a second one for the same request was paid for too, so it is set aside
and counted, but not used.

The schema is versioned by `PRAGMA user_version`; opening an older journal brings it up to date, one
migration a version, each in a transaction of its own.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from limbeck.collect.teachers import Answer
from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import digest_bytes
from limbeck.records import Digest

_APPLICATION = 0x4C4D424A
"""`PRAGMA application_id` ("LMBJ"): tells a journal from any other SQLite file."""

_LOOKUP = 500
"""Keys a query asks about; SQLite's least limit on parameters is 999."""


class Journaled(NamedTuple):
    """One answer as it lies in the journal."""

    key: Digest
    request: bytes
    """Canonical JSON of the full request; `key` is its digest."""
    raw: bytes
    response: Digest
    """Digest of `raw`."""
    created: datetime
    """When it was journaled, UTC."""


class Journal:
    """A journal file, made if it is not there. A context manager.

    Raises `InputError` where the file is no journal, is damaged, cannot be written, or is of a newer
    version. A full disk is raised as SQLite says it; what was acknowledged before stays.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with self._telling():
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            try:
                self._refuse_foreign()
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._migrate()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def put_group(self, answers: Sequence[Answer]) -> int:
        """Write answers in one transaction, all or none; returns how many were new. When it returns, they
        are safe.
        """
        created, new = datetime.now(UTC).isoformat(timespec="microseconds"), 0
        with self._telling(), self._transaction():
            for request, raw in answers:
                paid = (zlib.compress(raw), digest_bytes(raw), created)
                done = self._db.execute(_INSERT, (request.key, zlib.compress(request.body), *paid))
                new += done.rowcount
                if done.rowcount == 0:
                    self._db.execute(_SET_ASIDE, (request.key, *paid))
        return new

    def get(self, key: Digest) -> Journaled:
        """The answer to a request. Raises `KeyError` where there is none, `InputError` where its bytes are
        damaged.
        """
        with self._telling():
            row = self._db.execute(
                "SELECT request, raw, response, created FROM answers WHERE key = ?", (key,)
            ).fetchone()
        if row is None:
            raise KeyError(key)
        found = Journaled(
            key, self._unpack(key, row[0]), self._unpack(key, row[1]), row[2], datetime.fromisoformat(row[3])
        )
        for name, want, have in (("request", key, found.request), ("answer", found.response, found.raw)):
            if digest_bytes(have) != want:
                raise self._damaged(f"the {name} of {key} has digest {digest_bytes(have)}", f"digest {want}")
        return found

    def missing(self, keys: Iterable[Digest]) -> list[Digest]:
        """Those of the keys that have no answer yet, in their order."""
        left, open_keys = iter(keys), []
        while chunk := list(islice(left, _LOOKUP)):
            marks = ", ".join("?" * len(chunk))
            with self._telling():
                rows = self._db.execute(f"SELECT key FROM answers WHERE key IN ({marks})", chunk).fetchall()
            there = {key for (key,) in rows}
            open_keys += [key for key in chunk if key not in there]
        return open_keys

    def __len__(self) -> int:
        """Number of answers."""
        with self._telling():
            return self._db.execute("SELECT count(*) FROM answers").fetchone()[0]

    @property
    def refused(self) -> int:
        """Number of second answers set aside, over the journal's whole life."""
        with self._telling():
            return self._db.execute("SELECT count(*) FROM refused").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back on some errors, a full disk among them
                self._db.execute("ROLLBACK")
            raise

    def _refuse_foreign(self) -> None:
        """Before anything is written: is this a journal, or nothing yet?"""
        application, version = self._pragma("application_id"), self._pragma("user_version")
        tables = [name for (name,) in self._db.execute("SELECT name FROM sqlite_master ORDER BY name")]
        if application not in (0, _APPLICATION) or (application == 0 and tables):
            named = ", ".join(tables[:5]) or "none"
            found = f"another SQLite database (application id {application}, tables: {named})"
            raise self._wrong(found, "a journal that limbeck made", "move it out of the way, or use another --out")
        if version > len(_MIGRATIONS):
            raise self._wrong(f"a journal of version {version}", f"version {len(_MIGRATIONS)} or older",
                              "use the limbeck that wrote it, or a newer one")  # fmt: skip

    def _migrate(self) -> None:
        for number in range(self._pragma("user_version"), len(_MIGRATIONS)):
            with self._transaction():
                for statement in _MIGRATIONS[number]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {number + 1}")

    def _pragma(self, name: str) -> int:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def _unpack(self, key: Digest, packed: bytes) -> bytes:
        try:
            return zlib.decompress(packed)
        except zlib.error as error:
            raise self._damaged(
                f"what lies under {key} does not unpack ({error})", "bytes as they were written"
            ) from None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Says what SQLite's errors mean; those that are not about this file (a full disk) go on as they
        are.
        """
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_CORRUPT:
                raise self._damaged(str(error), "an intact SQLite database") from error
            if code in _UNUSABLE:
                found, remedy = _UNUSABLE[code]
                raise self._wrong(f"{found} ({error})", "a journal that can be read and written", remedy) from error
            raise

    def _damaged(self, found: str, expected: str) -> InputError:
        return self._wrong(found, expected, f"restore {self.path.name} from a copy, or move it away and collect again")

    def _wrong(self, found: str, expected: str, remedy: str) -> InputError:
        return InputError("the journal cannot be used", [Problem(str(self.path), found, expected, remedy)])


_INSERT = (
    "INSERT INTO answers (key, request, raw, response, created) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
)
_SET_ASIDE = "INSERT INTO refused (key, raw, response, created) VALUES (?, ?, ?, ?)"

_UNUSABLE = {
    sqlite3.SQLITE_NOTADB: ("not an SQLite database", "move it out of the way, or use another --out"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "check the path and its permissions"),
    sqlite3.SQLITE_READONLY: ("may not be written", "check the permissions of the file and its directory"),
    sqlite3.SQLITE_PERM: ("may not be used", "check the permissions of the file and its directory"),
    sqlite3.SQLITE_BUSY: ("in use by another process", "wait for that process, or stop it"),
}

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE answers (key TEXT PRIMARY KEY NOT NULL, request BLOB NOT NULL, raw BLOB NOT NULL, "
        "response TEXT NOT NULL, created TEXT NOT NULL)",
        "CREATE TABLE refused (key TEXT NOT NULL, raw BLOB NOT NULL, response TEXT NOT NULL, created TEXT NOT NULL)",
    ),
)
"""Statements that lead from version n to n + 1. `request` and `raw` are zlib streams; `created` is ISO
8601 in UTC.
"""
