"""Hostile evidence: both verifiers refuse it with a reason, touch no file, and need little memory for it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import zstandard
from command import ROOT, python
from verifier import SCRIPT, second

from limbeck.ledger import verify
from limbeck.ledger.columns import batches
from limbeck.records import Completion, Prompt
from limbeck.tables import schema

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
TABLES = ("prompts.parquet", "completions.parquet", "verdicts.parquet", "leaves.parquet", "examples/examples.parquet")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return runs.make_run(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture
def run(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


def state(run: Path) -> list[tuple]:
    """Names, bytes and times of everything in RUN."""
    found = []
    for path in sorted([run, *run.rglob("*")]):
        told = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() and told.st_size < 1 << 20 else b""
        found.append((str(path), told.st_mode, told.st_size, told.st_mtime_ns, data))
    return found


def sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


FIRST = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (5 << 29, 5 << 29))
from limbeck.ledger import verify
result = verify(sys.argv[1])
result.to_json()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]
print(int(not result.ok), int(peak) // 1024)
print(result.differences)
"""


def refused_by_the_first(run: Path) -> str:
    """What it says, in a process that has 2.5 GiB of addresses and must not hold half a GiB."""
    before = state(run)
    done = python(FIRST, run, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    code, peak = map(int, done.stdout.split("\n")[0].split())
    assert code == 1, done.stdout
    assert peak < 512, f"{peak} MiB"
    assert state(run) == before
    return done.stdout


def refused_by_the_second(run: Path, code: int) -> str:
    before = state(run)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29)); "
    start = f"sys.argv = ['x', {str(run)!r}]; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", limit + start]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert state(run) == before
    return done.stdout + done.stderr


# Databases


