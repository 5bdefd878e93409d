"""The journal: what was acknowledged is there, whole, once, as it was written."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.errors import InputError


def answer(number: int, raw: bytes = b"raw") -> Answer:
    return Answer(Request.of({"number": number}), raw)


@given(st.lists(st.binary(max_size=300), max_size=6))
@settings(max_examples=25, deadline=None)
def test_bytes_come_back_as_they_went_in(tmp_path_factory: pytest.TempPathFactory, raws: list[bytes]):
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    group = [answer(number, raw) for number, raw in enumerate(raws)]
    before = datetime.now(UTC)
    with Journal(path) as journal:
        assert journal.put_group(group) == len(group)
    with Journal(path) as journal:
        assert len(journal) == len(group)
        for request, raw in group:
            found = journal.get(request.key)
            assert (found.request, found.raw) == (request.body, raw)
            assert found.response == "sha256:" + hashlib.sha256(raw).hexdigest()
            assert found.key == "sha256:" + hashlib.sha256(found.request).hexdigest()
            assert before <= found.created <= datetime.now(UTC)
            assert found.created.utcoffset() == timedelta(0)


def test_a_key_covers_the_whole_request():
    assert Request.of({"a": 1, "b": 2}) == Request.of({"b": 2, "a": 1})
    bodies = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {"a": 1.5}]
    assert len({Request.of(body).key for body in bodies}) == len(bodies)


def test_a_second_answer_is_set_aside_and_counted(tmp_path: Path):
    with Journal(tmp_path / "journal.db") as journal:
        assert journal.put_group([answer(1, b"first"), answer(1, b"beside it")]) == 1
        assert journal.put_group([answer(1, b"second"), answer(2)]) == 1
        assert journal.get(answer(1).request.key).raw == b"first"
        assert (len(journal), journal.refused) == (2, 2)
    with Journal(tmp_path / "journal.db") as journal:
        assert journal.refused == 2


def test_missing_keeps_the_order(tmp_path: Path):
    keys = [answer(number).request.key for number in range(1300)]
    with Journal(tmp_path / "journal.db") as journal:
        journal.put_group([answer(number) for number in range(0, 1300, 2)])
        assert journal.missing(keys) == keys[1::2]
        assert journal.missing(reversed(keys)) == keys[1::2][::-1]
        assert journal.missing([]) == []
        with pytest.raises(KeyError):
            journal.get(keys[1])


def test_a_group_is_written_whole_or_not_at_all(tmp_path: Path):
    broken = Answer(answer(2).request, "no bytes")  # type: ignore[arg-type]
    with Journal(tmp_path / "journal.db") as journal:
        with pytest.raises(TypeError):
            journal.put_group([answer(1), broken])
        assert len(journal) == 0
        assert journal.put_group([answer(1)]) == 1


def test_every_commit_is_synced(tmp_path: Path):
    with Journal(tmp_path / "journal.db") as journal:
        assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


_WRITER = """
import sys
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request

with Journal(sys.argv[1]) as journal:
    first = int(sys.argv[2])
    print("ready", flush=True)
    for group in range(first, first + 10_000):
        members = [Request.of({"group": group, "member": member}) for member in range(7)]
        journal.put_group([Answer(request, request.body * 40) for request in members])
        print(group, flush=True)
"""


def test_what_was_acknowledged_outlives_kill_9(tmp_path: Path):
    path, moments = tmp_path / "journal.db", random.Random(7)
    acknowledged: list[int] = []
    starts = [10_000 * turn for turn in range(4)]
    for first in starts:
        command = [sys.executable, "-c", _WRITER, str(path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0.02, 0.2))
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    assert len(acknowledged) > len(starts)
    with Journal(path) as journal:
        for group in {*acknowledged, *(group + 1 for group in acknowledged), *starts}:
            members = [Request.of({"group": group, "member": member}) for member in range(7)]
            missing = journal.missing(request.key for request in members)
            assert len(missing) in (0, 7), f"group {group} is there in part"
            if group in acknowledged:
                assert not missing, f"group {group} was acknowledged"
                assert all(journal.get(r.key).raw == r.body * 40 for r in members)
        assert journal._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert journal.refused == 0


def test_what_is_no_journal_is_refused_and_left_alone(tmp_path: Path):
    text, other = tmp_path / "text.db", tmp_path / "other.db"
    text.write_bytes(b"These are not the bytes of a database." * 40)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE letters (a TEXT)")
    db.close()
    for path, found in ((text, "not an SQLite database"), (other, "letters"), (tmp_path, "cannot be opened")):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(InputError) as error:
            Journal(path)
        assert found in str(error.value)
        assert str(path) in str(error.value)
        assert error.value.problems[0].remedy
        assert before is None or path.read_bytes() == before


def test_a_newer_journal_is_refused(tmp_path: Path):
    path = tmp_path / "journal.db"
    Journal(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InputError, match="version 99"):
        Journal(path)


def test_migrations_run_in_order_and_keep_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from limbeck.collect import journal as module

    path = tmp_path / "journal.db"
    with Journal(path) as journal:
        journal.put_group([answer(1)])
    later = (("ALTER TABLE answers ADD COLUMN note TEXT",), ("UPDATE answers SET note = 'seen'",))
    monkeypatch.setattr(module, "_MIGRATIONS", (*module._MIGRATIONS, *later))
    for _ in range(2):
        with Journal(path) as journal:
            assert journal._pragma("user_version") == len(module._MIGRATIONS)
            assert journal._db.execute("SELECT note FROM answers").fetchall() == [("seen",)]
            assert journal.get(answer(1).request.key).raw == b"raw"


def test_damaged_bytes_are_noticed(tmp_path: Path):
    path, key = tmp_path / "journal.db", answer(1).request.key
    with Journal(path) as journal:
        journal.put_group([answer(1, b"something" * 50)])
    for column, value in (("raw", b"\x00\x01"), ("response", "sha256:" + "0" * 64), ("request", b"x")):
        copy = tmp_path / f"{column}.db"
        shutil.copy(path, copy)
        with sqlite3.connect(copy) as db:
            db.execute(f"UPDATE answers SET {column} = ?", (value,))
        db.close()
        with Journal(copy) as journal, pytest.raises(InputError) as error:
            journal.get(key)
        assert str(copy) in str(error.value)


def test_a_damaged_page_is_noticed(tmp_path: Path):
    path = tmp_path / "journal.db"
    with Journal(path) as journal:
        journal.put_group([answer(number, os.urandom(900)) for number in range(60)])
    data = bytearray(path.read_bytes())
    data[2 * 4096 :] = b"\xff" * (len(data) - 2 * 4096)
    path.write_bytes(data)

    def read_all() -> None:
        with Journal(path) as journal:
            for number in range(60):
                journal.get(answer(number).request.key)

    with pytest.raises(InputError, match="malformed") as error:
        read_all()
    assert str(path) in str(error.value)


def test_a_full_disk_is_told_as_such_and_nothing_is_lost(tmp_path: Path):
    more = [answer(number, os.urandom(4000)) for number in range(2, 30)]
    with Journal(tmp_path / "journal.db") as journal:
        journal.put_group([answer(1)])
        pages = journal._pragma("page_count")
        journal._db.execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLITE_FULL, as for a full disk
        with pytest.raises(sqlite3.OperationalError, match="full"):
            journal.put_group(more)
        assert len(journal) == 1
        journal._db.execute(f"PRAGMA max_page_count = {pages + 2000}")
        assert journal.put_group(more) == len(more)
