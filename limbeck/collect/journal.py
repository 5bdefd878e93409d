"""The journal: every request and the raw bytes of its answer, on disk before anyone parses them.

One SQLite file in WAL mode with `synchronous=FULL`: a group of answers is one transaction, and when
`put_group` returns, the group has been through fsync and outlives a kill and a power cut, whole. An answer
once written is never written over: a second one for the same request was paid for too, so it is set aside
and counted, but not used.

Beside the answers stands every request that was sent to an endpoint: written before it leaves, ended when
its outcome is known. One without an outcome was under way when its process was killed. So what a provider
billed is what is journaled, what ended otherwise, and what was in flight at the kills. Requests in a
provider's batch are sent too; `limbeck.collect.endpoints.batch_log` keeps what is needed to find them again.

The schema is versioned by `PRAGMA user_version`; opening an older journal brings it up to date, one
migration a version, each in a transaction of its own.
"""

from __future__ import annotations

import fcntl
import json
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

import zstandard

from limbeck.collect.journal_sums import Outcomes, Took
from limbeck.collect.migrations import MIGRATIONS as _MIGRATIONS
from limbeck.collect.teachers import Answer
from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import digest_bytes
from limbeck.recipe import Recipe
from limbeck.records import Digest
from limbeck.rundir import RunDir

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


class Sent(NamedTuple):
    """A request that is about to leave."""

    number: int
    """Unique in a journal; counts up."""
    key: Digest
    account: Digest
    """Whose money it is: `Recipe.account`."""
    held: int
    """Picodollars set aside for it; 0 where there is no price."""


class Ended(NamedTuple):
    """What became of a request that was sent."""

    number: int
    outcome: str
    """`answered`, or why it was not: `timeout`, `cut`, `connect`, `http 429`, ..."""
    cost: int
    """Picodollars: billed where the provider said so, else the most that it can have been."""


class Kept(NamedTuple):
    """How an answer came to lie in the journal."""

    response: Digest
    """Digest of its raw bytes."""
    created: datetime
    """When it was journaled, UTC."""


KILLED = "killed"
"""Outcome of a request that was under way when its process ended without a word; its cost is the most it can
have been."""

IN_BATCH = "in a batch"
"""Outcome, until there is another, of a request in a batch that a provider works on: it outlives our process."""