DATABASES = {
    "an endless view for a table": (
        ["ALTER TABLE entries RENAME TO x", f"CREATE VIEW entries AS {ENDLESS} SELECT i idx, i digest, i body FROM n"],
        "entries",
    ),
    "an endless view for the tree": (
        ["ALTER TABLE hashes RENAME TO hidden", f"CREATE VIEW hashes AS {ENDLESS} SELECT i first, i data FROM n"],
        "hashes",
    ),
    "a trigger": (["CREATE TRIGGER more AFTER INSERT ON entries BEGIN DELETE FROM entries; END"], "more"),
    "a virtual table": (["CREATE VIRTUAL TABLE more USING fts5(a)"], "more"),
    "a generated column of a gigabyte": (["ALTER TABLE entries ADD COLUMN more AS (zeroblob(999999999))"], "entries"),
    "a check that computes": (
        ["DROP TABLE subtrees", "CREATE TABLE subtrees (level INTEGER CHECK (randomblob(999999999) > x'00'))"],
        "subtrees",
    ),
    "an index over an expression": (["CREATE INDEX more ON entries (hex(body))"], "more"),
    "WAL mode": (["PRAGMA journal_mode = WAL"], "journal mode"),
    "UTF-16": (None, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATABASES)
def test_a_database_that_is_no_ledger_is_not_asked_anything(name, run):
    statements, word = DATABASES[name]
    if statements is None:
        data = bytearray((run / "ledger.db").read_bytes())
        data[56:60] = b"\0\0\0\2"
        (run / "ledger.db").write_bytes(data)
    else:
        sql(run / "ledger.db", *statements)
    assert word in refused_by_the_first(run)
    assert "cannot be read" in refused_by_the_second(run, 2)


@pytest.mark.parametrize("end", ["-journal", "-wal"])
def test_a_write_that_was_cut_off_is_not_undone_by_a_verifier(end, run):
    with closing(sqlite3.connect(run / "ledger.db", isolation_level=None)) as db:
        db.execute("PRAGMA cache_size = 1")
        for name in ("entries_in_order", "entries_kept", "entries_unchanged"):
            db.execute(f"DROP TRIGGER {name}")
        db.execute("BEGIN IMMEDIATE")
        for at in range(200):
            db.execute("INSERT INTO entries VALUES (?, 'x', printf('%.*c', 4000, 'x'))", (1000 + at,))
        half = (run / "ledger.db-journal").read_bytes()
        db.execute("ROLLBACK")
    (run / f"ledger.db{end}").write_bytes(half)
    assert "cut off or is under way" in refused_by_the_first(run)
    if end == "-journal":
        assert "cut off or is under way" in refused_by_the_second(run, 2)


def test_the_same_page_reached_twice_does_not_go_on_for_ever(run):
    """Every cell of an interior page leads to one leaf page: rows without an end to who believes it."""
    runs.forge(
        run / "ledger.db", *[("INSERT INTO hashes VALUES (?, zeroblob(8192))", (256 * at,)) for at in range(1, 99)]
    )
    with closing(sqlite3.connect(run / "ledger.db")) as db:
        page_size = db.execute("PRAGMA page_size").fetchone()[0]
        root = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'hashes'").fetchone()[0]
    data = bytearray((run / "ledger.db").read_bytes())
    page = (root - 1) * page_size
    assert data[page] == 5, "an interior page of a table"
    cells = struct.unpack(">H", data[page + 3 : page + 5])[0]
    places = [struct.unpack(">H", data[page + 12 + 2 * at : page + 14 + 2 * at])[0] for at in range(cells)]
    child = data[page + places[0] : page + places[0] + 4]
    for place in places:
        data[page + place : page + place + 4] = child
    (run / "ledger.db").write_bytes(data)
    assert "ledger.db" in refused_by_the_first(run)
    assert "ledger.db" in refused_by_the_second(run, 1)


# The journal


def test_a_journal_that_was_not_closed_is_read_and_not_touched(good, tmp_path):
    """What a kill leaves: answers in the write-ahead log alone."""
    run = shutil.copytree(good, tmp_path / "run")
    with closing(sqlite3.connect(run / "journal.db", isolation_level=None)) as db:
        db.execute("PRAGMA wal_autocheckpoint = 0")
        raw = db.execute("SELECT raw FROM answers WHERE rowid = 1").fetchone()[0]
        db.execute("UPDATE answers SET raw = x'00' WHERE rowid = 1")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("UPDATE answers SET raw = ? WHERE rowid = 1", (raw,))
        copy = shutil.copytree(run, tmp_path / "killed")
    (copy / "journal.db-shm").unlink()
    before = state(copy)
    assert verify(copy).ok
    assert state(copy) == before
    (copy / "journal.db-wal").unlink()
    assert not verify(copy).ok


JOURNALS = {
    "an endless view": [
        "ALTER TABLE answers RENAME TO hidden",
        f"CREATE VIEW answers AS {ENDLESS} SELECT i AS key, i AS request, i AS raw, i AS created FROM n",
    ],
    "a virtual table": ["CREATE VIRTUAL TABLE more USING fts5(a)"],
    "a trigger": ["CREATE TRIGGER more AFTER INSERT ON answers BEGIN DELETE FROM answers; END"],
    "no answers": ["DROP TABLE answers"],
    "an answer of 100 MB": ["UPDATE answers SET raw = zeroblob(100000000)"],
    "a number for an answer": ["UPDATE answers SET raw = 5"],
}


@pytest.mark.parametrize("name", JOURNALS)
def test_a_strange_journal_is_refused(name, run):
    sql(run / "journal.db", "PRAGMA journal_mode = DELETE", *JOURNALS[name])
    assert "journal.db" in refused_by_the_first(run)


def test_answers_that_unpack_to_gigabytes_are_not_unpacked(run):
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes((1 << 26) + 1))
    claim = b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", 1 << 31) + b"\x01\x00\x00"
    with closing(sqlite3.connect(run / "journal.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("UPDATE answers SET raw = ? WHERE rowid = 1", (bomb,))
        db.execute("UPDATE answers SET request = ? WHERE rowid = 2", (claim,))
    told = refused_by_the_first(run)
    assert told.count("longer than any answer") == 2


# Parquet


def write_table(path: Path, values: dict, kinds: pa.Schema, **options) -> None:
    pq.write_table(pa.table(values, schema=kinds), path, **options)


def test_a_value_that_a_whole_table_shares_is_not_written_out(run):
    """Ten megabytes, once in a dictionary, in 4,000 rows."""
    rows, path = 4000, run / "completions.parquet"
    one = next(iter(pq.read_table(path).slice(0, 1).to_pylist()))
    values = {name: [value] * rows for name, value in one.items()}
    values["text"] = ["x" * 10_000_000] * rows
    text = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 10_000_000]))
    kinds = schema(Completion)
    table = pa.table(
        [text if name == "text" else pa.array(values[name], kinds.field(name).type) for name in kinds.names],
        names=kinds.names,
    )
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 1_000_000
    told = refused_by_the_first(run)
    assert "in a few rows of text, more than are read" in told


