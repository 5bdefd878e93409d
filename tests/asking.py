"""Short ways to collect from the test server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limbeck.collect.collect import collect
from limbeck.collect.prompts import gather
from limbeck.recipe import Recipe
from limbeck.records import Completion
from limbeck.rundir import RunDir
from limbeck.tables import read_records


def questions(count: int) -> list[str]:
    """Different prompts."""
    return [f"What is {n} and {n + 1}?" for n in range(count)]


def made(url: str, prompts: dict, *, kind: str = "openai", teacher: dict[str, Any] | None = None, **collect_) -> Recipe:
    """A recipe with a teacher at the server."""
    base = {"openai": f"{url}/v1", "responses": f"{url}/v1", "anthropic": url}[kind]
    more = {"api": "responses"} if kind == "responses" else {}
    kind = "openai" if kind == "responses" else kind
    return Recipe.model_validate(
        {
            "name": "asked",
            "teacher": {
                "kind": kind,
                "base_url": base,
                "model": "toy",
                "terms": "own-model",
                **more,
                **(teacher or {}),
            },
            "prompts": [prompts],
            "collect": {"max_tokens": 300, "concurrency": 16, **collect_},
            "student": {"kind": "pretrained", "model": "nowhere"},
            "signal": {"kind": "text"},
            "train": {"loss": "cross_entropy"},
            "evaluate": {"held_out": 2},
        }
    )


def ask(recipe: Recipe, root: Path, *, offline: bool = False) -> tuple[dict[str, Any], list[Completion]]:
    """Gather and collect; the facts and the completions."""
    run = RunDir(root)
    run.offline = offline
    root.mkdir(exist_ok=True)
    if not (root / "prompts.parquet").exists():
        gather(recipe, run)
    facts: dict[str, Any] = collect(recipe, run)
    return facts, list(read_records(root / "completions.parquet", Completion))


def work(recipe: str, root: str) -> None:
    """The same in a process of its own."""
    ask(Recipe.model_validate_json(recipe), Path(root))


def file_of(tmp_path: Path, count: int) -> dict:
    """A source with so many prompts."""
    path = tmp_path / f"p{count}.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions(count)))
    return {"kind": "file", "path": str(path), "licence": "MIT"}
