"""The whole way: twice is once, kill -9 at any moment changes nothing, and the real quickstart, shortened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import forked
import pytest
from conftest import prompt_file, recipe_dict

import limbeck
from limbeck.ledger import verify
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe
from limbeck.records import Completion, Prompt, Verdict
from limbeck.run import STAGES
from limbeck.tables import read_records

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("LIMBECK_TEST_KILLS", "5"))
"""How often the run is killed."""


def collected(run: Path) -> list[Completion]:
    """The answers, without when they came."""
    epoch = {"created": "1970-01-01T00:00:00Z"}
    return [
        Completion.model_validate(c.model_dump() | epoch) for c in read_records(run / "completions.parquet", Completion)
    ]


def work(recipe: str, out: str) -> None:
    limbeck.run(Recipe.model_validate_json(recipe), out)


@pytest.fixture(scope="module")
def recipe(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    base = tmp_path_factory.mktemp("whole")
    values = recipe_dict(teacher_dir, prompt_file(base / "prompts.jsonl", 40))
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    limbeck.run(recipe, out)
    return out


def entries(run: Path) -> list[str]:
    from limbeck.ledger.store import Ledger

    with Ledger(run / "ledger.db", read_only=True) as ledger:
        return [entry.stage for entry in ledger.entries()]


def test_a_run_leaves_what_is_promised(finished):
    for name in (
        "recipe.yaml",
        "prompts.parquet",
        "completions.parquet",
        "verdicts.parquet",
        "examples",
        "signals",
        "student",
        "scores.json",
        "ledger.db",
        "report.html",
        "student/README.md",
    ):
        assert (finished / name).exists(), name
    assert not (finished / "checkpoints").exists()
    assert [name for name in entries(finished) if name != "checkpoint"] == [stage.name for stage in STAGES]
    assert entries(finished).count("checkpoint") == 3
    scores = {(s["name"], s["subject"]): s for s in json.loads((finished / "scores.json").read_text())}
    for name in ("agreement_top1", "kl_forward", "perplexity_on_teacher"):
        for subject in ("student", "before", "teacher"):
            score = scores[name, subject]
            assert set(score) == {"name", "subject", "value", "low", "high", "n", "unit", "seed", "unscored"}
            assert score["n"] == 6
    assert scores["agreement_top1", "teacher"]["value"] == 1
    assert verify(finished).ok


def test_running_again_does_nothing_again(recipe, finished):
    before = entries(finished)
    limbeck.run(recipe, finished)
    assert entries(finished) == before


def test_held_out_prompts_are_never_trained_on(finished):
    from limbeck.render.examples import read_examples

    held = {p.id for p in read_records(finished / "prompts.parquet", Prompt) if p.split == "held_out"}
    examples = read_examples(finished / "examples")
    assert held
    assert not held & {e.prompt_id for e in examples.train}
    assert {e.prompt_id for e in examples.held_out} <= held


def test_a_damaged_output_is_made_again(recipe, finished, tmp_path):
    import shutil

    run = shutil.copytree(finished, tmp_path / "run")
    (run / "scores.json").write_text("[]")
    assert not verify(run).ok
    limbeck.run(recipe, run)
    assert (run / "scores.json").read_bytes() == (finished / "scores.json").read_bytes()
    assert verify(run).ok


def test_killed_at_random_moments_the_run_ends_the_same(recipe, finished, tmp_path):
    """kill -9 of the whole process; each time a part of what a whole run takes, so that kills come in every stage."""
    out, chance = tmp_path / "run", random.Random(0)
    forked.start(os.getpid).join()  # pays for the imports of the fork server
    begun = time.monotonic()
    whole = forked.start(work, recipe.model_dump_json(), str(tmp_path / "timed"))
    whole.join()
    seconds = time.monotonic() - begun
    assert whole.exitcode == 0
    killed = 0
    for _ in range(KILLS):
        process = forked.start(work, recipe.model_dump_json(), str(out))
        process.join(chance.uniform(0, 2 / KILLS) * seconds)
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.join()
    limbeck.run(recipe, out)
    assert killed > KILLS / 2
    assert collected(out) == collected(finished)
    assert [*read_records(out / "verdicts.parquet", Verdict)] == [*read_records(finished / "verdicts.parquet", Verdict)]
    for name in ("examples/examples.parquet", "scores.json", "answers.json", "student/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    assert verify(out).ok


def test_the_real_quickstart_shortened(tmp_path):
    """The default teacher from the package registry, with everything made small but the teacher."""
    short = [
        "prompts.0.count=16",
        "collect.concurrency=48",
        "collect.max_tokens=16",
        "student.layers=2",
        "train.epochs=1",
        "evaluate.held_out=4",
        "evaluate.answers=1",
        "evaluate.answer_tokens=8",
    ]
    result = limbeck.run(load_recipe(ROOT / "recipes" / "quickstart.yaml", short), tmp_path / "run")
    values = {(s.name, s.subject): s.value for s in result.scores}
    assert values["agreement_top1", "teacher"] == 1
    assert values["kl_forward", "teacher"] == pytest.approx(0, abs=1e-6)
    losses = [step["loss"] for step in json.loads((tmp_path / "run" / "training.json").read_text())["steps"]]
    assert losses[-1] < losses[0]
    assert values["kl_forward", "student"] < values["kl_forward", "before"]
    assert verify(tmp_path / "run").ok