def test_prompts_that_no_example_names_are_not_all_held(run):
    """What 20,000 of them were made from is one value of 40,000 characters, once in a dictionary."""
    rows, path = 20_000, run / "prompts.parquet"
    one, kinds = pq.read_table(path).slice(0, 1).to_pylist()[0], schema(Prompt)
    columns = {name: pa.array([value] * rows, kinds.field(name).type) for name, value in one.items()}
    columns["id"] = pa.array([f"sha256:{row:064x}" for row in range(rows)])
    columns["parents"] = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["[" * 40_000]))
    pq.write_table(pa.table(columns), path, compression="zstd")
    assert path.stat().st_size < 2_000_000
    assert "more of them than are held" in refused_by_the_first(run)


def test_a_run_length_of_a_billion_tokens_is_not_written_out(run):
    """A list of one row, whose one token is said 70 million times: a few kilobytes."""
    path = run / "examples" / "examples.parquet"
    one = pq.read_table(path).slice(0, 1)
    count = 70_000_000
    mask = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, bool)))
    pq.write_table(one.set_column(one.schema.get_field_index("mask"), "mask", mask), path, compression="zstd")
    assert path.stat().st_size < 1_000_000
    assert "more than are read" in refused_by_the_first(run)


def test_pages_that_unpack_to_gigabytes_are_not_unpacked(run):
    path = run / "leaves.parquet"
    one = pq.read_table(path).slice(0, 1)
    huge = pa.array(["x" * ((1 << 27) + 1)])
    pq.write_table(one.set_column(0, "fields", huge), path, compression="zstd", use_dictionary=False)
    assert "more than are read" in refused_by_the_first(run)


@pytest.mark.parametrize("name", TABLES)
def test_strings_that_share_their_beginnings_are_not_read(name, run):
    path = run / name
    table = pq.read_table(path)
    column = "id" if "id" in table.column_names else "completion" if "completion" in table.column_names else "fields"
    column = column if column in table.column_names else "text"
    pq.write_table(table, path, use_dictionary=False, column_encoding={column: "DELTA_BYTE_ARRAY"})
    assert any("which no table of a run has" in p.found for p in verify(run).differences)


@pytest.mark.parametrize("name", TABLES)
def test_a_footer_that_claims_2_to_the_60_rows_is_refused(name, run):
    """Thrift's compact form of a number of rows, put in the place of every one in the footer that it fits."""
    path = run / name
    data = bytearray(path.read_bytes())
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = bytes(data[-8 - length : -8])
    rows = pq.read_metadata(path).num_rows
    claimed = b"\x16" + bytes([0x80 | 0x00]) + b"\x80" * 7 + b"\x20"
    at = footer.index(b"\x16" + bytes([2 * rows]))
    changed = footer[:at] + claimed + footer[at + 2 :]
    path.write_bytes(bytes(data[: -8 - length]) + changed + struct.pack("<I", len(changed)) + b"PAR1")
    assert name.split("/")[0] in refused_by_the_first(run)


