"""Fixtures that several test files share: a tiny teacher, a recipe for it, and a run of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: a second thread costs more than it brings
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LIMBECK_COMPILE"] = "0"  # tiny models: compiling takes longer than it brings; its own tests ask for it
if "LIMBECK_TEST_HOME" not in os.environ:  # processes that a test starts share it
    _keys = tempfile.TemporaryDirectory(prefix="limbeck-keys-")
    os.environ["LIMBECK_TEST_HOME"] = _keys.name
os.environ["LIMBECK_HOME"] = os.environ["LIMBECK_TEST_HOME"]  # never the keys of who runs the tests

WORDS = (
    "sea",
    "fox",
    "dog",
    "duck",
    "egg",
    "teacher",
    "student",
    "day",
    "Paris",
    "France",
    "answer",
    "print",
)


LONGEST = (
    *("ranks", "run", "ray", "learning", "endpoints_money", "recipes", "batches_killed", "collect", "cli_reading"),
    *("endpoints_killed", "endpoints_storm", "export_gguf", "hostile", "estimate", "train", "adapter", "served"),
    *("written_local", "amx_training", "compiled", "student", "store", "batches"),
)
"""Files of tests that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long file begun last would leave the other worker idle: they come first."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher in Hugging Face layout."""
    import tiny

    return tiny.save(tmp_path_factory.mktemp("teacher"))


def prompt_file(path: Path, count: int) -> Path:
    """A JSONL file of `count` different prompts."""
    rows = [{"prompt": f"Tell me about the {WORDS[i % len(WORDS)]}, number {i}."} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_dict(teacher: Path, prompts: Path) -> dict:
    """A recipe that runs in seconds: two layers of the tiny teacher, in float32."""
    return {
        "name": "tiny",
        "teacher": {"kind": "local", "model": str(teacher), "terms": "own-model", "precision": "float32"},
        "prompts": [{"kind": "file", "path": str(prompts)}],
        "collect": {"max_tokens": 20, "temperature": 0.8, "concurrency": 16},
        "curate": {"loops": False, "cut_off": "keep"},
        "student": {"kind": "pruned", "layers": 2},
        "signal": {"kind": "sampled", "tau": 0.02},
        "train": {"epochs": 2, "learning_rate": 0.003, "precision": "float32", "checkpoint_every": 2},
        "evaluate": {"held_out": 6, "answers": 2, "answer_tokens": 8},
    }


@pytest.fixture(scope="session")
def tiny_run(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN directory that has come as far as `student`: ready to train. Copy it before writing into it."""
    import limbeck

    base = tmp_path_factory.mktemp("run")
    recipe = limbeck.Recipe.model_validate(recipe_dict(teacher_dir, prompt_file(base / "prompts.jsonl", 40)))
    limbeck.run(recipe, base / "run", until="student")
    return base / "run"


@pytest.fixture(scope="session")
def finished_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN directory that has come to its report. Copy it before writing into it."""
    import limbeck
    from limbeck.rundir import RunDir

    run = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(tiny_run, run)
    limbeck.run(RunDir(run).recipe(), run)
    return run


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher whose tokenizer is the test server's toy vocabulary."""
    import served

    return served.save_teacher(tmp_path_factory.mktemp("toy-teacher"))


@pytest.fixture
def quick_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, and short waits between tries."""
    from limbeck.signal import annotate, endpoint

    monkeypatch.setattr(annotate, "_SHARD_MIN", 40)
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
