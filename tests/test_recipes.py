"""Every recipe that ships runs from end to end, on a tiny teacher and with small numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import prompt_file

import limbeck
from limbeck.recipe import Recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_that_ships_runs(teacher_dir, tmp_path, path):
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    told["teacher"] |= {"model": str(teacher_dir), "precision": "float32"}
    told["prompts"] = [{"kind": "file", "path": str(prompt_file(tmp_path / "prompts.jsonl", 12))}]
    told["collect"] |= {"max_tokens": 8}
    told["evaluate"] = {"held_out": 3, "answers": 1, "answer_tokens": 4}
    told["train"] |= {"precision": "float32", "epochs": 1}
    if told["train"].get("on_policy"):
        told["train"]["on_policy"] |= {"max_tokens": 4}
    told["student"] |= {"model": str(teacher_dir)} if told["student"]["kind"] == "pretrained" else {"layers": 2}
    done = limbeck.run(Recipe.model_validate(told), tmp_path / "run")
    scores = {(score.name, score.subject): score for score in done.scores}
    assert scores["kl_forward", "student"].value is not None
    assert done.report.is_file()