def test_tables_of_any_page_and_row_group_size_are_read_alike(tmp_path):
    rows = 3000
    values = {"id": [f"{at % 700} é" * (at % 5) for at in range(rows)], "writer": [None, "w" * 500, "x"] * 1000}
    for number, options in enumerate(
        ({}, {"data_page_size": 100}, {"row_group_size": 7}, {"use_dictionary": False}, {"data_page_version": "2.0"},
         {"dictionary_pagesize_limit": 1 << 22, "compression": "gzip"}, {"compression": "none", "version": "1.0"})
    ):  # fmt: skip
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table(values), path, **options)
        found = [batch.to_pydict() for batch in batches(path, ("id", "writer"), 999)]
        assert {name: [cell for part in found for cell in part[name]] for name in values} == values


# Paths and small files


@pytest.mark.parametrize("name", ["./report.html", "student//config.json", "student/.", "a\\b", "student/"])
def test_a_path_in_another_form_is_refused_by_both(name, run, capsys):
    from faults import forger
    from test_second_verifier import signing_key

    def edit(bodies: list[dict], _: object) -> None:
        told = next(body for body in bodies if "report.html" in body["outputs"])
        told["outputs"] = {name: told["outputs"]["report.html"]}

    forger.rewrite(run, edit, key=signing_key())
    assert any("not read" in p.found for p in verify(run).differences)
    assert second.main([str(run)]) == 1
    assert "a path inside of RUN" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["scores.json", "examples/manifest.json", "recipe.yaml"])
def test_files_that_are_held_whole_are_not_of_any_size(name, run):
    with open(run / name, "wb") as file:
        os.truncate(file.fileno(), 1 << 28)
    assert "more than" in refused_by_the_first(run)


@pytest.mark.parametrize(
    "value", [[], None, {"counts": []}, {"counts": {"train": 3}}, {"counts": {"x": {"examples": 1}}}, 5]
)
def test_a_manifest_of_another_shape_is_a_difference(value, run):
    (run / "examples" / "manifest.json").write_text(json.dumps(value))
    assert any(p.where.startswith("examples") for p in verify(run).differences)


JSON = {
    "prompts.parquet": ("messages", "tools", "json_schema", "parents"),
    "completions.parquet": ("messages", "tools", "tool_calls", "json_schema"),
    "leaves.parquet": ("fields", "share"),
}
"""Columns that hold JSON text."""


@pytest.mark.parametrize(("name", "column"), [(name, column) for name, columns in JSON.items() for column in columns])
def test_json_that_is_nested_without_end_is_a_difference(name, column, run):
    table = pq.read_table(run / name)
    place = table.schema.get_field_index(column)
    values = pa.array(["[" * 100_000, *table[column].to_pylist()[1:]], pa.string())
    pq.write_table(table.set_column(place, column, values), run / name)
    assert {one.where.partition(":")[0] for one in verify(run).differences} >= {name}


@pytest.mark.parametrize("column", ["fields", "share", "leaf"])
@pytest.mark.parametrize("what", ["null", "bytes"])
def test_leaves_of_other_types_are_a_difference(column, what, run):
    table = pq.read_table(run / "leaves.parquet")
    at, rows = table.column_names.index(column), table.num_rows
    cells = pa.nulls(rows, table.schema.field(column).type) if what == "null" else pa.array([b"123456789"] * rows)
    pq.write_table(table.set_column(at, column, cells), run / "leaves.parquet")
    found = [p for p in verify(run).differences if p.where == "leaves.parquet"]
    assert any(column in p.found for p in found)


def test_a_footer_that_ends_a_process_is_not_given_to_pyarrow(run):
    """Found by fuzzing: sizes of text for a column of bits. pyarrow 26 aborts when it is asked for that column."""
    shutil.copy(ROOT / "tests" / "data" / "footer-that-aborts.parquet", run / "leaves.parquet")
    ask = "import sys, pyarrow.parquet as pq; pq.ParquetFile(sys.argv[1]).metadata.row_group(0).column(1)"
    assert python(ask, run / "leaves.parquet").returncode != 0, "the trap is still one"
    assert "leaves.parquet" in refused_by_the_first(run)


# Fuzzing, a slice of it


def test_a_slice_of_the_fuzzing_ends_in_refusals_alone(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "fuzz_verifiers.py"), "--cases", "40", "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\n40 cases, 0 failed" in done.stdout
