"""The ledger's store: an append-only SQLite file of hash-chained entries.

Laws:

- The digest of an entry is SHA-256 of its RFC 8785 canonical JSON, times as ISO 8601 UTC with microseconds.
  The table holds exactly those bytes, so a reader needs nothing but SHA-256 to check them.
- `Entry.previous` is the digest of the entry before, so the last digest (`head`) stands for the whole
  history: whoever keeps it elsewhere can tell later whether anything was changed.
- Every entry is a leaf of a Merkle tree, after the example leaves that it brought (docs/ledger-format.md).
- Triggers refuse UPDATE, DELETE and any INSERT that is not the next index. They guard against accidents; what
  guards against intent is the chain, and a head kept out of the writer's reach.
- An append is one transaction, synced: after a crash the entry is there or it is not.
- Reading checks the chain, and a broken one is never built upon.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import JsonValue, ValidationError

from limbeck.errors import InputError, Problem, RunDirError, VerificationError, as_disk_full
from limbeck.ledger.canonical import DEEPEST, EMPTY, canonical, digest_bytes, exact, iso, read_json, refuse_deep
from limbeck.ledger.code import code_version
from limbeck.ledger.layout import APPLICATION_ID, FORMAT, SCHEMA, TREE
from limbeck.ledger.merkle.fields import entry_hash
from limbeck.ledger.merkle.order import leaves_fact
from limbeck.ledger.merkle.stored import StoredTree
from limbeck.ledger.merkle.tree import Hash
from limbeck.records import Digest, Entry

_WAIT_SECONDS = 30.0
"""How long to wait for another process that holds the file."""

_AGAIN = "; run the same recipe again to bring it up to date"


LONGEST_BODY = 2**24
"""Bytes of a value that a verifier reads."""


class Row(NamedTuple):
    """One row as it lies in the file, nothing believed yet."""

    position: object
    digest: object
    body: object


def entry_body(entry: Entry) -> bytes:
    """The canonical bytes of an entry: what is stored and what is hashed. Raises `ValueError` for facts JSON
    cannot say exactly and for times without a zone.
    """
    values = entry.model_dump(mode="python")
    return canonical(values | {"started": iso(entry.started), "finished": iso(entry.finished)})


def entry_digest(entry: Entry) -> Digest:
    """The digest that names an entry and that the next one holds as `previous`."""
    return digest_bytes(entry_body(entry))


def parse_entry(body: str | bytes) -> Entry:
    """The entry of a stored body: `entry_body(parse_entry(b)) == b` for every b that `entry_body` made.
    Raises `ValueError`.
    """
    return Entry.model_validate(read_json(body))


class Ledger:
    """One ledger file, open. A context manager.

    Raises on opening:
        RunDirError: the path holds something that is not a ledger, or (`read_only`) nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False, as_it_lies: bool = False):
        """`as_it_lies` reads a file that nobody vouches for: no byte of it or beside it is changed, not even to undo an
        append that a crash cut off, and no value is longer than `LONGEST_BODY`.
        """
        self.path = Path(path)
        if read_only and not self.path.is_file():
            raise _not_a_ledger(self.path, "no such file")
        if as_it_lies and (found := at_rest(self.path)):
            raise _not_a_ledger(self.path, found)
        try:
            self._db = _connect(self.path, read_only, as_it_lies)
            try:
                _prepare(self._db, self.path, read_only)
            except BaseException:
                self._db.close()
                raise
        except UnicodeDecodeError:  # the damaged schema that SQLite's own message quotes
            raise _not_a_ledger(self.path, "a damaged SQLite file") from None
        except sqlite3.DatabaseError as error:
            if _says_not_a_database(error):
                raise _not_a_ledger(self.path, f"a file SQLite cannot read ({error})") from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; a single file is left."""
        self._db.close()

    def append(
        self,
        *,
        stage: str,
        started: datetime,
        inputs: Mapping[str, Digest],
        outputs: Mapping[str, Digest],
        recipe: Digest,
        facts: Mapping[str, JsonValue],
        leaves: Sequence[Hash] = (),
    ) -> Entry:
        """Add the entry of a stage that has just finished, durably, and the example leaves that it brings, which its
        fact `leaves` counts; returns it as a reader will find it.

        Raises:
            InputError: all facts that JSON cannot say exactly (NaN, infinity, integers beyond 2**53).
            VerificationError: the ledger as it stands is broken; nothing is added.

        """
        if problems := [*_deep(facts), *_unsayable("facts", dict(facts))]:
            raise InputError(f"the facts of stage {stage} cannot be recorded", problems)
        code = code_version()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            entries = self.entries()
            entry = Entry(
                index=len(entries),
                stage=stage,
                started=started,
                finished=datetime.now(UTC),
                inputs=dict(inputs),
                outputs=dict(outputs),
                recipe=recipe,
                facts=dict(facts),
                limbeck=code.limbeck,
                commit=code.commit,
                dirty=code.dirty,
                previous=entry_digest(entries[-1]) if entries else EMPTY,
            )
            body, fact = entry_body(entry), leaves_fact(entry)
            if len(leaves) != (fact.count if fact else 0):
                raise ValueError(f"{len(leaves)} leaves for the fact {fact}")
            self._db.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.index, digest_bytes(body), body.decode()))
            self.tree.append([*leaves, entry_hash(body)])
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return parse_entry(body)

    @property
    def tree(self) -> StoredTree:
        """The Merkle tree over everything in it."""
        return StoredTree(self._db)

    def rows(self) -> list[Row]:
        """All rows in the order of their index, unchecked. Raises what SQLite raises for a damaged file."""
        rows: list[Row] = []
        for row in self._db.execute("SELECT idx, digest, body FROM entries ORDER BY idx"):
            if rows and not row[0] > rows[-1].position:  # pages that are reached twice, without an end
                raise sqlite3.DatabaseError("entries that do not ascend")
            rows.append(Row(*row))
        return rows

    def entries(self) -> list[Entry]:
        """All entries, oldest first. Raises `VerificationError` with every break of the chain."""
        try:
            rows = self.rows()
        except sqlite3.DatabaseError as error:
            if as_disk_full(error, self.path.parent):
                raise
            remedy = "restore the file from a copy; `limbeck ledger verify` says what else differs"
            problem = Problem(str(self.path), str(error), "a ledger that can be read", remedy)
            raise VerificationError("the ledger is damaged", [problem]) from error
        if problems := chain_problems(rows):
            raise VerificationError(f"{self.path} was changed after it was written", problems)
        return [parse_entry(str(row.body)) for row in rows]

    def last(self, stage: str) -> Entry | None:
        """The latest entry of a stage, None where it never finished. Raises `VerificationError` as `entries`
        does.
        """
        return next((entry for entry in reversed(self.entries()) if entry.stage == stage), None)

    def head(self) -> Digest:
        """The digest that stands for the whole history; that of the empty string for an empty ledger."""
        entries = self.entries()
        return entry_digest(entries[-1]) if entries else EMPTY

    def schema_problems(self) -> list[Problem]:
        """Every way in which the file's tables and triggers are not those of a ledger, and what SQLite itself
        finds wrong with the file: that is not asked where tables are others, since they could have it compute things.
        """
        found = dict(self._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 100"))
        problems = [
            Problem(f"{self.path}: {name}", found.get(name) or "nothing", SCHEMA.get(name) or "nothing", _CHANGED)
            for name in sorted({*found, *SCHEMA})
            if found.get(name) != SCHEMA.get(name)
        ]
        if problems:
            return problems
        return [
            Problem(str(self.path), text, "a sound SQLite file", _CHANGED)
            for (text,) in self._db.execute("PRAGMA integrity_check")
            if text != "ok"
        ]


_CHANGED = "somebody changed the ledger after it was written; compare with a copy kept elsewhere"


def chain_problems(rows: list[Row]) -> list[Problem]:
    """Every row whose index, digest, bytes or link to the row before is not what it has to be."""
    problems, previous = [], EMPTY
    for place, row in enumerate(rows):
        where = f"ledger.db: entry {place}"
        text = row.body if isinstance(row.body, str) else repr(row.body)
        data = text.encode("utf-8", "surrogateescape")
        digest = digest_bytes(data)
        checks = [("index", row.position, place), ("digest of its bytes", digest, row.digest)]
        try:
            entry = parse_entry(text)
            checks += [("index within", entry.index, place), ("previous", entry.previous, previous)]
            if entry_body(entry) != data:
                checks.append(("content", "bytes that are not canonical", "RFC 8785 bytes"))
        except (ValueError, RecursionError) as error:
            checks.append(("content", _one_line(error), "an entry of version 1"))
        problems += [
            Problem(f"{where}: {what}", str(found), str(due), _CHANGED) for what, found, due in checks if found != due
        ]
        previous = digest
    return problems


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return str(error)


def _deep(facts: Mapping[str, object]) -> list[Problem]:
    try:
        refuse_deep({"facts": dict(facts)})
    except ValueError as error:
        return [Problem("facts", str(error), f"at most {DEEPEST} levels with the entry itself", "record it as text")]
    return []


def _unsayable(key: str, value: object) -> list[Problem]:
    """Every value in a JSON tree that RFC 8785 has no bytes for."""
    if isinstance(value, Mapping):
        return [p for name, inner in value.items() for p in _unsayable(f"{key}.{name}", inner)]
    if isinstance(value, list | tuple):
        return [p for place, inner in enumerate(value) for p in _unsayable(f"{key}[{place}]", inner)]
    try:
        canonical(value)
        if not exact(value):
            raise ValueError("JSON writes it like an integer, and from 2**53 on those are not exact")
    except ValueError as error:
        expected = "text, true, false, null, or a finite number: below 2**53 where JSON has no exponent for it"
        return [Problem(key, f"{value!r} ({error})", expected, "leave it out, or record it as text with the reason")]
    return []


def at_rest(path: Path) -> str:
    """Why an SQLite file cannot be read as it lies, without a look at anything beside it; empty where it can."""
    if path.is_symlink():
        return "a symbolic link"
    for end in ("-journal", "-wal"):
        beside = path.with_name(path.name + end)
        if beside.is_symlink() or (beside.exists() and (not beside.is_file() or beside.stat().st_size)):
            return f"{beside.name} beside it: a write was cut off or is under way; let limbeck finish it first"
    with open(path, "rb") as file:
        head = file.read(100)
    if len(head) == 100 and max(head[18:20]) > 1:
        return "an SQLite file whose journal mode is not that of a ledger"
    if len(head) == 100 and head[56:60] != b"\0\0\0\1":
        return "an SQLite file whose text is not UTF-8"
    return ""


def is_empty(path: Path) -> bool:
    """Whether there is no ledger yet, or one without an entry. Raises `RunDirError` as `Ledger` does."""
    if not path.exists() or not path.stat().st_size:
        return True
    with Ledger(path, read_only=True) as ledger:
        return not ledger.entries()


def _connect(path: Path, read_only: bool, as_it_lies: bool = False) -> sqlite3.Connection:
    """A reader opens the file for writing where it may, only so that SQLite can undo an append that a crash
    cut off.
    """
    mode = "ro&immutable=1" if as_it_lies else "rw" if read_only else "rwc"
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_WAIT_SECONDS)
    db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    db.execute("PRAGMA trusted_schema = OFF")
    if as_it_lies:
        db.execute("PRAGMA cell_size_check = ON")
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_BODY)
    return db


def _prepare(db: sqlite3.Connection, path: Path, read_only: bool) -> None:
    """Make the table in an empty file; refuse a file that is something else. DELETE mode leaves a single file
    when closed, EXTRA also syncs the directory: an entry that was appended outlives a power cut.
    """
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    mark = db.execute("PRAGMA application_id").fetchone()[0]
    if names and ("entries" not in names or mark != APPLICATION_ID):
        raise _not_a_ledger(path, f"an SQLite file with {', '.join(sorted(names))}")
    layout = db.execute("PRAGMA user_version").fetchone()[0]
    if names and layout == 1 and not read_only:
        _bring_up_to_date(db)
        layout = FORMAT
    if names and layout != FORMAT:
        raise _not_a_ledger(
            path, f"a ledger of layout {layout}, this version of limbeck reads layout {FORMAT}{_AGAIN * (layout == 1)}"
        )
    if read_only:
        if not names:
            raise _not_a_ledger(path, "an empty file")
        db.execute("PRAGMA query_only = ON")
        return
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA synchronous = EXTRA")
    if not names:
        db.execute("BEGIN IMMEDIATE")
        if not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            for statement in (
                *SCHEMA.values(),
                f"PRAGMA application_id = {APPLICATION_ID}",
                f"PRAGMA user_version = {FORMAT}",
            ):
                db.execute(statement)
        db.execute("COMMIT")


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    """Layout 1 to 2: give every entry its leaf."""
    db.execute("BEGIN IMMEDIATE")
    if db.execute("PRAGMA user_version").fetchone()[0] == 1:
        for statement in (*TREE.values(), f"PRAGMA user_version = {FORMAT}"):
            db.execute(statement)
        bodies = db.execute("SELECT body FROM entries ORDER BY idx").fetchall()
        StoredTree(db).append([entry_hash(str(body).encode("utf-8", "surrogateescape")) for (body,) in bodies])
    db.execute("COMMIT")


def _says_not_a_database(error: sqlite3.DatabaseError) -> bool:
    return error.sqlite_errorcode & 0xFF in {
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_CANTOPEN,
    }


def _not_a_ledger(path: Path, found: str) -> RunDirError:
    return RunDirError(
        "not a ledger",
        [
            Problem(
                str(path),
                found,
                "a ledger that `limbeck run ... --out` made",
                "check the path, or use another --out",
            ),
        ],
    )
