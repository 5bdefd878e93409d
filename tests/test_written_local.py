"""Prompts that a teacher whose weights are here writes when it is told to."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import pytest
import talker
import torch
from talker import gathered, prompts, prompts_file, recipe

from limbeck import models
from limbeck.collect.journal import Journal
from limbeck.collect.prompts import gather
from limbeck.collect.written import tally
from limbeck.errors import InputError
from limbeck.recipe import Recipe
from limbeck.records import Prompt
from limbeck.rundir import RunDir

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker"))


def source(tmp_path: Path, kind: str, count: int = 8, **more: Any) -> dict[str, Any]:
    """A source of some kind; the talker's words are random letters, so words are few and never alike."""
    seeds = prompts_file(tmp_path / "seeds.jsonl", [f"Seed {n}: why is copper red?" for n in range(6)])
    rows: dict[str, Any] = {
        "evolve": {"seeds": seeds, "rounds": 2},
        "personas": {"personas": prompts_file(tmp_path / "who.jsonl", ["A cooper", "A smith"]), "tasks": seeds},
        "documents": {"documents": seeds, "words": 4},
        "self-instruct": {"seeds": seeds, "examples": 2, "each": 2},
        "multi-turn": {"seeds": seeds, "turns": 2},
    }
    return {"kind": kind, "count": count, "max_tokens": 40, "min_words": 1, "top_p": 1.0, **rows[kind], **more}


@pytest.mark.parametrize("kind", ["evolve", "personas", "documents", "multi-turn"])
def test_a_teacher_that_is_here_writes_prompts_once(tmp_path: Path, talking: Path, kind: str):
    made = recipe(talking, source(tmp_path, kind))
    (tmp_path / "a").mkdir()
    facts: dict[str, Any] = gather(made, RunDir(tmp_path / "a"))
    rows, (part,) = prompts(RunDir(tmp_path / "a")), facts["sources"]
    assert len(rows) == len({p.id for p in rows}) == 8
    assert {(p.writer, p.source, p.licence) for p in rows} == {(str(talking), f"{kind}:{talking}", "unknown")}
    assert all(p.parents for p in rows)
    assert part["weights"] == models.resolve(str(talking)).digest
    assert part["candidates"] == 8 + sum(part["dropped"].values())
    with Journal(tmp_path / "a" / "journal.db") as journal:
        assert len(journal) == part["requests"] >= 8
    again = gathered(recipe(talking, source(tmp_path, kind), concurrency=64), tmp_path / "b")
    assert prompts(again) == rows  # whatever the batches are


def test_a_teacher_of_no_use_is_given_up_soon(tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch):
    """Long before 20 candidates each, and with what was wrong with them."""
    monkeypatch.setattr(tally, "VAIN", 40)
    for kind, reason in (("self-instruct", "no list"), ("documents", "short")):
        told = source(tmp_path, kind, 100, min_words=1 if kind == "self-instruct" else 60)
        with pytest.raises(InputError, match="too few prompts") as error:
            gathered(recipe(talking, told), tmp_path / kind)
        (problem,) = error.value.problems
        assert problem.where == f"prompts: {kind} by {talking}"
        assert problem.found.startswith("0 of 40 candidates kept (0.0%; ")
        assert f"{reason}: " in problem.found
        assert problem.found.endswith("none of the last 40")
        assert not (tmp_path / kind / "prompts.parquet").exists()


def test_more_tokens_than_there_are_positions_names_the_key_of_the_source(tmp_path: Path, talking: Path):
    with pytest.raises(InputError) as error:
        gathered(recipe(talking, source(tmp_path, "evolve", max_tokens=512)), tmp_path / "run")
    assert error.value.problems[0].where == "max_tokens of evolve"


def test_one_of_several_teachers_writes(tmp_path: Path, talking: Path):
    other = talker.save(tmp_path / "other", seed=1)
    made = recipe([talking, other], source(tmp_path, "evolve", by=str(other)))
    assert {p.writer for p in prompts(gathered(made, tmp_path / "run"))} == {str(other)}


def _write(made: str, root: str) -> None:
    torch.set_num_threads(1)
    gather(Recipe.model_validate_json(made), RunDir(root))


def _answers(root: Path) -> dict[str, bytes]:
    with Journal(root / "journal.db") as journal:
        assert journal.refused == 0
        return {key: journal.get(key).raw for (key,) in journal._db.execute("SELECT key FROM answers")}


def _count(path: Path) -> int:
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path)) as db:
        try:
            return db.execute("SELECT count(*) FROM answers").fetchone()[0]
        except sqlite3.OperationalError:  # still being made
            return 0


def test_killed_and_continued_the_prompts_are_the_same(tmp_path: Path, talking: Path):
    made = recipe(talking, source(tmp_path, "evolve", 16), source(tmp_path, "multi-turn", 8, turns=3))
    whole = gathered(made, tmp_path / "whole")
    moments = random.Random(5)
    root, killed = tmp_path / "run", 0
    root.mkdir()
    while True:
        seen = _count(root / "journal.db")
        worker = forked.start(_write, made.model_dump_json(), str(root))
        more = moments.randrange(12, 30)
        while worker.is_alive() and _count(root / "journal.db") < seen + more:
            time.sleep(0.002)
        worker.kill()
        worker.join(60)
        if worker.exitcode == 0:
            break
        assert worker.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 2
    assert _answers(root) == _answers(tmp_path / "whole")
    assert (root / "prompts.parquet").read_bytes() == (whole / "prompts.parquet").read_bytes()


def test_rows_of_every_format_make_the_same_prompts(tmp_path: Path, talking: Path):
    """Personas and tasks from JSONL, CSV, Parquet and a data set, by a template or by a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets = pytest.importorskip("datasets")
    told = [{"who": f"smith {n}", "town": "Ulm"} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (tmp_path / "a.csv").write_text("who,town\n" + "".join(f"{row['who']},{row['town']}\n" for row in told))
    pq.write_table(pa.Table.from_pylist(told), tmp_path / "a.parquet")
    datasets.Dataset.from_list(told).save_to_disk(str(tmp_path / "set"))
    template = {"template": {"prompt": "A {{ who }} of {{ town }}"}}
    found, count = Counter[tuple[str, ...]](), 0
    for rows in ({"kind": "file", "path": "a.jsonl"}, {"kind": "file", "path": "a.csv"},
                 {"kind": "file", "path": "a.parquet"}, {"kind": "dataset", "path": "set"}):  # fmt: skip
        rows = {**rows, "path": str(tmp_path / rows["path"]), **template}
        made = recipe(talking, source(tmp_path, "personas", 6, personas=rows))
        run = gathered(made, tmp_path / f"run{count}")
        count += 1
        found[tuple(p.messages[0].content for p in prompts(run))] += 1
        names = {parent.id for p in prompts(run) for parent in p.parents or ()}
        wanted = Prompt.id_of(made_of("A smith 2 of Ulm"))
        assert wanted in names
    assert list(found.values()) == [count]


def made_of(text: str):
    from limbeck.records import Message

    return (Message(role="user", content=text),)
