"""The command line: exit codes, messages, and what it imports. Work itself is tested where it is done."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
import yaml
from command import DECLARED, ROOT, call, python
from conftest import prompt_file, recipe_dict

import limbeck
from limbeck import doctor
from limbeck.cli import QUIET
from limbeck.cli.reference import contexts, reference
from limbeck.errors import VerificationError
from limbeck.ledger.store import Ledger
from limbeck.run import STAGES
from limbeck.starter import starter

STAGE_COMMANDS = ("run", "collect", "curate", "annotate", "train", "evaluate", "report")
RUN_MODULE = importlib.import_module("limbeck.run")


@pytest.fixture
def recipe_path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(starter(), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Commands that run stages quieten libraries by environment variables; other tests must not see them."""
    for name in QUIET:
        monkeypatch.setenv(name, os.environ.get(name, QUIET[name]))


@pytest.fixture
def stub(monkeypatch):
    """Replaces the pipeline by a function."""
    return lambda work: monkeypatch.setattr(RUN_MODULE, "run", work)


def raising(error: BaseException):
    def work(*_: object, **__: object) -> None:
        raise error

    return work


# Help stands alone


ALL = list(contexts())


@pytest.mark.parametrize("context", ALL, ids=lambda c: c.command_path)
def test_every_command_and_option_has_help(context):
    assert context.command.help
    for parameter in context.command.params:
        assert getattr(parameter, "help", None), f"{context.command_path} {parameter.name}"
    shown = call(*context.command_path.split()[1:], "--help")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"Usage: {context.command_path}")


def test_the_promised_commands_are_there():
    paths = {context.command_path for context in ALL}
    assert {f"limbeck {name}" for name in (*STAGE_COMMANDS, "show", "init", "doctor")} <= paths
    assert {"limbeck ledger verify", "limbeck ledger log"} <= paths


def test_docs_hold_the_help_texts():
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"limbeck {limbeck.__version__}\n")


def test_no_command_shows_help_and_an_unknown_one_is_bad_input():
    assert "Commands:" in call().output
    assert call("distil").exit_code == 2
    assert call("run").exit_code == 2


def test_nothing_heavy_is_imported_before_a_command_runs():
    heavy = ("torch", "transformers", "pyarrow", "numpy")
    code = f"import sys, limbeck.cli; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).stdout == "[]\n"


# Running


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_each_stage_command_runs_until_its_stage_with_the_overrides(recipe_path, tmp_path, stub, command):
    told = []
    stub(
        lambda recipe, out, *, until, progress, offline: (
            told.append((recipe, Path(out), until)) or runs.make_run(out, until="collect")
        )
    )
    result = call(
        command,
        recipe_path,
        "--out",
        tmp_path / "run",
        "--set",
        "train.epochs=3",
        "--set",
        "seed=7",
        "--json",
    )
    assert result.exit_code == 0, result.output
    (recipe, out, until), stages = told[0], [stage.name for stage in STAGES]
    assert (recipe.train.epochs, recipe.seed, out) == (3, 7, tmp_path / "run")
    assert until == (stages[-1] if command == "run" else command)
    assert until in stages


