"""What training writes, counted beforehand, against what a real training leaves on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import transformers
import yaml
from command import call
from conftest import prompt_file, recipe_dict
from watched import Watched

from limbeck import models
from limbeck.errors import DiskFullError
from limbeck.recipe import Recipe
from limbeck.rundir import RunDir
from limbeck.student import begin
from limbeck.train.room import CHECKPOINTS, refuse_without_room, room_of
from limbeck.train.stage import train


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the disk say that so many bytes are free."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))


def bytes_of(directory: Path, *suffixes: str) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.suffix in suffixes)


CONFIGURATION = 40_000
"""Bytes of headers and small states beside the weights of a tiny model."""


@pytest.mark.parametrize(("every", "kept"), [(2, CHECKPOINTS), (1000, 1)])
def test_what_a_training_writes_is_what_was_said(tiny_run: Path, tmp_path: Path, every: int, kept: int):
    """No less, and no more than headers beside it; and one checkpoint at the end however few are asked for."""
    shutil.copytree(tiny_run, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    recipe = run.recipe()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": every})})
    room = room_of(recipe)
    train(recipe, run)
    assert 0 <= bytes_of(run / "beginning", ".safetensors") - room.beginning < CONFIGURATION
    assert 0 <= bytes_of(run / "student", ".safetensors") - room.student < CONFIGURATION
    checkpoints = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert len(checkpoints) == kept
    for checkpoint in checkpoints:
        assert 0 <= bytes_of(checkpoint, ".safetensors", ".pt") - room.checkpoint < CONFIGURATION


@pytest.mark.parametrize(
    "student",
    [
        {"kind": "pruned", "layers": 1},
        {"kind": "pruned", "attention_heads": 2, "key_value_heads": 1},
        {"kind": "pruned", "layers": 3, "intermediate_size": 32},
        {"kind": "pretrained", "model": "small"},
    ],
    ids=str,
)
def test_every_kind_of_student_is_counted(tiny_run: Path, tmp_path: Path, student: dict):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("beginning"))
    values = RunDir(tiny_run).recipe().model_dump(mode="json")
    if student["kind"] == "pretrained":
        student = student | {"model": str(tiny.save(tmp_path / "small", layers=3, seed=1))}
    recipe = Recipe.model_validate(values | {"student": student})
    models.release()
    begin.begin(recipe, RunDir(tmp_path / "run"))
    found = bytes_of(tmp_path / "run" / "beginning", ".safetensors")
    assert 0 <= found - room_of(recipe).beginning < CONFIGURATION


def test_a_disk_without_room_is_told_before_anything_is_spent(tmp_path: Path, teacher_dir: Path, disk):
    recipe = tmp_path / "recipe.yaml"
    values = recipe_dict(teacher_dir, prompt_file(tmp_path / "p.jsonl", 40))
    recipe.write_text(yaml.safe_dump(values))
    room = room_of(Recipe.model_validate(values))
    disk(room.least - 1)
    out = tmp_path / "below" / "run"
    told = call("run", recipe, "--out", out)
    assert told.exit_code == 2
    assert not out.exists()
    assert f"{room.least - 1:,} bytes free" in told.stderr
    assert f"at least {room.least:,} bytes: " in " ".join(told.stderr.split())
    assert call("curate", recipe, "--out", out).exit_code == 0  # writes no weights


@pytest.mark.parametrize(("short", "says"), [(1, True), (0, False)])
def test_a_disk_that_may_not_do_is_spoken_of(tiny_run: Path, disk, short: int, says: bool):
    recipe, watched = RunDir(tiny_run).recipe(), Watched()
    room = room_of(recipe)
    disk(room.most - short)
    refuse_without_room(recipe, "nowhere/run", watched)
    assert bool(watched.told) == says
    assert all(
        re.search(rf"{room.most - 1:,} bytes free .* may need {room.most:,}:", str(text)) for text in watched.told
    )
    disk(room.least - 1)
    with pytest.raises(DiskFullError):
        refuse_without_room(recipe, "nowhere/run", watched)


def test_an_adapter_leaves_small_checkpoints(tiny_run: Path):
    values = RunDir(tiny_run).recipe().model_dump(mode="json")
    values["train"]["adapter"] = {"rank": 2}
    room = room_of(Recipe.model_validate(values))
    assert room.checkpoint == 0
    assert room.least == room.most == room.beginning + room.student


def test_what_is_no_language_model_is_left_to_whoever_loads_it(tiny_run: Path, tmp_path: Path, disk):
    tiny.save(tmp_path / "other", layers=1)
    transformers.T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path / "other")
    values = RunDir(tiny_run).recipe().model_dump(mode="json")
    values["student"] = {"kind": "pretrained", "model": str(tmp_path / "other")}
    disk(0)
    refuse_without_room(Recipe.model_validate(values), tmp_path, watched := Watched())
    assert watched.told == []
