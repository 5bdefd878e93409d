"""The tables of ledger.db, and how an older layout is brought up to date."""

from __future__ import annotations

APPLICATION_ID = 0x4C4D424B
"""Marks the SQLite file as a ledger (`LMBK`), see SQLite's `PRAGMA application_id`."""

FORMAT = 2
"""SQLite's `user_version`. Layout 1 had no tree."""

_KEPT = (
    "CREATE TRIGGER {name} BEFORE {what} ON {table} "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: no {word}'); END"
)


def _kept(table: str) -> dict[str, str]:
    return {
        f"{table}_unchanged": _KEPT.format(name=f"{table}_unchanged", what="UPDATE", table=table, word="update"),
        f"{table}_kept": _KEPT.format(name=f"{table}_kept", what="DELETE", table=table, word="delete"),
    }


FIRST = {
    "entries": "CREATE TABLE entries (idx INTEGER PRIMARY KEY, digest TEXT NOT NULL, body TEXT NOT NULL)",
    "entries_in_order": (
        "CREATE TRIGGER entries_in_order BEFORE INSERT ON entries "
        "WHEN NEW.idx IS NOT (SELECT COUNT(*) FROM entries) "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: wrong index'); END"
    ),
    **_kept("entries"),
}
"""Layout 1."""

TREE = {
    "hashes": "CREATE TABLE hashes (first INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "subtrees": (
        "CREATE TABLE subtrees (level INTEGER NOT NULL, place INTEGER NOT NULL, hash BLOB NOT NULL, "
        "PRIMARY KEY (level, place)) WITHOUT ROWID"
    ),
    **_kept("hashes"),
    **_kept("subtrees"),
}
"""What layout 2 adds."""

SCHEMA = {**FIRST, **TREE}
"""Everything a ledger's database holds, by name; verification compares the text."""
