"""Random changes of good evidence, for tools/fuzz_verifiers.py and a short slice of it in the tests."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import rfc8785
import runs
import zstandard
from command import call
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from verifier import second as second_verifier

from faults import forger
from faults.altered import some_bytes, some_json

TABLES = ("prompts", "completions", "verdicts", "leaves", "rollouts", "examples/examples")
FORMS = ("disclosure", "share", "spot-check", "consistency", "kept")


class Good(NamedTuple):
    """Evidence that both verifiers accept."""

    run: Path
    other: Path
    documents: dict[str, bytes]
    key: Ed25519PrivateKey

    @classmethod
    def make(cls, base: Path) -> Good:
        """A run, another of the same recipe, and every proof of the first."""
        for name in ("run", "other", "documents"):
            shutil.rmtree(base / name, ignore_errors=True)
        run, _ = (runs.make_run(base / name, change=runs.from_seeds, gated=True) for name in ("run", "other"))
        out = base / "documents"
        out.mkdir()
        signed = next(body for body in forger.read(run)[0] if "envelope" in body["facts"])
        (out / "kept").write_bytes(rfc8785.dumps(signed["facts"]["envelope"]))
        for words in (
            ("disclose", "--row", 3, "--field", "parents"),
            ("share",),
            ("spot-check", "--seed", "a beacon", "--draws", 20, "--raw"),
            ("consistency", "--checkpoint", out / "kept"),
        ):
            name = {"disclose": "disclosure"}.get(words[0], words[0])
            result = call("ledger", words[0], run, *words[1:], "--out", out / name)
            assert result.exit_code == 0, result.output
        return cls.read(base)

    @classmethod
    def read(cls, base: Path) -> Good:
        """What `make` left there."""
        from limbeck.ledger.signing import keys

        documents = {name: (base / "documents" / name).read_bytes() for name in FORMS}
        return cls(base / "run", base / "other", documents, keys.signing_key())


def first(place: Path) -> str:
    """What the first verifier came to: empty where nothing differs."""
    from limbeck.errors import LimbeckError
    from limbeck.ledger import verify

    if (place / "proof").exists():
        result = call("ledger", "check", place / "proof", *_share(place))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return "" if result.exit_code == 0 else f"exit {result.exit_code}"
    try:
        found = verify(place / "run")
    except LimbeckError as error:
        return f"{type(error).__name__}: {error.summary}"
    found.to_json()
    return "" if found.ok else f"{len(found.differences)} differences, {found.differences[0].where}"


def second(place: Path) -> str:
    """What the second came to."""
    if (place / "proof").exists():
        words = [str(word) for word in (place / "proof", *_share(place)) if word != "--share"]
    else:
        words = [str(place / "run")]
    code = second_verifier.main(words)
    assert code in (0, 1, 2)
    return f"exit {code}" if code else ""


def _share(place: Path) -> list[object]:
    return ["--share", place / "share"] if (place / "share").exists() else []


def change(good: Good, place: Path, random: Random) -> str:
    """Put changed evidence into an empty directory: `run`, or `proof` and maybe `share`. Returns what was done."""
    if random.random() < 0.25:
        return _proof(good, place, random)
    run = shutil.copytree(good.run, place / "run")
    done = random.choice(_CHANGES)
    return f"{done.__name__.lstrip('_')}: {done(good, run, random)}"


# Files


def _bytes_of_a_file(good: Good, run: Path, random: Random) -> str:
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    weights = [4 if path.suffix in (".db", ".parquet") else 1 for path in files]
    path = random.choices(files, weights)[0]
    data = path.read_bytes()
    path.write_bytes(data[: random.randrange(len(data) + 1)] if random.random() < 0.1 else some_bytes(data, random))
    return str(path.relative_to(run))


def _another_kind_of_file(good: Good, run: Path, random: Random) -> str:
    name = random.choice(sorted(p.relative_to(run).as_posix() for p in run.rglob("*")))
    path, kind = run / name, random.choice(("link", "pipe", "folder", "empty", "sparse", "other", "nothing", "loop"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "link":
        path.symlink_to(random.choice((good.run / name, run / "recipe.yaml", Path("/dev/zero"), Path("/etc/passwd"))))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        (path / "deep" / "deeper").mkdir(parents=True)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "sparse":
        path.write_bytes(b"")
        os.truncate(path, 1 << 28)
    elif kind == "other" and (good.other / name).is_file():
        shutil.copy(good.other / name, path)
    return f"{name}: {kind}"


def _side_files(good: Good, run: Path, random: Random) -> str:
    name = random.choice(("ledger.db", "journal.db")) + random.choice(("-journal", "-wal", "-shm"))
    data = random.choice((b"", b"x" * 100, random.randbytes(4096), (run / "ledger.db").read_bytes()))
    (run / name).write_bytes(data)
    return f"{name} of {len(data)} bytes"


# Databases


def _value(random: Random) -> Any:
    return random.choice(
        (
            None, 0, 1, -1, 2**53, 2**63 - 1, -(2**63), 1.5, float("inf"), "", "x", "sha256:" + "0" * 64, "[" * 5000,
            b"", b"\0" * 32, b"\xff" * 31, random.randbytes(64), zlib.compress(bytes(1 << 20)), b"x" * 100_000,
            zstandard.compress(bytes(1 << 24)), zstandard.compress(b"{}") + b"more", zstandard.compress(b"[" * 100_000),
            zstandard.ZstdCompressor(write_content_size=False).compress(b"{}"), zlib.compress(b"{}")[:-2],
        )
    )  # fmt: skip


def _rows_of_the_ledger(good: Good, run: Path, random: Random) -> str:
    table, column = random.choice(
        [("entries", "idx"), ("entries", "digest"), ("entries", "body"), ("hashes", "first"), ("hashes", "data")]
    )
    value, row = _value(random), random.randrange(14)
    statement = random.choice(
        (
            f"UPDATE OR IGNORE {table} SET {column} = ?1 WHERE rowid = ?2",
            f"DELETE FROM {table} WHERE rowid = ?2 OR ?1 IS 0",
            "INSERT OR IGNORE INTO subtrees VALUES (ifnull(?1, 1), ?2, zeroblob(32))",
            "INSERT OR IGNORE INTO hashes VALUES (?2 * 1000, ifnull(?1, 'x'))",
        )
    )
    with suppress(sqlite3.Error):
        runs.forge(run / "ledger.db", (statement, (value, row)))
    return f"{statement} {str(value)[:40]!r} {row}"


def _schema(good: Good, run: Path, random: Random) -> str:
    table = random.choice(("entries", "hashes", "subtrees", "answers"))
    name = "journal.db" if table == "answers" or random.random() < 0.3 else "ledger.db"
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    statements = random.choice(
        (
            [f"CREATE TRIGGER more AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END"],
            [f"CREATE VIEW more AS {endless} SELECT * FROM n"],
            [f"ALTER TABLE {table} RENAME TO hidden", f"CREATE VIEW {table} AS {endless} SELECT i AS idx, i AS first, "
             "i AS key, i AS data, i AS digest, i AS body, i AS request, i AS raw, i AS created FROM n"],
            [f"ALTER TABLE {table} ADD COLUMN more AS (zeroblob(100000000))"],
            ["CREATE VIRTUAL TABLE more USING fts5(a)"],
            [f"ALTER TABLE {table} RENAME TO hidden", f"CREATE VIRTUAL TABLE {table} USING fts5(idx, digest, body)"],
            [f"PRAGMA user_version = {random.randrange(9)}"],
            ["PRAGMA journal_mode = WAL"],
            ["PRAGMA encoding = 'UTF-16'", "VACUUM"],
            ["PRAGMA page_size = 512", "VACUUM"],
            ["PRAGMA auto_vacuum = 1", "VACUUM"],
            [f"CREATE INDEX more ON {table} (1)"],
        )
    )  # fmt: skip
    with suppress(sqlite3.Error), closing(sqlite3.connect(run / name, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    return f"{name}: {statements[0][:70]}"


def _answers(good: Good, run: Path, random: Random) -> str:
    column, value = random.choice(("key", "request", "raw", "response", "created")), _value(random)
    with suppress(sqlite3.Error), closing(sqlite3.connect(run / "journal.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute(f"UPDATE OR IGNORE answers SET {column} = ? WHERE rowid = ?", (value, random.randrange(1, 7)))
    return f"{column} {str(value)[:40]!r}"


# JSON


def _an_entry_signed_anew(good: Good, run: Path, random: Random) -> str:
    told = []

    def edit(bodies: list[dict], examples: dict) -> None:
        at = random.randrange(len(bodies))
        changed = some_json(bodies[at], random)
        told.append(at)
        if isinstance(changed, dict) and isinstance(changed.get("facts"), dict):
            bodies[at] = changed

    with suppress(KeyError, TypeError, ValueError, AttributeError, sqlite3.Error, rfc8785.CanonicalizationError):
        forger.rewrite(run, edit, key=good.key, resign=random.random() < 0.7)
    return f"entry {told}"


def _what_is_signed(good: Good, run: Path, random: Random) -> str:
    nth, index = random.randrange(3), 0

    def edit(bodies: list[dict], _: object) -> None:
        nonlocal index
        index = [at for at, body in enumerate(bodies) if "envelope" in body["facts"]][nth]
        statement = some_json(forger.statement_of(bodies[index]["facts"]["envelope"]), random)
        bodies[index] |= {"facts": {"envelope": forger.envelope(statement, good.key)}, "keep envelope": True}

    with suppress(rfc8785.CanonicalizationError):
        forger.rewrite(run, edit, key=good.key)
    return f"entry {index}"


def _bytes_of_an_entry(good: Good, run: Path, random: Random) -> str:
    index = random.randrange(14)

    def form(body: dict, data: bytes) -> bytes:
        if body["index"] != index:
            return data
        return some_bytes(data, random).decode("utf-8", "ignore").replace("\0", "").encode()

    forger.rewrite(run, lambda *_: None, key=good.key, form=form)
    return f"entry {index}"


def _json_file(good: Good, run: Path, random: Random) -> str:
    name = random.choice(("scores.json", "examples/manifest.json", "training.json", "answers.json"))
    value = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(some_json(value, random)))
    return name


def _recipe(good: Good, run: Path, random: Random) -> str:
    text = (run / "recipe.yaml").read_text()
    pieces = (
        "&a ",
        "*a",
        "- ",
        ": ",
        "[",
        "{",
        "!!python/object:os.system ",
        "|",
        "'",
        '"',
        "\t",
        "? ",
        "---\n",
        "...\n",
    )
    at = random.randrange(len(text))
    piece = random.choice((*pieces, "[" * 2000, "9" * 5000, "0x10", "1e999", ".nan", "2024-01-01", "\u2028"))
    (run / "recipe.yaml").write_text(text[:at] + piece + text[at + random.choice((0, 1, 5)) :])
    return repr(piece[:20])


# Parquet


def _a_table(good: Good, run: Path, random: Random) -> str:
    name = random.choice(TABLES)
    path = run / f"{name}.parquet"
    table = pq.read_table(path)
    kind = random.randrange(9)
    column = random.choice(table.column_names)
    at = table.column_names.index(column)
    with suppress(pa.ArrowException, IndexError, ValueError):
        if kind == 0:
            table = table.drop_columns([column])
        elif kind == 1:
            table = table.rename_columns([c if c != column else "other" for c in table.column_names])
        elif kind == 2:
            order = list(range(table.num_rows))
            random.shuffle(order)
            table = table.take(pa.array(order, pa.int64()))
        elif kind == 3:
            table = pa.concat_tables([table, table.slice(random.randrange(max(1, table.num_rows)), 1)])
        elif kind == 4:
            table = table.set_column(at, column, pa.nulls(table.num_rows, table.schema.field(column).type))
        elif kind == 5:
            table = table.set_column(at, column, pa.array([random.randbytes(9) for _ in range(table.num_rows)]))
        elif kind == 6:
            table = table.append_column("more", pa.array(range(table.num_rows)))
        else:
            cells = table.column(column).to_pylist()
            row = random.randrange(len(cells))
            cells[row] = some_json(cells[row], random) if isinstance(cells[row], str | int | list | bool) else None
            table = table.set_column(at, column, pa.array(cells, table.schema.field(column).type))
    pq.write_table(table, path, compression=random.choice(("zstd", "gzip", "snappy", "none")))
    return f"{name}.{column}: {kind}"


def _footer(good: Good, run: Path, random: Random) -> str:
    """The part of a Parquet file that says how many rows and bytes there are."""
    path = run / f"{random.choice(TABLES)}.parquet"
    data = bytearray(path.read_bytes())
    length = struct.unpack("<I", data[-8:-4])[0]
    start = len(data) - 8 - length
    for _ in range(random.choice((1, 2, 8))):
        data[start + random.randrange(length)] = random.choice((0, 0xFF, 0x7F, random.randrange(256)))
    if random.random() < 0.2:
        data[-8:-4] = struct.pack("<I", random.choice((0, 2**31 - 1, 2**32 - 1, length + 1)))
    path.write_bytes(data)
    return path.name


_CHANGES: tuple[Callable[[Good, Path, Random], str], ...] = (
    *(_bytes_of_a_file, _bytes_of_a_file, _another_kind_of_file, _side_files, _rows_of_the_ledger, _schema, _answers),
    *(_an_entry_signed_anew, _an_entry_signed_anew, _what_is_signed, _bytes_of_an_entry, _json_file, _recipe),
    *(_a_table, _a_table, _footer),
)


def _proof(good: Good, place: Path, random: Random) -> str:
    form = random.choice(FORMS[:4])
    if form == "spot-check" or random.random() < 0.1:
        (place / "share").write_bytes(good.documents["share"])
    data = good.documents[form]
    if random.random() < 0.4:
        (place / "proof").write_bytes(some_bytes(data, random))
        return f"bytes of a {form}"
    changed = some_json(json.loads(data), random)
    for name in ("checkpoint", "old", "new") if random.random() < 0.5 else ():
        with suppress(KeyError, TypeError, AttributeError):
            signature = forger.envelope(changed[name]["statement"], good.key)["signatures"][0]
            changed[name] = {"statement": changed[name]["statement"]} | signature
    (place / "proof").write_bytes(rfc8785.dumps(changed))
    return f"values of a {form}"
