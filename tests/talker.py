"""A teacher of a few thousand parameters that talks in plain letters, and short ways to ask it."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch

from limbeck.collect.local import LocalTeacher
from limbeck.collect.prompts import gather
from limbeck.recipe import Recipe
from limbeck.records import Completion, Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records


def save(directory: Path, *, seed: int = 0) -> Path:
    """A teacher of random words in plain letters, that ends its turn after about a dozen tokens.

    The first hidden dimension is the same large number everywhere, so its column of the head is a bias.
    """
    words = tiny.tokenizer()
    model = tiny.llama(len(words), layers=2, seed=seed, tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20
        bias = torch.full((len(words),), -40.0)
        plain = [i for i in range(len(words)) if words.decode([i]).strip("abcdefghijklmnopqrstuvwxyz .?") == ""]
        bias[plain] = 0.0
        bias[words.eos_token_id] = 2.5
        model.lm_head.weight[:, 0] = bias / 4
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def prompts_file(path: Path, texts: list[str]) -> dict:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return {"kind": "file", "path": str(path), "licence": "MIT"}


def recipe(teacher: Path | list[Path], *prompts: dict, seed: int = 0, **settings) -> Recipe:
    each = [
        {"model": str(d), "terms": "own-model", "precision": "float32"} for d in [teacher, *()] if isinstance(d, Path)
    ]
    if isinstance(teacher, list):
        each = [{"model": str(d), "terms": "own-model", "precision": "float32"} for d in teacher]
    return Recipe.model_validate(
        {
            "name": "t",
            "seed": seed,
            "teacher": each,
            "prompts": prompts or [own(4)],
            "collect": {"max_tokens": 12, "temperature": 1.0, "concurrency": 4, **settings},
            "student": {"kind": "pruned", "layers": 1},
            "evaluate": {"held_out": 2},
        }
    )


def own(count: int, **more) -> dict:
    """A source of self-written prompts."""
    return {"kind": "self-prompt", "count": count, "max_tokens": 24, "top_p": 1.0, **more}


def gathered(made: Recipe, root: Path) -> RunDir:
    root.mkdir(exist_ok=True)
    gather(made, RunDir(root))
    return RunDir(root)


def completions(run: RunDir) -> list[Completion]:
    return list(read_records(run / "completions.parquet", Completion))


def prompts(run: RunDir) -> list[Prompt]:
    return list(read_records(run / "prompts.parquet", Prompt))


def teacher_of(made: Recipe) -> LocalTeacher:
    return LocalTeacher(made.teachers[0], made.collect, made.seed)
