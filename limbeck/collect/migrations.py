"""The tables of a journal, version by version."""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE answers (key TEXT PRIMARY KEY NOT NULL, request BLOB NOT NULL, raw BLOB NOT NULL, "
        "response TEXT NOT NULL, created TEXT NOT NULL)",
        "CREATE TABLE refused (key TEXT NOT NULL, raw BLOB NOT NULL, response TEXT NOT NULL, created TEXT NOT NULL)",
    ),
    (
        "CREATE TABLE sent (number INTEGER PRIMARY KEY NOT NULL, key TEXT NOT NULL, account TEXT NOT NULL, "
        "held INTEGER NOT NULL, cost INTEGER, outcome TEXT, started TEXT NOT NULL, ended TEXT)",
        "CREATE INDEX sent_open ON sent (number) WHERE outcome IS NULL",
    ),
    (
        "CREATE TABLE batches (number INTEGER PRIMARY KEY NOT NULL, token TEXT NOT NULL UNIQUE, "
        "asked_of TEXT NOT NULL, rows INTEGER NOT NULL, intended TEXT NOT NULL, asked TEXT, name TEXT, ended TEXT, "
        "outcome TEXT)",
        "CREATE TABLE batch_rows (number INTEGER PRIMARY KEY NOT NULL, batch INTEGER NOT NULL, key TEXT NOT NULL, "
        "request BLOB NOT NULL)",
        "CREATE INDEX batch_rows_batch ON batch_rows (batch)",
        "CREATE INDEX batch_rows_key ON batch_rows (key)",
    ),
)
"""Statements that lead from version n to n + 1. `request` and `raw` are zlib streams in rows of version 1 and zstd
frames in later ones; the first bytes tell. Times are ISO 8601 in UTC, money whole picodollars.
"""