class Journal:
    """A journal file, made if it is not there. A context manager.

    Raises `InputError` where the file is no journal, is damaged, cannot be written, or is of a newer
    version. A full disk is raised as SQLite says it; what was acknowledged before stays.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        # One of each for all rows: making one costs more than using it. Two threads may not use one at the same time.
        self._packer = zstandard.ZstdCompressor(level=3)
        self._pack = self._packer.compress
        self._unpack_zstd = zstandard.ZstdDecompressor().decompress
        with self._telling():
            # Where an event loop runs already (a notebook), endpoints are asked from another thread; this one waits.
            self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
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
                new += self._put(request.key, self._pack(request.body), self._pack(raw), digest_bytes(raw), created)
        return new

    def _put(self, key: Digest, request: bytes, raw: bytes, response: Digest, created: str) -> int:
        done = self._db.execute(_INSERT, (key, request, raw, response, created))
        if done.rowcount == 0:
            self._db.execute(_SET_ASIDE, (key, raw, response, created))
        return done.rowcount

    def put_traffic(self, sent: Sequence[Sent], answers: Sequence[Answer], ended: Sequence[Ended]) -> list[Kept | None]:
        """Write what is about to leave, what came back, and what became of what was sent, in one transaction. When it
        returns, all of it is safe. Gives how each answer was kept; None where it is a second one, and was set aside.

        One statement a table, whatever the number of rows: each lets other threads run, and has to wait for them.
        """
        when = datetime.now(UTC)
        now, kept = when.isoformat(timespec="microseconds"), list[Kept | None]()
        packed = self._pack_all([part for answer in answers for part in (answer.request.body, answer.raw)])
        rows = [
            (answer.request.key, packed[2 * n], packed[2 * n + 1], digest_bytes(answer.raw), now)
            for n, answer in enumerate(answers)
        ]
        with self._telling(), self._transaction():
            if sent:
                self._db.execute(_SEND, (now, json.dumps(sent)))
            if rows:
                marks = ", ".join(["(?, ?, ?, ?, ?)"] * len(rows))
                values = [value for row in rows for value in row]
                new = {key for (key,) in self._db.execute(_INSERT_ALL.format(marks), values).fetchall()}
                for key, _, raw, response, created in rows:
                    kept.append(Kept(response, when) if key in new else None)
                    if key not in new:
                        self._db.execute(_SET_ASIDE, (key, raw, response, created))
                    new.discard(key)  # a second one in the same group is set aside too
            if ended:
                self._db.execute(_END, (now, json.dumps(ended)))
        return kept

    def _pack_all(self, parts: Sequence[bytes]) -> list[bytes]:
        """The same as `_pack` of each."""
        if len(parts) < 3 or not all(parts) or "multi_compress_to_buffer" not in zstandard.backend_features:
            return [self._pack(part) for part in parts]
        return [piece.tobytes() for piece in self._packer.multi_compress_to_buffer(list(parts))]

    @property
    def next_number(self) -> int:
        """The next free number of a request."""
        with self._telling():
            return (self._db.execute("SELECT max(number) FROM sent").fetchone()[0] or 0) + 1

    def close_open(self) -> int:
        """Mark requests without an outcome as killed; returns how many. Only for who holds the journal: nobody else
        can have one under way.
        """
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        with self._telling(), self._transaction():
            return self._db.execute(_KILL, (KILLED, now)).rowcount

    def outcomes(self, account: Digest) -> dict[str, Outcomes]:
        """The requests of one account by their outcome; those under way as `killed`, or as `in a batch`."""
        with self._telling():
            rows = self._db.execute(OUTCOMES, (KILLED, account)).fetchall()
        return {outcome: Outcomes(requests, cost) for outcome, requests, cost in rows}

    def costs(self, keys: Iterable[Digest]) -> dict[Digest, int]:
        """Picodollars that were counted for the answers to these requests, those that were sent from this journal."""
        with self._telling():
            return dict(self._db.execute(_COSTS, (json.dumps(list(keys)),)).fetchall())

    def took(self, key: Digest) -> Took:
        """What an answer to a request took: of the requests sent for it, the last that was answered."""
        with self._telling():
            packed = self._db.execute(
                "SELECT length(request) + length(raw) FROM answers WHERE key = ?", (key,)
            ).fetchone()
            times = self._db.execute(_TIMES, (key,)).fetchone()
        began, ended = map(datetime.fromisoformat, times) if times else (None, None)
        return Took((ended - began).total_seconds() if began and ended else 0.0, packed[0] if packed else 0)

    def copy_to(self, other: Journal, keys: Iterable[Digest]) -> int:
        """Copy the answers to these requests that `other` lacks, as they lie here; returns how many."""
        copied, lacking = 0, iter(other.missing(keys))
        while chunk := list(islice(lacking, _LOOKUP)):
            marks = ", ".join("?" * len(chunk))
            with self._telling():
                rows = self._db.execute(f"SELECT {_COLUMNS} FROM answers WHERE key IN ({marks})", chunk).fetchall()
            with other._telling(), other._transaction():
                copied += sum(other._put(*row) for row in rows)
        return copied

    def get(self, key: Digest) -> Journaled:
        """The answer to a request. Raises `KeyError` where there is none, `InputError` where its bytes are damaged."""
        return self.get_all([key])[key]

    def get_all(self, keys: Sequence[Digest]) -> dict[Digest, Journaled]:
        """The answers to those of a few hundred requests that have one. Raises `InputError` where one is damaged."""
        marks = ", ".join("?" * len(keys))
        with self._telling():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM answers WHERE key IN ({marks})", keys).fetchall()
        return {row[0]: self._checked(*row) for row in rows}

    def _checked(self, key: Digest, request: bytes, raw: bytes, response: Digest, created: str) -> Journaled:
        when = datetime.fromisoformat(created)
        found = Journaled(key, self._unpack(key, request), self._unpack(key, raw), response, when)
        for name, want, have in (("request", key, found.request), ("answer", response, found.raw)):
            if (digest := digest_bytes(have)) != want:
                raise self._damaged(f"the {name} of {key} has digest {digest}", f"digest {want}")
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
            return self._unpack_zstd(packed) if packed.startswith(zstandard.FRAME_HEADER) else zlib.decompress(packed)
        except (zlib.error, zstandard.ZstdError) as error:
            found = f"what lies under {key} does not unpack ({error})"
            raise self._damaged(found, "bytes as they were written") from None

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


def journal_path(recipe: Recipe, run: RunDir) -> Path:
    """The journal of a run: its own, or one that the recipe says is shared."""
    return Path(recipe.collect.journal) if recipe.collect.journal is not None else run / "journal.db"


@contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a journal for collecting: two processes that ask at the same time would pay for one answer twice. The hold
    ends with the process, however it ends. Raises `InputError` where another process holds it.
    """
    place = Path(f"{os.fspath(path)}-lock")
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            found = f"held by process {lock.read().strip() or 'unknown'}"
            problem = Problem(os.fspath(path), found, "no other process", "wait for it, or stop it")
            raise InputError("another run is collecting into this journal", [problem]) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield


