"""Laws of the ledger: what it takes, what it refuses, and that no change to its rows goes unseen."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone

import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, RunDirError, VerificationError
from limbeck.ledger.canonical import EMPTY, digest_bytes
from limbeck.ledger.store import Ledger, Row, chain_problems, entry_body, entry_digest, parse_entry
from limbeck.records import Entry

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not 2**53 <= abs(x) < 1e21)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FRESH = itertools.count()
FACTS = st.dictionaries(TEXT, JSON, max_size=4)


def append(ledger: Ledger, stage: str = "collect", facts: dict | None = None) -> Entry:
    return ledger.append(
        stage=stage,
        started=datetime.now(UTC),
        inputs={"a": EMPTY},
        outputs={"b": EMPTY},
        recipe=EMPTY,
        facts=facts or {},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


# The store


@SETTINGS
@given(facts=st.lists(FACTS, min_size=1, max_size=4))
def test_what_is_appended_is_read_back_and_its_chain_holds(tmp_path, facts):
    path = tmp_path / f"{next(FRESH)}.db"
    with Ledger(path) as ledger:
        written = [append(ledger, facts=each) for each in facts]
    with Ledger(path, read_only=True) as ledger:
        assert ledger.entries() == written
        assert [entry.facts for entry in written] == facts
        assert [entry.previous for entry in written[1:]] == [entry_digest(entry) for entry in written[:-1]]
        assert ledger.head() == entry_digest(written[-1])
        assert ledger.schema_problems() == []
        assert all(parse_entry(entry_body(entry)) == entry for entry in written)
    assert os.listdir(tmp_path).count(path.name + "-journal") == 0


def test_digest_is_sha256_of_the_stored_bytes_which_are_canonical_json(tmp_path):
    started = datetime(2026, 3, 1, 12, 0, 0, tzinfo=timezone(timedelta(hours=2)))
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.append(
            stage="collect",
            started=started,
            inputs={"b": EMPTY, "a": EMPTY},
            outputs={},
            recipe=EMPTY,
            facts={"z": "ä", "rows": 3, "deep": {"b": None, "a": [True, "x"]}},
        )
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as db:
        digest, body = db.execute("SELECT digest, body FROM entries").fetchone()
    assert digest == "sha256:" + hashlib.sha256(body.encode()).hexdigest()
    # Without floats, RFC 8785 is what json writes with sorted keys and no spaces.
    assert body == json.dumps(json.loads(body), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert json.loads(body)["started"] == "2026-03-01T10:00:00.000000Z"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2**53, 1e20, -(2.0**53), "\ud800"])
def test_facts_that_json_cannot_say_are_refused_with_their_place(tmp_path, bad):
    with Ledger(tmp_path / "ledger.db") as ledger:
        with pytest.raises(InputError, match=r"facts\.loss\.steps\[1\]") as error:
            append(ledger, "train", {"loss": {"steps": [1.0, bad]}, "other": bad})
        assert len(error.value.problems) == 2
        assert ledger.entries() == []


def test_facts_are_nested_64_deep_at_most_with_their_entry(tmp_path):
    def lists(levels: int) -> list:
        return [lists(levels - 1)] if levels > 1 else []

    with Ledger(tmp_path / "ledger.db") as ledger:
        with pytest.raises(InputError, match="nested too deeply"):
            append(ledger, facts={"x": lists(63)})
        assert append(ledger, facts={"x": lists(62)}).facts == {"x": lists(62)}
        assert len(ledger.entries()) == 1


def test_times_without_a_zone_are_refused(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger, pytest.raises(ValueError, match="zone"):
        ledger.append(stage="a", started=datetime(2026, 1, 1), inputs={}, outputs={}, recipe=EMPTY, facts={})


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = '{}'",
        "DELETE FROM entries WHERE idx = 1",
        "INSERT OR REPLACE INTO entries VALUES (0, 'x', '{}')",
        "INSERT INTO entries VALUES (7, 'x', '{}')",
    ],
)
def test_the_database_itself_refuses_all_but_appending(tmp_path, statement):
    with Ledger(tmp_path / "ledger.db") as ledger:
        append(ledger)
        append(ledger)
    with (
        closing(sqlite3.connect(tmp_path / "ledger.db")) as db,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        db.execute(statement)


def test_last_is_the_latest_entry_of_a_stage(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert ledger.last("collect") is None
        assert ledger.head() == EMPTY
        append(ledger, "collect")
        append(ledger, "curate")
        again = append(ledger, "collect")
        assert ledger.last("collect") == again


def test_a_broken_chain_is_never_built_upon(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        append(ledger)
        append(ledger)
    runs.forge(path, ("UPDATE entries SET body = replace(body, '\"collect\"', '\"curate\"') WHERE idx = 0", ()))
    with Ledger(path) as ledger, pytest.raises(VerificationError, match="changed after it was written"):
        append(ledger)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT COUNT(*) FROM entries").fetchone() == (2,)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be taken for one " * 20, None])
def test_what_is_no_ledger_is_refused_for_reading_and_left_alone(tmp_path, content):
    path = tmp_path / "ledger.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunDirError, match="not a ledger"):
        Ledger(path, read_only=True)
    assert (path.read_bytes() if path.exists() else None) == content


def test_another_database_is_not_written_into(tmp_path):
    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE entries (idx, digest, body)")
    before = path.read_bytes()
    with pytest.raises(RunDirError, match="not a ledger"):
        Ledger(path)
    assert path.read_bytes() == before


KILLED = """
import sys
from datetime import UTC, datetime
from limbeck.ledger.canonical import EMPTY
from limbeck.ledger.store import Ledger
with Ledger(sys.argv[1]) as ledger:
    while True:
        entry = ledger.append(stage="collect", started=datetime.now(UTC), inputs={}, outputs={}, recipe=EMPTY,
                              facts={"padding": "x" * 20000})
        print(entry.index, flush=True)
