"""Verification finds every difference and reads nothing it should not, on whole RUN directories."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
import runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.errors import RunDirError
from limbeck.ledger import verify
from limbeck.ledger.canonical import EMPTY, digest_json
from limbeck.ledger.store import Ledger
from limbeck.records import Prompt, Split
from limbeck.run import STAGES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


# Verification of a whole run


def places(run: Path, **options) -> list[str]:
    return [problem.where for problem in verify(run, **options).differences]


def test_an_untouched_run_is_verified_and_not_written_to(whole):
    before = digest_tree(whole)
    result = verify(whole)
    assert result.ok
    assert result.differences == ()
    assert result.entries == len(STAGES) + 3  # the checkpoints
    assert any(note.startswith("unanchored: ") for note in result.notes)
    assert not any("in no entry" in note or "not done" in note for note in result.notes)
    assert digest_tree(whole) == before


def digest_tree(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("until", ["prompts", "collect", "render", "train"])
def test_a_partial_run_is_verified_and_says_what_is_missing(tmp_path, until):
    result = verify(runs.make_run(tmp_path / "run", until=until))
    assert result.ok
    assert any(note.startswith("stages not done yet") and note.endswith("report") for note in result.notes)


def files(run: Path) -> list[str]:
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


def test_every_changed_byte_of_every_file_is_found(copy):
    """All files but the databases, which have tests of their own."""
    rng = random.Random(0)
    names = [name for name in files(copy) if not name.endswith(".db")]
    assert len(names) > 15
    for name in names:
        path, good = copy / name, (copy / name).read_bytes()
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        result = verify(copy)
        assert [p for p in result.differences if p.where.startswith(name)], name
        path.unlink()
        if name != "recipe.yaml":
            missing = [p for p in verify(copy).differences if p.where == name]
            assert missing, name
            assert missing[0].found == "nothing"
        path.write_bytes(good)
    assert verify(copy).ok


def test_all_differences_are_told_with_both_digests(copy):
    expected = hashlib.sha256((copy / "training.json").read_bytes()).hexdigest()
    for name in ("training.json", "report.html", "student/deep/weights.bin"):
        (copy / name).write_text("other", encoding="utf-8")
    (copy / "beginning" / "extra.txt").write_text("more", encoding="utf-8")
    result = verify(copy)
    assert places(copy) == ["beginning/extra.txt", "report.html", "student/deep/weights.bin", "training.json"]
    assert hashlib.sha256(b"other").hexdigest() in result.differences[-1].found
    assert expected in result.differences[-1].expected


def test_a_changed_recipe_is_found_once_for_each_entry(copy):
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("layers: 2", "layers: 3"), encoding="utf-8")
    assert len([p for p in places(copy) if p.startswith("recipe.yaml")]) == len(STAGES) + 3


def test_the_recipe_has_the_same_digest_as_text_and_as_model(whole):
    import yaml

    assert digest_json(yaml.safe_load((whole / "recipe.yaml").read_text())) == runs.RECIPE.digest


def test_a_missing_trigger_and_a_strange_table_are_found(copy):
    with closing(sqlite3.connect(copy / "ledger.db")) as db:
        db.execute("DROP TRIGGER entries_kept")
        db.execute("CREATE TABLE other (x)")
        db.commit()
    assert [p.rpartition(": ")[2] for p in places(copy)] == ["entries_kept", "other"]


@pytest.mark.parametrize(
    "spoil", [lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"?" * 9000)]
)
def test_a_run_without_its_ledger_is_not_verified(copy, spoil):
    spoil(copy / "ledger.db")
    assert not verify(copy).ok


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_verification_survives_any_damage_to_the_ledger_file(copy, data):
    path = copy / "ledger.db"
    good = path.read_bytes()
    at = data.draw(st.integers(0, 2**20)) % len(good)  # the file's length is not the same every time
    path.write_bytes(good[:at] + data.draw(st.binary(min_size=1, max_size=64)) + good[at + 1 :])
    verify(copy)
    path.write_bytes(good)


def test_a_path_that_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunDirError, match="not a RUN directory"):
            verify(path)


def test_removing_the_newest_entries_is_found_by_a_head_kept_elsewhere(copy):
    head = verify(copy).head
    shorter = ("DELETE FROM entries WHERE idx = 14", ())
    runs.forge(copy / "ledger.db", shorter)
    assert places(copy) == ["ledger.db: the tree"]
    runs.forge(copy / "ledger.db", ("DELETE FROM hashes WHERE first = (SELECT MAX(first) FROM hashes)", ()))
    result = verify(copy)
    assert result.ok
    assert "in RUN but in no entry: report.html" in result.notes
    assert places(copy, head=head) == ["ledger.db: head"]
    assert places(copy, head=result.head) == []


def test_files_nobody_recorded_are_noted_and_checkpoints_are_not(copy):
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    (copy / "beginning" / "README.md").write_text("mine", encoding="utf-8")
    for name in ("checkpoints/step-3/weights.bin", ".lock"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x", encoding="utf-8")
    result = verify(copy)
    assert result.ok
    assert [note.rpartition(": ")[2] for note in result.notes if "in no entry" in note] == [
        "beginning/README.md",
        "notes.txt",
    ]


# Paths a ledger claims


@pytest.mark.parametrize("name", ["../secret", "/dev/stdin", "student/../../secret", ".", ""])
def test_a_path_out_of_run_is_a_difference_and_is_not_read(copy, name):
    os.mkfifo(copy.parent / "secret")  # reading it would never end
    with Ledger(copy / "ledger.db") as ledger:
        ledger.append(
            stage="report",
            started=datetime.now(UTC),
            inputs={},
            outputs={name: EMPTY},
            recipe=runs.RECIPE.digest,
            facts={},
        )
    assert [p.found for p in verify(copy).differences] == ["a path that leads out of RUN; not read"]


@pytest.mark.parametrize("name", ["training.json", "student/config.json", "student/deep", "journal.db", "recipe.yaml"])
def test_a_link_out_of_run_is_a_difference_and_is_not_read(copy, name):
    outside = copy.parent / "outside"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside)
    assert [(p.where, p.found) for p in verify(copy).differences] == [
        (name, "a symbolic link that leads out of RUN; not read")
    ]


def test_a_linked_recipe_is_not_read(copy):
    """Not even for the terms in it, which differ."""
    shutil.move(copy / "recipe.yaml", copy.parent / "outside")
    (copy / "recipe.yaml").symlink_to(copy.parent / "outside")
    text = (copy.parent / "outside").read_text(encoding="utf-8")
    (copy.parent / "outside").write_text(text.replace("own-model", "other"), encoding="utf-8")
    assert places(copy) == ["recipe.yaml"]


def test_neither_a_link_within_run_nor_a_pipe_is_read(copy):
    shutil.move(copy / "training.json", copy / "checkpoints")
    (copy / "training.json").symlink_to(copy / "checkpoints")
    (copy / "report.html").unlink()
    os.mkfifo(copy / "report.html")
    os.mkfifo(copy / "signals" / "pipe")
    assert [(p.where, p.found) for p in verify(copy).differences] == [
        ("report.html", "neither a file nor a directory"),
        ("signals/pipe", "neither a file nor a directory; not read"),
        ("training.json", "a symbolic link; not read"),
    ]


# Arrows


def test_a_stage_done_again_makes_what_was_made_from_it_stale(copy):
    (copy / "verdicts.parquet").write_bytes((copy / "verdicts.parquet").read_bytes() + b" ")
    with Ledger(copy / "ledger.db") as ledger:
        runs.enter(ledger, copy, "curate", ("completions.parquet",), ("verdicts.parquet",))
    stale = [where for where in places(copy) if "stale" in where]
    readers = [stage.name for stage in STAGES if "verdicts.parquet" in stage.reads]
    assert [where.split("(")[1].split(")")[0] for where in stale] == readers
    with Ledger(copy / "ledger.db") as ledger:
        runs.enter(ledger, copy, "render", ("completions.parquet", "verdicts.parquet"), ("examples",))
    assert not any("(render)" in where for where in places(copy))


def test_an_input_that_no_stage_wrote_is_found(copy):
    with Ledger(copy / "ledger.db") as ledger:
        for inputs in ({"scores.json": EMPTY}, {"poem.txt": EMPTY}):
            ledger.append(
                stage="card",
                started=datetime.now(UTC),
                inputs=inputs,
                outputs={},
                recipe=runs.RECIPE.digest,
                facts={},
            )
    found = [p for p in places(copy) if "input" in p]
    assert found == ["entry 15 (card): input scores.json", "entry 16 (card): input poem.txt"]


def test_stages_out_of_order_are_found(tmp_path):
    run = runs.make_run(tmp_path / "run", until="curate")
    (run / "ledger.db").unlink()
    with Ledger(run / "ledger.db") as ledger:
        runs.enter(ledger, run, "curate", ("completions.parquet",), ("verdicts.parquet",))
        runs.enter(ledger, run, "prompts", (), ("prompts.parquet",))
        runs.enter(ledger, run, "collect", ("prompts.parquet",), ("completions.parquet",))
    assert "entry 0 (curate): input completions.parquet" in places(run)


# Records against their parents: forged before they were recorded, so every digest of a file is right


def forged(tmp_path: Path, change) -> list[str]:
    return places(runs.make_run(tmp_path / "run", change=change))


def answer(**changes):
    """Changes the second completion, and the verdict with it."""

    def change(records: runs.Records) -> runs.Records:
        c = list(records.completions)
        c[2] = c[2].model_copy(update=changes)
        v = [verdict._replace(completion=one.id) for verdict, one in zip(records.verdicts, c, strict=True)]
        return records._replace(completions=c, verdicts=v)

    return change


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"text": "About 5."}, "journal.db, for completions.parquet: row 2: text answered"),
        ({"finish_reason": "length"}, "journal.db, for completions.parquet: row 2: finish_reason answered"),
        (
            {"completion_tokens": 400},
            "journal.db, for completions.parquet: row 2: completion_tokens answered",
        ),
        ({"model": "another"}, "journal.db, for completions.parquet: row 2: model answered"),
        ({"weights": EMPTY}, "journal.db, for completions.parquet: row 2: weights asked"),
        (
            {"created": datetime(2026, 1, 1, tzinfo=UTC)},
            "journal.db, for completions.parquet: row 2: created",
        ),
        ({"response": EMPTY}, "journal.db, for completions.parquet: row 2: response"),
        ({"request_id": EMPTY}, "journal.db, for completions.parquet: row 2"),
        ({"terms": "some-other"}, f"completions.parquet: row 2: terms of {runs.TEACHER}"),
        ({"split": Split.HELD_OUT}, "completions.parquet: row 2: split"),
        ({"prompt_id": EMPTY}, "completions.parquet: row 2: prompt_id"),
    ],
)
def test_a_completion_that_differs_from_its_parents_is_found(tmp_path, changes, where):
    assert where in forged(tmp_path, answer(**changes))


def test_a_rewritten_journal_is_found(copy):
    with closing(sqlite3.connect(copy / "journal.db")) as db:
        db.execute("UPDATE answers SET raw = (SELECT raw FROM answers ORDER BY key LIMIT 1)")
        db.commit()
    assert len([p for p in places(copy) if p.endswith(": response")]) == runs.PROMPTS - 1
    with closing(sqlite3.connect(copy / "journal.db")) as db:
        db.execute("UPDATE answers SET raw = x'00'")
        db.commit()
    assert len([p for p in verify(copy).differences if "does not unpack" in p.found]) == runs.PROMPTS
    (copy / "journal.db").unlink()
    assert places(copy) == ["journal.db"]


def test_a_dropped_answer_that_was_trained_on_is_found(tmp_path):
    run = runs.make_run(tmp_path / "run", until="render")
    records = list(runs.read_verdicts(run))
    records[0] = records[0]._replace(keep=False, filter="loop", reason="said twice")
    runs.write_verdicts(run, records)
    with Ledger(run / "ledger.db") as ledger:
        runs.enter(ledger, run, "curate", ("completions.parquet",), ("verdicts.parquet",))
        runs.enter(ledger, run, "render", ("completions.parquet", "verdicts.parquet"), ("examples",))
    assert places(run) == ["examples: row 0: parent"]


def test_a_held_out_answer_that_was_trained_on_is_found(tmp_path):
    def change(records: runs.Records) -> runs.Records:
        return records._replace(prompts=[p.model_copy(update={"split": Split.HELD_OUT}) for p in records.prompts])

    assert len([where for where in forged(tmp_path, change) if where.endswith("split")]) == runs.PROMPTS - 2


def test_verdicts_that_are_not_one_for_each_completion_are_found(tmp_path):
    found = forged(tmp_path, lambda r: r._replace(verdicts=[*r.verdicts[:2], r.verdicts[3]]))
    assert "verdicts.parquet: row 2" in found
    assert "verdicts.parquet: row 5" in found


def test_prompts_that_are_not_what_their_id_says_or_come_twice_are_found(tmp_path):
    def change(records: runs.Records) -> runs.Records:
        other = Prompt.model_validate(records.prompts[0].model_dump() | {"id": EMPTY})
        return records._replace(prompts=[*records.prompts, other, other])

    assert set(forged(tmp_path, change)) == {"prompts.parquet: row 6: id", "prompts.parquet: row 7: id"}


@pytest.mark.parametrize("name", ["prompts.parquet", "completions.parquet", "examples/examples.parquet", "scores.json"])
def test_unreadable_records_are_a_difference_and_end_no_other_check(copy, name):
    (copy / name).write_bytes(b"PAR1 nothing PAR1")
    (copy / "report.html").write_text("other", encoding="utf-8")
    found = verify(copy).differences
    assert any("cannot be read" in p.found or "another shape" in p.found for p in found)
    assert any(p.where == "report.html" for p in found)


@pytest.mark.parametrize("places", [(0, 0), (0, 3)])
def test_an_answer_that_comes_twice_is_found_wherever_it_stands(tmp_path, places):
    first, second = places

    def change(records: runs.Records) -> runs.Records:
        c, v = list(records.completions), list(records.verdicts)
        c.insert(second + 1, c[first])
        v.insert(second + 1, v[first])
        return records._replace(completions=c, verdicts=v)

    assert f"completions.parquet: row {second + 1}" in forged(tmp_path, change)