_COLUMNS = "key, request, raw, response, created"
_INSERT = f"INSERT INTO answers ({_COLUMNS}) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
_SET_ASIDE = "INSERT INTO refused (key, raw, response, created) VALUES (?, ?, ?, ?)"
_INSERT_ALL = f"INSERT INTO answers ({_COLUMNS}) VALUES {{}} ON CONFLICT (key) DO NOTHING RETURNING key"
_SEND = (
    "INSERT INTO sent (number, key, account, held, started) SELECT json_extract(value, '$[0]'), "
    "json_extract(value, '$[1]'), json_extract(value, '$[2]'), json_extract(value, '$[3]'), ?1 FROM json_each(?2)"
)
_END = (
    "UPDATE sent SET outcome = e.outcome, cost = e.cost, ended = ?1 FROM "
    "(SELECT json_extract(value, '$[0]') AS number, json_extract(value, '$[1]') AS outcome, "
    "json_extract(value, '$[2]') AS cost FROM json_each(?2)) AS e WHERE sent.number = e.number"
)
_TIMES = "SELECT started, ended FROM sent WHERE key = ? AND outcome = 'answered' ORDER BY number DESC LIMIT 1"
_COSTS = "SELECT key, cost FROM sent WHERE outcome = 'answered' AND key IN (SELECT value FROM json_each(?))"
_BATCHED = "number IN (SELECT number FROM batch_rows)"
_KILL = f"UPDATE sent SET outcome = ?, cost = held, ended = ? WHERE outcome IS NULL AND NOT {_BATCHED}"
OUTCOMES = (
    f"SELECT coalesce(outcome, iif({_BATCHED}, '{IN_BATCH}', ?)), count(*), sum(coalesce(cost, held)) FROM sent "
    "WHERE account = ? GROUP BY 1"
)

_UNUSABLE = {
    sqlite3.SQLITE_NOTADB: ("not an SQLite database", "move it out of the way, or use another --out"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "check the path and its permissions"),
    sqlite3.SQLITE_READONLY: ("may not be written", "check the permissions of the file and its directory"),
    sqlite3.SQLITE_PERM: ("may not be used", "check the permissions of the file and its directory"),
    sqlite3.SQLITE_BUSY: ("in use by another process", "wait for that process, or stop it"),
}
