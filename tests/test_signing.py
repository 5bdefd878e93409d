"""Laws of checkpoints and notes: what is signed, and that no rewriting of history goes unseen."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
from command import call

from limbeck.errors import InputError
from limbeck.ledger import verify
from limbeck.ledger.canonical import digest_bytes, digest_file
from limbeck.ledger.merkle.fields import entry_hash
from limbeck.ledger.merkle.stored import StoredTree
from limbeck.ledger.merkle.tree import consistent
from limbeck.ledger.signing import keys
from limbeck.ledger.signing.checkpoints import checkpoints, sign_checkpoint, sign_if_due
from limbeck.ledger.signing.envelope import sign
from limbeck.ledger.signing.notes import notes, sign_note
from limbeck.ledger.store import Ledger
from limbeck.run import STAGES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def other_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "other"))
    return tmp_path / "other"


# Checkpoints


def test_a_run_is_signed_at_its_three_moments(whole):
    made = runs.signed(whole)
    told = [m.statement.predicate for m in made]
    assert [t.kind for t in told] == ["collection-closed", "training-intended", "training-done"]
    assert [t.recipe and f"sha256:{t.recipe}" for t in told] == [None, runs.RECIPE.digest, None]
    assert [t.examples and t.examples.count for t in told] == [None, runs.PROMPTS - 1, runs.PROMPTS - 1]
    weights = {s.name: s.digest.sha256 for s in made[2].statement.subject[1:]}
    file = whole / "student" / "deep" / "weights.bin"
    assert weights == {"student/deep/weights.bin": digest_file(file).removeprefix("sha256:")}
    assert all(m.envelope.signed() for m in made)


def test_each_checkpoint_continues_the_one_before(whole):
    with Ledger(whole / "ledger.db", read_only=True) as ledger:
        made = list(checkpoints(ledger.entries()))
        for old, new in pairwise(made):
            a, b = old.statement.predicate.size, new.statement.predicate.size
            assert a < b
            assert consistent(a, b, old.statement.root, new.statement.root, ledger.tree.consistency(a, b))


def test_nothing_new_is_not_signed_twice_and_something_new_is(copy):
    names = [stage.name for stage in STAGES]
    with Ledger(copy / "ledger.db") as ledger:
        before = len(ledger.entries())
        for place, stage in enumerate(STAGES):
            if stage.signs:
                sign_if_due(ledger, stage.signs, runs.RECIPE, names[: place + 1])
        assert len(ledger.entries()) == before
        runs.enter(ledger, copy, "student", ("examples",), ("beginning",))
        sign_if_due(ledger, "collection-closed", runs.RECIPE, ["prompts", "collect"])
        assert len(ledger.entries()) == before + 1
        sign_if_due(ledger, "training-intended", runs.RECIPE, names[: names.index("student") + 1])
        assert [e.stage for e in ledger.entries()[before:]] == ["student", "checkpoint"]


def test_another_machines_secret_cannot_commit_to_the_order(copy, other_home):
    with Ledger(copy / "ledger.db") as ledger:
        with pytest.raises(InputError, match="another secret"):
            sign_checkpoint(ledger, "training-intended", runs.RECIPE)
        made = sign_checkpoint(ledger, "by-hand", runs.RECIPE)
    assert verify(copy).ok
    assert len({m.envelope.keyid for m in runs.signed(copy)}) == 2
    assert [p.where for p in verify(copy, key=made.envelope.keyid).differences] == [
        f"ledger.db: entry {m.entry.index} (checkpoint): key" for m in runs.signed(copy)[:-1]
    ]


def test_the_key_that_was_expected_is_found(whole):
    assert verify(whole, key=runs.signed(whole)[0].envelope.keyid).ok
    assert len(verify(whole, key="ab" * 32).differences) == 3


# Rewriting history


def rewritten(run: Path, index: int, old: str, new: str) -> None:
    """Change an entry and make every digest anew, as somebody with the whole directory can; only signatures stay."""
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        body = str(ledger.rows()[index].body)
    assert old in body
    changed = (body.replace(old, new), index)
    runs.forge(run / "ledger.db", ("UPDATE entries SET body = ? WHERE idx = ?", changed))
    rehashed(run)


def rehashed(run: Path) -> None:
    """Digests, links and tree anew, for the bodies as they are."""
    path = run / "ledger.db"
    with closing(sqlite3.connect(path)) as db:
        bodies = [json.loads(body) for (body,) in db.execute("SELECT body FROM entries ORDER BY idx")]
        examples = StoredTree(db).leaves(5, 5 + runs.PROMPTS - 1)
    changes, previous, leaves = [], bodies[0]["previous"], []
    for index, body in enumerate(bodies):
        text = json.dumps(body | {"previous": previous}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = digest_bytes(text.encode())
        changes.append(("UPDATE entries SET digest = ?, body = ? WHERE idx = ?", (previous, text, index)))
        leaves += [*(examples if body["stage"] == "seal" else ()), entry_hash(text.encode())]
    runs.forge(path, *changes, ("DELETE FROM hashes", ()), ("DELETE FROM subtrees", ()))
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        StoredTree(db).append(leaves)


@pytest.mark.parametrize(("index", "old", "new"), [(0, '"rows":6', '"rows":7'), (3, '"rows":6', '"rows":5')])
def test_a_history_that_was_written_anew_contradicts_its_signatures(copy, index, old, new):
    rewritten(copy, index, old, new)
    broken = [m for m in runs.signed(copy) if m.entry.index > index]
    found = [p.where for p in verify(copy).differences]
    assert found == [f"ledger.db: entry {m.entry.index} (checkpoint): root" for m in broken]


def test_a_malformed_count_of_leaves_is_found(copy):
    rewritten(copy, 5, '"leaves":{"count":5', '"leaves":{"count":-5')
    assert [p.where for p in verify(copy).differences] == ["ledger.db: entry 5: facts: leaves"]


def test_a_checkpoint_of_another_run_is_found(copy, tmp_path):
    theirs, mine = runs.signed(runs.make_run(tmp_path / "other", until="curate"))[0], runs.signed(copy)[0]
    rewritten(copy, 2, mine.envelope.data.decode(), theirs.envelope.data.decode())
    found = [p.where for p in verify(copy).differences]
    assert "ledger.db: entry 2 (checkpoint): root" in found
    assert not any("signature" in where for where in found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 1),
        ("examples", {"count": 4, "first": 5}),
        ("examples", None),
        ("recipe", "00" * 32),
        ("order", "00" * 32),
        ("kind", "by-hand"),
    ],
)
def test_a_checkpoint_that_says_something_else_is_found_though_it_is_signed(copy, name, value):
    made = runs.signed(copy)[1]
    said = json.loads(json.dumps(made.envelope.statement()))
    said["predicate"][name] = value
    rewritten(copy, made.entry.index, made.envelope.data.decode(), sign(said, keys.signing_key()).data.decode())
    found = [p.where for p in verify(copy).differences]
    due = {"kind": "recipe"}.get(name, name)
    assert any(w.startswith(f"ledger.db: entry {made.entry.index} (checkpoint): {due}") for w in found), found


# Leaves


def test_a_stranger_without_the_secret_is_told_what_was_not_checked(whole, other_home):
    result = verify(whole)
    assert result.ok
    assert any("salts of 5 examples are not known here" in note for note in result.notes)
    assert not other_home.exists()


@pytest.mark.parametrize("name", ["fields", "share", "leaf"])
def test_a_changed_row_of_the_leaves_is_found(copy, name):
    path = copy / "leaves.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change = {
        "fields": rows[2]["fields"].replace('"terms":"own-model"', '"terms":"mit"'),
        "share": rows[2]["share"].replace('"tokens":4', '"tokens":3'),
        "leaf": rows[1]["leaf"],
    }
    assert rows[2][name] != change[name]
    rows[2][name] = change[name]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    found = [p.where for p in verify(copy).differences]
    due = {"fields": "terms", "share": "share", "leaf": "leaf"}[name]
    assert f"leaves.parquet: row 2: {due}" in found
    assert ("leaves.parquet: row 2: hash of fields and salts" in found) == (name != "leaf")


def test_a_dropped_or_reordered_row_of_the_leaves_is_found(copy):
    path = copy / "leaves.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 4), path)
    assert "leaves.parquet: row 4" in [p.where for p in verify(copy).differences]
    pq.write_table(table.take([1, 0, 2, 3, 4]), path)
    assert "leaves.parquet: row 0: leaf" in [p.where for p in verify(copy).differences]


# Notes


def test_a_note_is_signed_about_what_was_there(copy):
    with Ledger(copy / "ledger.db") as ledger:
        size, root = ledger.tree.size, ledger.tree.root()
        made = sign_note(ledger, "Rows 1 to 5 read; nothing strange.", "R. Reader", runs.RECIPE)
        assert notes(ledger.entries()) == [made]
    told = made.statement.predicate
    assert (told.size, told.by, told.text) == (size, "R. Reader", "Rows 1 to 5 read; nothing strange.")
    assert made.statement.root == root
    assert verify(copy).ok


@pytest.mark.parametrize(("text", "remedy"), [("", "in words"), ("  \n", "in words"), ("x" * 10_001, "shorten it")])
def test_a_note_without_words_or_with_too_many_is_refused(copy, text, remedy):
    with Ledger(copy / "ledger.db") as ledger, pytest.raises(InputError, match="no note") as refused:
        sign_note(ledger, text, None, runs.RECIPE)
    assert [problem.remedy for problem in refused.value.problems] == [
        p for p in ("say in words what is to be kept", "shorten it") if remedy in p
    ]


@pytest.mark.parametrize("words", [("note", "Read."), ("checkpoint",)])
def test_where_nothing_can_be_written_the_remedy_names_no_other_place(copy, words):
    """A directory in the place of the lock: permissions hold nobody up who is root."""
    (copy / ".lock").unlink(missing_ok=True)
    (copy / ".lock").mkdir()
    told = call("ledger", words[0], copy, *words[1:])
    assert told.exit_code == 2
    assert "change the permissions" in told.stderr
    assert "--out" not in told.stderr


def test_a_forged_note_is_found(copy):
    with Ledger(copy / "ledger.db") as ledger:
        made = sign_note(ledger, "fine", None, runs.RECIPE)
    payload = made.envelope.payload
    other = base64.b64encode(base64.b64decode(payload).replace(b'"fine"', b'"vile"')).decode()
    runs.forge(copy / "ledger.db", ("UPDATE entries SET body = replace(body, ?, ?)", (payload, other)))
    rehashed(copy)
    assert [p.where for p in verify(copy).differences] == [f"ledger.db: entry {made.entry.index} (note): signature"]