"""


def test_killed_at_any_moment_every_acknowledged_entry_stays(tmp_path):
    path, environment = tmp_path / "ledger.db", os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    lengths = random.Random(0)
    acknowledged = -1
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout
            acknowledged = max(acknowledged, int(child.stdout.readline()))
            time.sleep(lengths.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *map(int, child.stdout.read().split("\n")[:-1])])
        with Ledger(path, read_only=True) as ledger:
            entries = ledger.entries()
            assert ledger.schema_problems() == []
        assert len(entries) in (acknowledged + 1, acknowledged + 2)


# The chain


@pytest.fixture(scope="module")
def rows(whole):
    with Ledger(whole / "ledger.db", read_only=True) as ledger:
        return ledger.rows()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_character_anywhere_is_found(rows, data):
    place = data.draw(st.integers(0, len(rows) - 1))
    field = data.draw(st.sampled_from(["digest", "body"]))
    text = getattr(rows[place], field)
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.characters(exclude_categories=("Cs",)).filter(lambda c: c != text[at]))
    changed = rows[place]._replace(**{field: text[:at] + new + text[at + 1 :]})
    assert chain_problems([*rows[:place], changed, *rows[place + 1 :]])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reordering_dropping_and_duplicating_are_found(rows, data):
    order = data.draw(
        st.lists(st.integers(0, len(rows) - 1), max_size=len(rows) + 2).filter(lambda o: o != list(range(len(o))))
    )
    assert chain_problems([rows[i] for i in order])
    # Nor does it help to number them anew.
    assert chain_problems([rows[i]._replace(position=place) for place, i in enumerate(order)])


def test_a_value_changed_with_its_digest_made_anew_breaks_the_next_link(rows):
    for place, row in enumerate(rows[:-1]):
        body = row.body.replace('"limbeck":"', '"limbeck":"x')
        changed = Row(place, digest_bytes(body.encode()), body)
        assert chain_problems([*rows[:place], changed, *rows[place + 1 :]])


def test_a_damaged_page_is_told_and_not_a_traceback(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        append(ledger)
    data = bytearray(path.read_bytes())
    page = int.from_bytes(data[16:18], "big")
    data[page:] = b"\xff" * (len(data) - page)
    path.write_bytes(data)
    with pytest.raises((VerificationError, RunDirError), match=r"ledger\.db"), Ledger(path, read_only=True) as ledger:
        ledger.entries()


def test_a_ledger_of_the_first_layout_is_brought_up_to_date_when_it_is_written_to(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        first, _ = append(ledger), append(ledger, "curate")
        root = ledger.tree.root()
    with closing(sqlite3.connect(path)) as db:
        for table in ("hashes", "subtrees"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(RunDirError, match="run the same recipe again to bring it up to date"):
        Ledger(path, read_only=True)
    with Ledger(path) as ledger:
        assert ledger.entries()[0] == first
        assert ledger.tree.root() == root
        assert ledger.tree.problems() == ledger.schema_problems() == []
        append(ledger)
        assert ledger.tree.size == 3


def test_leaves_are_taken_in_with_their_entry_or_not_at_all(tmp_path):
    fact = {"leaves": {"version": 1, "count": 2, "nonce": "00" * 32, "salts": EMPTY}}
    with Ledger(tmp_path / "ledger.db") as ledger:
        values = {"started": datetime.now(UTC), "inputs": {}, "outputs": {}, "recipe": EMPTY}
        for stage, facts, leaves in (
            ("seal", fact, [b"1" * 32]),
            ("seal", {}, []),
            ("collect", fact, [b"1" * 32, b"2" * 32]),
            ("collect", {}, [b"1" * 32]),
        ):
            with pytest.raises(ValueError, match=r"leaves|LeavesFact"):
                ledger.append(stage=stage, facts=facts, leaves=leaves, **values)
        assert (ledger.entries(), ledger.tree.size) == ([], 0)
        ledger.append(stage="seal", facts=fact, leaves=[b"1" * 32, b"2" * 32], **values)
        assert ledger.tree.size == 3
        assert ledger.tree.leaves(0, 2) == [b"1" * 32, b"2" * 32]
