"""What the journal knows of batches: written before anything is uploaded, so that a killed run finds them again.

A batch goes through these moments, each on the disk before the next step is taken:

    intended    its rows are chosen, and the worst they can cost is set aside
    asked       the one request that makes the provider begin is about to leave
    name        the provider's id of it is known
    ended       every row has its outcome

Killed before it was asked, it costs nothing and is dropped. Killed between asked and name, it is looked for among the
provider's batches. After that it is polled by its name. A row is a request in `sent` like any other; until it has an
outcome its body lies in `batch_rows`, so that whoever comes next can read its answer without knowing the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple

from limbeck.collect.journal import Ended, Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.records import Digest

_LOOKUP = 500
_CHUNK = 1000
NOT_SENT = "not sent"


class Planned(NamedTuple):
    """A request that is to go into a batch."""

    request: Request
    held: int
    """Picodollars set aside for it."""


class Row(NamedTuple):
    """A request that is in a batch."""

    key: Digest
    account: Digest
    held: int


class Logged(NamedTuple):
    """A batch that has not ended."""

    number: int
    """Unique in a journal."""
    token: str
    """What names it to us: in the metadata, the file's name, and every row's custom id."""
    rows: int
    intended: datetime
    asked: datetime | None
    """When it was asked for, UTC; None where it never was."""
    name: str | None
    """The provider's id; None where it is not known."""


def custom_id(token: str, number: int) -> str:
    """How a row is named to the provider: 64 letters, digits and hyphens at most, which all of them allow."""
    return f"{token}-{number}"


def row_number(token: str, said: str) -> int | None:
    """The row's number in the journal; None for a row of some other batch."""
    head, _, number = said.rpartition("-")
    return int(number) if head == token and number.isdecimal() else None