def test_a_finished_run_says_where_everything_is(recipe_path, tmp_path, stub):
    stub(lambda recipe, out, **_: runs.make_run(out))
    result = call("run", recipe_path, "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"{tmp_path / 'run' / 'student'}\n" in result.stdout
    assert f"{tmp_path / 'run' / 'report.html'}\n" in result.stdout
    assert re.search(r"agreement_top1 +student +0.5 +0.4 to 0.6 +2 +share", result.stdout)
    assert re.search(r"kl_forward +student +not scored +no held-out answers", result.stdout)


BAD = {
    "train: {epoch: 2}": ["train.epoch", "epochs"],
    "train: {epochs: many}": ["train.epochs", "many"],
    "train: [1]": ["train"],
    "seed: {": ["YAML"],
    "student: {kind: shrunk}": ["student", "shrunk", "pruned"],
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_recipe_is_one_screen_and_writes_nothing(recipe_path, tmp_path, text):
    base = {k: v for k, v in yaml.safe_load(starter()).items() if k != text.partition(":")[0]}
    recipe_path.write_text(yaml.safe_dump(base) + text + "\n", encoding="utf-8")
    result = call("run", recipe_path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(word in result.stderr for word in [*BAD[text], str(recipe_path), "found:", "expected:", "remedy:"])
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") < 25
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]


def test_a_missing_recipe_and_a_bad_override_are_bad_input(recipe_path, tmp_path):
    result = call("run", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr
    result = call("run", recipe_path, "--out", tmp_path / "run", "--set", "train.epoch=1")
    assert result.exit_code == 2
    assert "train.epoch" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_made_by_another_recipe_is_refused_with_both_values(tmp_path, teacher_dir):
    run = runs.make_run(tmp_path / "run", until="collect")
    before = sorted(os.listdir(run))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_dict(teacher_dir, prompt_file(tmp_path / "p.jsonl", 40)) | {"seed": 5}))
    result = call("run", recipe, "--out", run)
    assert result.exit_code == 2, result.output
    assert re.search(r"recipe.yaml: seed\n +found: +0\n +expected: 5\n +remedy: ", result.stderr)
    assert sorted(os.listdir(run)) in (before, sorted([*before, ".lock"]))


@pytest.mark.parametrize(("was", "moved"), [("old", "new"), ("here/it", "there/it"), ("a/b/c", "d e")])
def test_what_was_moved_is_gone_on_with_as_the_error_says(tmp_path, teacher_dir, was, moved):
    """Each path is named with where it lies now; after the commands of the remedies nothing is done anew."""
    old, new = tmp_path / was, tmp_path / moved
    shutil.copytree(teacher_dir, old / "teacher")
    prompt_file(old / "p.jsonl", 40)
    (old / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(Path("teacher"), Path("p.jsonl"))))
    words = ("curate", "{}/recipe.yaml", "--out", "{}/run")
    assert call(*(word.format(old) for word in words)).exit_code == 0
    new.parent.mkdir(exist_ok=True)
    old.rename(new)
    if was == "a/b/c":
        shutil.rmtree(tmp_path / "a")
    with Ledger(new / "run" / "ledger.db", read_only=True) as ledger:
        before = ledger.entries()
    told = call(*(word.format(new) for word in words))
    assert told.exit_code == 2
    commands = set[str]()
    for key, name in (("prompts.0.path", "p.jsonl"), ("teacher.model", "teacher")):
        place = rf"recipe.yaml: {key}\n +found: +{old}/{name}\n +expected: {new}/{name}\n +remedy: [^`]+`([^`]+)`"
        remedy = re.search(place, told.stderr)
        assert remedy, told.stderr
        commands.add(remedy[1])
    (command,) = commands
    subprocess.run(command, shell=True, check=True)
    again = call("curate", old / "recipe.yaml", "--out", new / "run")
    assert again.exit_code == 0, again.stderr
    with Ledger(new / "run" / "ledger.db", read_only=True) as ledger:
        assert ledger.entries() == before


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "weights.bin"),
    sqlite3.OperationalError("database or disk is full"),
    Exception("I/O error: No space left on device (os error 28)"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 215040 vs 214928"),
    RuntimeError("basic_ios::clear: iostream error"),
])  # fmt: skip
def test_a_full_disk_is_told_as_such_whoever_noticed_it(recipe_path, tmp_path, stub, error):
    stub(raising(error))
    result = call("run", recipe_path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "the disk is full" in result.stderr
    assert "run the same command again" in result.stderr


def test_a_damaged_checkpoint_is_no_full_disk(recipe_path, tmp_path, stub):
    """torch names the same source file whether it fails to write or to read."""
    path = tmp_path / "step.pt"
    torch.save(torch.zeros(2), path)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"3\n", b"x\n", 1))  # the version of the archive's format, as text
    stub(lambda *_, **__: torch.load(path, weights_only=True))
    error = call("run", recipe_path, "--out", tmp_path / "run").exception
    assert isinstance(error, RuntimeError)
    assert "inline_container.cc" in str(error)


def test_a_place_that_may_not_be_written_is_bad_input(recipe_path, tmp_path, stub):
    (tmp_path / "file").write_text("mine")
    stub(lambda recipe, out, **_: Path(out).mkdir())
    result = call("run", recipe_path, "--out", tmp_path / "file" / "run")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert str(tmp_path / "file" / "run") in result.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_place_that_cannot_come_to_be_is_bad_input_and_a_file_missing_below_it_a_bug(recipe_path, tmp_path, stub):
    stub(lambda recipe, out, **_: Path(out).mkdir(parents=True))
    for command in ("run", "collect"):
        result = call(command, recipe_path, "--out", "/proc/nothing/run")
        assert result.exit_code == 2, result.exception
        assert "/proc/nothing" in result.stderr
    stub(lambda recipe, out, **_: (Path(out) / "lost.json").read_text())
    assert isinstance(call("run", recipe_path, "--out", tmp_path).exception, FileNotFoundError)


def test_a_failed_check_is_exit_code_1(recipe_path, tmp_path, stub):
    stub(raising(VerificationError("the ledger was changed")))
    result = call("train", recipe_path, "--out", tmp_path / "run")
    assert (result.exit_code, result.stderr) == (1, "limbeck: the ledger was changed\n")


def test_a_bug_keeps_its_traceback(recipe_path, tmp_path, stub):
    stub(raising(ZeroDivisionError("a bug")))
    assert isinstance(call("run", recipe_path, "--out", tmp_path / "run").exception, ZeroDivisionError)


@pytest.mark.parametrize("error", [
    ModuleNotFoundError("No module named 'torch'", name="torch"),
    ModuleNotFoundError("No module named 'huggingface_hub'", name="huggingface_hub"),
    ImportError("AutoModelForCausalLM requires the PyTorch library but it was not found."),
])  # fmt: skip
def test_a_missing_extra_is_named_with_the_command_that_installs_it(recipe_path, tmp_path, stub, monkeypatch, error):
    monkeypatch.setattr(doctor, "requires", lambda _: DECLARED)
    monkeypatch.setattr(doctor, "_installed", lambda _: None)
    stub(raising(error))
    result = call("run", recipe_path, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.exception
    assert "pip install 'limbeck[train]'" in result.stderr


def test_an_import_that_no_extra_has_keeps_its_traceback(recipe_path, tmp_path, stub, monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: DECLARED)
    stub(raising(ModuleNotFoundError("No module named 'limbeck.typo'", name="limbeck.typo")))
    assert isinstance(call("run", recipe_path, "--out", tmp_path / "run").exception, ModuleNotFoundError)


SLOW = """
import signal, sys, time
import limbeck.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
def work(*_, **__):
    print("working", flush=True)
    time.sleep(60)
sys.modules["limbeck.run"].run = work
limbeck.cli.main()
"""


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(recipe_path, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, "run", str(recipe_path), "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as child:  # fmt: skip
        assert child.stdout
        assert child.stderr
        assert child.stdout.readline() == "working\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130
        assert child.stderr.read() == "interrupted; run the same command again to go on\n"
