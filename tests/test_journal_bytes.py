"""No byte of journal.db that is evidence of an answer can change unseen, judged by a reader of its own."""

from __future__ import annotations

import shutil
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path

import asked
import pytest
import zstandard

from limbeck.ledger.parents import record_differences
from limbeck.ledger.raw_answers import RawAnswers

PRESENT = frozenset({"recipe.yaml", "prompts.parquet", "completions.parquet", "journal.db"})
Row = tuple[str, bytes, bytes, str, str]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return asked.make_run(tmp_path_factory.mktemp("asked") / "run", until="collect")


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


def packed(path: Path) -> list[Row]:
    """As the rows lie in the table, without its index and without limbeck."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
        return db.execute("SELECT key, request, raw, response, created FROM answers NOT INDEXED").fetchall()


def unpacked(data: bytes) -> bytes:
    frame = data.startswith(b"\x28\xb5\x2f\xfd")
    return zstandard.ZstdDecompressor().decompress(data) if frame else zlib.decompress(data)


def evidence(path: Path) -> list[Row]:
    return sorted((key, unpacked(a), unpacked(b), response, at) for key, a, b, response, at in packed(path))


def change(path: Path, statement: str, *values: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement, values)
        db.commit()


def test_a_flipped_byte_is_found_or_changed_no_evidence(good, copy):
    """320 bytes, spread over the whole file."""
    path = copy / "journal.db"
    data, whole = path.read_bytes(), evidence(good / "journal.db")
    assert record_differences(copy, PRESENT)[0] == []
    unseen = 0
    for place in range(320):
        at, bits = place * len(data) // 320 + place * 7 % (len(data) // 320), (0x01, 0xFF, 0x20)[place % 3]
        path.write_bytes(data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :])
        if not record_differences(copy, PRESENT)[0]:
            unseen += 1
            assert evidence(path) == whole, f"byte {at} of {len(data)}, {bits:#x}"
    assert unseen < 320, "nothing at all was found"


def test_a_change_of_key_digest_or_time_is_found_and_of_what_was_sent_and_came(good, copy):
    """Where the values of a row lie in the file; a copy of a key lies in the index, too."""
    path = copy / "journal.db"
    data, rows = path.read_bytes(), packed(good / "journal.db")
    key, request, raw, response, created = rows[len(rows) // 2]
    cell = key.encode() + request + raw + response.encode() + created.encode()
    start = data.index(cell)
    assert data.count(key.encode()) >= 2, "the index has one as well"
    seen, same = 0, 0
    places = range(start, start + len(cell), 3)
    copies = [at for at in range(len(data)) if data.startswith(key.encode(), at) and at != start]
    for at in (*places, *(c + i for c in copies for i in range(0, len(key), 9))):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :])
        if record_differences(copy, PRESENT)[0]:
            seen += 1
            continue
        assert evidence(path) == evidence(good / "journal.db")
        assert at not in places or len(key) <= at - start < len(key) + len(request) + len(raw), "a plain value"
        same += 1
    assert seen > 10 * same


@pytest.mark.parametrize(("old", "new"), [("T", " "), ("+00:00", "-00:00"), (".", ","), ("+00:00", "Z")])
def test_one_time_in_another_spelling_is_found(copy, old, new):
    change(copy / "journal.db", "UPDATE answers SET created = replace(created, ?, ?)", old, new)
    assert any(": created" in one.where for one in record_differences(copy, PRESENT)[0])


def test_a_digest_beside_an_answer_is_compared(copy):
    change(copy / "journal.db", "UPDATE answers SET response = key")
    assert any(": digest of the response" in one.where for one in record_differences(copy, PRESENT)[0])


def test_a_key_is_taken_from_its_row_and_not_from_the_index(copy, good):
    path = copy / "journal.db"
    key, request, *_ = packed(path)[0]
    data, cell = path.read_bytes(), key.encode() + request
    other = (key[:-1] + ("0" if key[-1] != "0" else "1")).encode() + request
    path.write_bytes(data.replace(cell, other))
    with RawAnswers(path) as raw:
        found = raw.find(key)
    assert found is not None
    assert found.key == other[: len(key)].decode()
    assert any(one.where.endswith(": key") for one in record_differences(copy, PRESENT)[0])
