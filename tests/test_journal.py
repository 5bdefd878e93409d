"""The journal: what was acknowledged is there, whole, once, as it was written."""

from __future__ import annotations

import asyncio
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

from limbeck.collect.journal import Ended, Journal, Sent, held
from limbeck.collect.teachers import Answer, Request
from limbeck.collect.writer import Writer
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


def test_a_journal_of_version_1_is_read_for_ever(tmp_path: Path):
    """The file was written by the release that first had journals."""
    from limbeck.ledger.raw_answers import RawAnswers

    path = tmp_path / "journal.db"
    shutil.copy(Path(__file__).parent / "data" / "journal-1.db", path)
    raws = [b"answer %d " % number * 20 for number in range(3)]
    for _ in range(2):
        with RawAnswers(path) as answers:  # the verifier's own reader, before and after
            found = [answers.find(answer(number).request.key) for number in range(3)]
        assert [one.raw for one in found if one] == raws
        with Journal(path) as journal:
            assert (len(journal), journal.refused, journal.next_number) == (3, 1, 1)
            for number, raw in enumerate(raws):
                assert journal.get(answer(number).request.key).raw == raw
            journal.put_group([answer(7, b"new" * 99)])
            assert journal.get(answer(7).request.key).raw == b"new" * 99
        with Journal(path) as journal:
            journal._db.execute("DELETE FROM answers WHERE key = ?", (answer(7).request.key,))


def test_what_was_sent_is_accounted_for(tmp_path: Path):
    mine, other = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    with Journal(tmp_path / "journal.db") as journal:
        keys = [answer(number).request.key for number in range(5)]
        sent = [Sent(n + 1, key, other if n == 4 else mine, 100 + n) for n, key in enumerate(keys)]
        journal.put_traffic(sent, [], [])
        assert journal.next_number == 6
        assert journal.outcomes(mine) == {"killed": (4, 100 + 101 + 102 + 103)}
        journal.put_traffic([], [answer(0, b"yes")], [Ended(1, "answered", 7), Ended(2, "cut", 101)])
        assert journal.outcomes(mine) == {"answered": (1, 7), "cut": (1, 101), "killed": (2, 205)}
        assert journal.get(keys[0]).raw == b"yes"
        assert journal.close_open() == 3
        assert journal.close_open() == 0
        assert journal.outcomes(mine)["killed"] == (2, 205)
        assert journal.outcomes(other) == {"killed": (1, 104)}


def test_answers_are_copied_from_journal_to_journal(tmp_path: Path):
    with Journal(tmp_path / "one.db") as one, Journal(tmp_path / "two.db") as two:
        one.put_group([answer(number, os.urandom(50)) for number in range(4)])
        wanted = [answer(number).request.key for number in (1, 3, 9)]
        assert one.copy_to(two, wanted) == 2
        assert one.copy_to(two, wanted) == 0
        assert len(two) == 2
        assert [two.get(key) for key in wanted[:2]] == [one.get(key) for key in wanted[:2]]


def test_a_journal_is_held_by_one_process(tmp_path: Path):
    code = "import sys; from limbeck.collect.journal import held\nwith held(sys.argv[1]): print('in')"
    command = [sys.executable, "-c", code, str(tmp_path / "journal.db")]
    with held(tmp_path / "journal.db"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"held by process {os.getpid()}" in done.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "in\n"


def test_a_bomb_is_not_unpacked(tmp_path: Path):
    import zstandard

    from limbeck.ledger.raw_answers import RawAnswers

    path, key = tmp_path / "journal.db", answer(1).request.key
    with Journal(path) as journal:
        journal.put_group([answer(1)])
    sized, unsized = zstandard.ZstdCompressor(), zstandard.ZstdCompressor(write_content_size=False)
    honest = unsized.compress(b"a" * 1000)
    for bad in (sized.compress(bytes(2**28 + 1)), honest, sized.compress(b"abc" * 99)[:-2]):
        with sqlite3.connect(path) as db:
            db.execute("UPDATE answers SET raw = ?", (bad,))
        db.close()
        with RawAnswers(path) as answers, pytest.raises(ValueError, match="does not unpack"):
            answers.find(key)


def test_the_writer_commits_in_order_what_it_was_given(tmp_path: Path):
    path = tmp_path / "journal.db"

    async def work() -> None:
        async with Writer(path) as writer:

            async def one(number: int) -> None:
                await writer.begin(Sent(number + 1, answer(number).request.key, "sha256:" + "a" * 64, 1))
                with Journal(path) as seen:  # another connection sees what was awaited
                    assert seen.next_number > number + 1
                await writer.end(Ended(number + 1, "answered", 1), answer(number, b"x" * number))

            await asyncio.gather(*(one(number) for number in range(40)))
            for number in range(40, 60):
                writer.end(Ended(number + 1, "answered", 1), answer(number))

    asyncio.run(work())
    with Journal(path) as journal:
        assert len(journal) == 60
        assert journal.get(answer(39).request.key).raw == b"x" * 39


def test_a_writer_that_fails_tells_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = sqlite3.OperationalError("database or disk is full")

    def fail(*_: object) -> None:
        raise full

    monkeypatch.setattr(Journal, "put_traffic", fail)

    async def work() -> None:
        async with Writer(tmp_path / "journal.db") as writer:
            ended = writer.end(Ended(1, "answered", 1), answer(1))
            results = await asyncio.gather(
                ended, *(writer.begin(Sent(n, "k", "a", 1)) for n in range(3)), return_exceptions=True
            )
            assert results == [full] * 4
            with pytest.raises(sqlite3.OperationalError):
                await writer.begin(Sent(9, "k", "a", 1))

    with pytest.raises(sqlite3.OperationalError, match="full"):
        asyncio.run(work())


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=60)), max_size=40))
@settings(max_examples=40, deadline=None)
def test_traffic_keeps_what_put_group_keeps(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, bytes]]):
    """The two ways of writing answers agree: the first of a request counts, the others are set aside."""
    root = tmp_path_factory.mktemp("journal")
    group = [answer(number, raw) for number, raw in pairs]
    with Journal(root / "one.db") as one, Journal(root / "two.db") as two:
        one.put_group(group)
        two.put_traffic([], group[:20], [])
        two.put_traffic([], group[20:], [])
        assert (len(one), one.refused) == (len(two), two.refused)
        for request, _ in group:
            assert one.get(request.key)[:4] == two.get(request.key)[:4]
