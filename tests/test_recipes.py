"""Every recipe that ships runs from end to end, on a tiny teacher and with small numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import talker
import yaml
from conftest import prompt_file
from typer.testing import CliRunner
from verifier import second

import limbeck
from limbeck.cli import app
from limbeck.collect.journal import Journal
from limbeck.recipe import EndpointTeacher, Recipe
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.recipe_file import load_recipe, schema_text
from limbeck.records import Prompt
from limbeck.starter import starter
from limbeck.tables import read_records
from limbeck.testing import Server, Settings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ALL = sorted(RECIPES.glob("*.yaml"))
WRITTEN = [path for path in ALL if path.stem in ("documents", "evolve", "self-instruct")]


@pytest.mark.parametrize("path", [path for path in ALL if path not in WRITTEN], ids=lambda path: path.name)
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


def small(path: Path, teacher: str, url: str, student: Path) -> Recipe:
    """A recipe that has its prompts written, with its own seeds or documents, and everything else small."""
    told = load_recipe(path).model_dump(mode="json", exclude_unset=True)
    local = told["teacher"]["kind"] == "local"
    told["teacher"] |= (
        {"model": teacher, "precision": "float32"} if local else {"base_url": f"{url}/v1", "model": "toy"}
    )
    (source,) = told["prompts"]
    source |= {"count": 12, "min_words": 1, "max_tokens": 60 if local else 400}
    if source["kind"] == "documents":
        source["words"] = 6  # calibration looks at the first 96 tokens
    told["collect"] |= {"max_tokens": 12 if local else 200, "concurrency": 16}
    told["evaluate"] = {"held_out": 3, "answers": 1, "answer_tokens": 4}
    told["train"] |= {"precision": "float32", "epochs": 1}
    told["student"] |= {"model": str(student)} if told["student"]["kind"] == "pretrained" else {"layers": 1}
    return Recipe.model_validate(told)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_a_recipe_that_has_its_prompts_written_runs(teacher_dir: Path, tmp_path: Path, path: Path):
    talking = talker.save(tmp_path / "talker")
    with Server(Settings(words=12, spread=0.5, items=4)) as server:
        recipe = small(path, str(talking), server.url, teacher_dir)
        (source,) = recipe.prompts
        assert isinstance(source, WrittenPrompts)
        done = limbeck.run(recipe, tmp_path / "run")
    rows = list(read_records(tmp_path / "run" / "prompts.parquet", Prompt))
    assert len(rows) == 12
    assert {(row.writer, row.source) for row in rows} == {
        (recipe.teachers[0].name, f"{path.stem}:{recipe.teachers[0].name}")
    }
    name = "documents.jsonl" if path.stem == "documents" else "seeds.jsonl"
    made_from = [{p.source for p in row.parents or () if p.kind != "prompt"} for row in rows]
    assert made_from == [{str(RECIPES / "data" / name)}] * len(rows)
    scored = "perplexity_on_teacher" if isinstance(recipe.teachers[0], EndpointTeacher) else "kl_forward"
    scores = {(score.name, score.subject): score for score in done.scores}
    assert scores[scored, "student"].value is not None
    assert done.report.is_file()
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")]).output
    (line,) = [line for line in shown.splitlines() if line.startswith(f"{path.stem}:")]
    told = re.fullmatch(r"\S+ +(\d+) +(\d+) +12 +(.*)", line)
    assert told is not None
    dropped = sum(map(int, re.findall(r": (\d+)", told[3])))
    assert int(told[2]) == 12 + dropped
    with Journal(tmp_path / "run" / "journal.db") as journal:
        assert len(journal) == int(told[1]) + 12  # each prompt has one answer
    _a_stranger_sees_parents(tmp_path, rows)


def _a_stranger_sees_parents(folder: Path, prompts: list[Prompt]) -> None:
    """Of an example: its prompt, what a model wrote that from, and who wrote. Both verifiers accept run and proofs."""
    run, known = folder / "run", {prompt.id: prompt for prompt in prompts}
    assert CliRunner().invoke(app, ["ledger", "verify", str(run)]).exit_code == 0
    assert second.main([str(run)]) == 0
    for row in range(3):
        said = {}
        for field in ("prompt", "parents", "writers"):
            proof = folder / f"{row}-{field}.json"
            words = ["ledger", "disclose", str(run), "--row", str(row), "--field", field, "--out", str(proof)]
            assert CliRunner().invoke(app, words).exit_code == 0
            assert CliRunner().invoke(app, ["ledger", "check", str(proof)]).exit_code == 0
            assert second.main([str(proof)]) == 0
            said[field] = json.loads(proof.read_bytes())["value"]
        prompt = known[said["prompt"]]
        assert said["parents"][0][0] == "completion"
        assert said["parents"][1:] == [[parent.kind, parent.id] for parent in prompt.parents or ()] != []
        assert ["prompt", prompt.writer] in said["writers"]


def test_what_explains_a_key_speaks_yaml():
    """Whoever writes a recipe writes null, true and false."""
    described = [line for line in starter().splitlines() if "#" in line] + schema_text().splitlines()
    assert any("null" in line for line in described)
    assert [line for line in described if re.search(r"\b(None|True|False)\b", line)] == []