class BatchLog(Journal):
    """A journal, with what it knows of batches."""

    @contextmanager
    def intending(self, token: str, asked_of: str, account: Digest) -> Iterator[Intent]:
        """Plan a batch: it is on the disk, with all its rows, when the context is left, or not at all."""
        first = self.next_number
        with self._telling(), self._transaction():
            now = _now()
            made = self._db.execute(
                "INSERT INTO batches (token, asked_of, rows, intended) VALUES (?, ?, 0, ?)", (token, asked_of, now)
            )
            intent = Intent(self, made.lastrowid or 0, first, account, now)
            yield intent
            intent.flush()
            self._db.execute("UPDATE batches SET rows = ? WHERE number = ?", (intent.rows, intent.batch))

    def write_rows(self, batch: int, rows: Sequence[tuple[int, Planned]], account: Digest, now: str) -> None:
        """Part of `intending`."""
        packed = self._pack_all([planned.request.body for _, planned in rows])
        self._db.executemany(
            "INSERT INTO sent (number, key, account, held, started) VALUES (?, ?, ?, ?, ?)",
            [(number, planned.request.key, account, planned.held, now) for number, planned in rows],
        )
        self._db.executemany(
            "INSERT INTO batch_rows (number, batch, key, request) VALUES (?, ?, ?, ?)",
            [(number, batch, planned.request.key, body) for (number, planned), body in zip(rows, packed, strict=True)],
        )

    def asking(self, batch: int) -> datetime:
        """Note that the request which begins it is about to leave; when it returns, that is safe."""
        now = datetime.now(UTC)
        self._set("UPDATE batches SET asked = ? WHERE number = ?", now.isoformat(), batch)
        return now

    def not_asked(self, batch: int) -> None:
        """Note that it is certain now that the provider did not begin it."""
        with self._telling(), self._transaction():
            self._db.execute("UPDATE batches SET asked = NULL WHERE number = ?", (batch,))

    def was_asked(self, batch: int) -> bool:
        """Whether the provider may have begun it."""
        with self._telling():
            found = self._db.execute("SELECT asked IS NOT NULL FROM batches WHERE number = ?", (batch,)).fetchone()
        return bool(found and found[0])

    def named(self, batch: int, name: str) -> None:
        """Note the provider's id of it."""
        self._set("UPDATE batches SET name = ? WHERE number = ?", name, batch)

    def ended(self, batch: int, outcome: str, rows: Iterable[Ended] = ()) -> None:
        """It is over, with an outcome for every row that has none yet; all of it in one transaction."""
        with self._telling(), self._transaction():
            now, left = _now(), iter(rows)
            while chunk := list(islice(left, _CHUNK)):
                self._db.executemany(
                    "UPDATE sent SET outcome = ?, cost = ?, ended = ? WHERE number = ? AND outcome IS NULL",
                    [(row.outcome, row.cost, now, row.number) for row in chunk],
                )
            self._db.execute("DELETE FROM batch_rows WHERE batch = ?", (batch,))
            self._db.execute("UPDATE batches SET ended = ?, outcome = ? WHERE number = ?", (now, outcome, batch))

    def unsent(self, batch: int) -> int:
        """Drop a batch that the provider never began: its rows cost nothing. Returns what was held for them."""
        rows = self.open_rows(batch)
        self.ended(batch, NOT_SENT, [Ended(number, NOT_SENT, 0) for number in rows])
        return sum(row.held for row in rows.values())

    def open_batches(self, asked_of: str) -> list[Logged]:
        """Batches asked of this model at this address that have not ended, the oldest first."""
        with self._telling():
            found = self._db.execute(
                "SELECT number, token, rows, intended, asked, name FROM batches WHERE asked_of = ? AND ended IS NULL "
                "ORDER BY number",
                (asked_of,),
            ).fetchall()
        return [
            Logged(number, token, rows, datetime.fromisoformat(intended), _at(asked), name)
            for number, token, rows, intended, asked, name in found
        ]

    def open_rows(self, batch: int) -> dict[int, Row]:
        """Rows without an outcome, by number."""
        with self._telling():
            found = self._db.execute(
                "SELECT sent.number, sent.key, sent.account, sent.held FROM batch_rows JOIN sent USING (number) "
                "WHERE batch_rows.batch = ? AND sent.outcome IS NULL",
                (batch,),
            )
            return {number: Row(*rest) for number, *rest in found}

    def requests(self, rows: Sequence[tuple[int, Digest]]) -> list[Request]:
        """What was asked in these open rows, by number and key."""
        bodies: dict[int, bytes] = {}
        for start in range(0, len(rows), _LOOKUP):
            numbers = [number for number, _ in rows[start : start + _LOOKUP]]
            marks = ", ".join("?" * len(numbers))
            with self._telling():
                bodies |= self._db.execute(
                    f"SELECT number, request FROM batch_rows WHERE number IN ({marks})", numbers
                ).fetchall()
        return [Request(key, self._unpack(key, bodies[number])) for number, key in rows]

    def under_way(self, keys: Sequence[Digest]) -> set[Digest]:
        """Those of the keys that are in a batch which has not ended."""
        found: set[Digest] = set()
        for start in range(0, len(keys), _LOOKUP):
            chunk = keys[start : start + _LOOKUP]
            marks = ", ".join("?" * len(chunk))
            with self._telling():
                rows = self._db.execute(f"SELECT key FROM batch_rows WHERE key IN ({marks})", chunk).fetchall()
            found.update(key for (key,) in rows)
        return found

    def held_in_batches(self, account: Digest) -> int:
        """Picodollars set aside for an account's rows in batches that have not ended."""
        with self._telling():
            return self._db.execute(
                "SELECT coalesce(sum(sent.held), 0) FROM batch_rows JOIN sent USING (number) "
                "WHERE sent.outcome IS NULL AND sent.account = ?",
                (account,),
            ).fetchone()[0]

    def names(self) -> set[str]:
        """The provider's ids of all batches of this journal."""
        with self._telling():
            return {name for (name,) in self._db.execute("SELECT name FROM batches WHERE name IS NOT NULL")}

    def keep(self, answers: Sequence[Answer], ended: Sequence[Ended]) -> None:
        """Write down what some rows came to, in one transaction."""
        self.put_traffic([], answers, ended)

    def _set(self, statement: str, value: str, batch: int) -> None:
        with self._telling(), self._transaction():
            self._db.execute(statement, (value, batch))


class Intent:
    """A batch that is being planned."""

    def __init__(self, log: BatchLog, batch: int, first: int, account: Digest, now: str):
        self.batch = batch
        self.rows = 0
        self.next = first
        """The next row's number."""
        self._log, self._account, self._now = log, account, now
        self._waiting: list[tuple[int, Planned]] = []

    def add(self, planned: Planned) -> None:
        """One more row."""
        self._waiting.append((self.next, planned))
        self.next, self.rows = self.next + 1, self.rows + 1
        if len(self._waiting) == _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Hand rows on to the disk."""
        self._log.write_rows(self.batch, self._waiting, self._account, self._now)
        self._waiting = []


def _at(time: str | None) -> datetime | None:
    return datetime.fromisoformat(time) if time else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
