"""Faults of the files of a RUN directory, and of the database as a file."""

from __future__ import annotations

import os

from faults.kit import Fault, flip, junk, linked, named

FILES = (
    *("prompts.parquet", "completions.parquet", "verdicts.parquet", "leaves.parquet", "rollouts.parquet"),
    *("training.json", "scores.json", "answers.json", "report.html"),
)
INNER = (
    *("examples/examples.parquet", "examples/manifest.json", "signals/config.json", "signals/deep/weights.bin"),
    *("beginning/config.json", "beginning/deep/weights.bin", "student/config.json", "student/deep/weights.bin"),
)
"""Files of directories: the first verifier names the directory, the second also the file."""

FAULTS = [
    *(Fault(f"a bit flipped in {name}", flip(name), name) for name in (*FILES, "student/README.md")),
    *(Fault(f"a bit flipped in {name}", flip(name), name, name.split("/")[0]) for name in INNER),
    Fault(
        "an answer in the journal replaced",
        lambda case: case.journal("UPDATE answers SET raw = X'00'"),
        "",
        "journal",
        unseen="docs/ledger-format.md has no page on the journal, and no entry holds its digest",
    ),
    Fault(
        "junk where the journal's write-ahead log lies",
        junk("journal.db-wal"),
        "",
        "journal.db-wal",
        unseen="the second reads no journal, nor what lies beside it",
    ),
    Fault(
        "a rollback journal beside the journal",
        junk("journal.db-journal"),
        "",
        "journal.db-journal",
        unseen="the second reads no journal, nor what lies beside it",
    ),
    Fault("a character changed in the recipe", flip("recipe.yaml", 8, 1), "recipe.yaml"),
    Fault(
        "a number changed in the recipe",
        lambda case: (case.run / "recipe.yaml").write_text(
            (case.run / "recipe.yaml").read_text().replace("epochs: 2.0", "epochs: 3.0")
        ),
        "recipe.yaml",
    ),
    Fault("no recipe", lambda case: (case.run / "recipe.yaml").unlink(), "recipe.yaml"),
    Fault("weights replaced", lambda c: (c.run / "student/deep/weights.bin").write_bytes(b"x"), "student", "student"),
    Fault("weights renamed", lambda c: os.rename(c.run / "student/deep", c.run / "student/d"), "student", "student"),
    Fault("a file too many", lambda c: (c.run / "student/more.bin").write_bytes(b"x"), "student/more.bin", "student"),
    Fault("a file too few", lambda c: (c.run / "scores.json").unlink(), "scores.json"),
    Fault(
        "a directory for a file",
        lambda c: ((c.run / "scores.json").unlink(), (c.run / "scores.json").mkdir()),
        "scores.json",
    ),
    Fault("a file that is a link", linked("report.html"), "report.html"),
    Fault("a directory that is a link", linked("signals"), "signals"),
    Fault("a link in a directory", linked("signals/config.json"), "signals"),
    Fault(
        "a pipe for a file",
        lambda c: ((c.run / "report.html").unlink(), os.mkfifo(c.run / "report.html")),
        "report.html",
    ),
    Fault("a path out of RUN", named("../outside.html"), "../outside.html"),
    Fault("a path out of RUN and in again", named("../run/report.html"), "../run/report.html"),
    Fault("an absolute path", named("OUTSIDE/outside.html"), "outside.html"),
    # the database
    Fault("no database", lambda c: (c.run / "ledger.db").unlink(), "ledger.db"),
    Fault("no SQLite file", lambda c: (c.run / "ledger.db").write_bytes(b"x" * 4096), "ledger.db"),
    Fault("a database that is a link", linked("ledger.db"), "ledger.db"),
    Fault("a write that was cut off", junk("ledger.db-journal"), "ledger.db-journal"),
    Fault("junk where a write-ahead log would lie", junk("ledger.db-wal"), "ledger.db-wal"),
    Fault(
        "a directory where a write-ahead log would lie",
        lambda c: (c.run / "ledger.db-wal").mkdir(),
        "ledger.db-wal",
    ),
    Fault("a database cut off", lambda c: os.truncate(c.run / "ledger.db", 8192), "ledger.db"),
    Fault(
        "another version of the database", lambda c: c.raw_sql("PRAGMA user_version = 3"), "user_version", "ledger.db"
    ),
    Fault(
        "another application's database",
        lambda c: c.raw_sql("PRAGMA application_id = 1"),
        "application_id",
        "ledger.db",
    ),
    Fault(
        "another trigger",
        lambda c: c.raw_sql("CREATE TRIGGER more AFTER INSERT ON entries BEGIN DELETE FROM entries; END"),
        "more",
        "more",
    ),
    Fault("a trigger missing", lambda c: c.raw_sql("DROP TRIGGER entries_kept"), "entries_kept", "entries_kept"),
    Fault(
        "a view for a table",
        lambda c: c.raw_sql("ALTER TABLE entries RENAME TO hidden", "CREATE VIEW entries AS SELECT * FROM hidden"),
        "ledger.db",
        "ledger.db",
    ),
    Fault(
        "a view too many",
        lambda c: c.raw_sql(
            "CREATE VIEW more AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT * FROM n"
        ),
        "more",
        "more",
    ),
    Fault("a table too many", lambda c: c.raw_sql("CREATE TABLE more (a)"), "more", "more"),
    Fault(
        "a table with another column",
        lambda c: c.raw_sql("ALTER TABLE subtrees ADD COLUMN more AS (zeroblob(1000000000))"),
        "subtrees",
        "subtrees",
    ),
]
