"""The student's answers to held-out prompts, before and after training.

A greedy small model repeats itself, so answers are drawn as the teacher's were, at the recipe's temperature
and top_p. Every prompt has its own seed, the same for both subjects: their answers differ by the models
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from limbeck import models
from limbeck.errors import Problem, StaleError
from limbeck.evaluate.answers import Answers, Drawn
from limbeck.generate import Generated, Sampling, sample_batch
from limbeck.progress import Line
from limbeck.recipe import Recipe
from limbeck.records import Completion, Example
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed
from limbeck.tables import read_records

WRITERS = {"before": "beginning", "student": "student"}
"""Who answers, and where in RUN it lies."""


class _Said(NamedTuple):
    text: str
    cut_off: bool


def answers_of(recipe: Recipe, run: RunDir, examples: Sequence[Example], line: Line) -> list[Answers]:
    """Answers to the prompts of these examples, in their order. Prompts too long to leave room for an answer
    in the model's positions are left out.

    Raises `StaleError` where an example's completion is not in RUN/completions.parquet.
    """
    config = models.load_config(str(run / "beginning"), recipe.train.precision)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    asked = [e for e in examples if len(_prompt(e)) + recipe.evaluate.answer_tokens <= positions]
    if not asked:
        return []
    parents = _completions(run / "completions.parquet", asked)
    said = {who: _write(recipe, run / place, asked, line) for who, place in WRITERS.items()}
    return [
        Answers(
            prompt_id=example.prompt_id,
            messages=parents[example.completion].messages,
            teacher=parents[example.completion].text,
            before=before.text,
            student=student.text,
            teacher_name=example.teacher,
            cut_off=tuple(who for who, one in (("before", before), ("student", student)) if one.cut_off),
            drawn=_drawn(recipe, example),
        )
        for example, before, student in zip(asked, said["before"], said["student"], strict=True)
    ]


def _write(recipe: Recipe, path: Path, examples: Sequence[Example], line: Line) -> list[_Said]:
    model = models.load_model(str(path), recipe.train.precision, models.processor().device)
    words = models.load_tokenizer(str(path))
    settings = recipe.evaluate

    def done(_: int, __: Generated) -> None:
        line.advance()

    answers = sample_batch(
        model,
        [_prompt(e) for e in examples],
        Sampling(settings.answer_tokens, recipe.collect.temperature, recipe.collect.top_p),
        stop_ids=models.stop_ids(model, words),
        seeds=[_drawn(recipe, e).seed for e in examples],
        rows=recipe.collect.concurrency,
        on_done=done,
    )
    return [
        _Said(str(words.decode(list(a.tokens), skip_special_tokens=True)), a.finish_reason == "length") for a in answers
    ]


def _prompt(example: Example) -> list[int]:
    """The tokens up to the answer, the header of the assistant's turn included."""
    return example.tokens_T[: int(example.mask_T.argmax())].tolist()


def _drawn(recipe: Recipe, example: Example) -> Drawn:
    return Drawn(
        max_tokens=recipe.evaluate.answer_tokens,
        temperature=recipe.collect.temperature,
        top_p=recipe.collect.top_p,
        seed=derive_seed(recipe.seed, "evaluate", "answer", example.prompt_id) >> 10,
    )


def _completions(path: Path, examples: Sequence[Example]) -> Mapping[str, Completion]:
    """The parents of the examples, by `Completion.id`."""
    prompts, wanted = {e.prompt_id for e in examples}, {e.completion for e in examples}
    found = {c.id: c for c in read_records(path, Completion) if c.prompt_id in prompts}
    if missing := sorted(wanted - found.keys()):
        raise StaleError(
            "the examples do not come from these completions",
            [
                Problem(
                    str(path),
                    f"no completion {digest}",
                    "the parent of an example",
                    "run the same recipe again",
                )
                for digest in missing
            ],
        )
    return found
