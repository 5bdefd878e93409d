"""The evaluation stage: RUN/beginning, RUN/student and the held-out RUN/examples to RUN/scores.json and
RUN/answers.json.

Three subjects are held against the live teacher on prompts that nothing was trained on: the student, the
student before it was trained, and the teacher itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue
from transformers import PreTrainedModel

from limbeck import models
from limbeck.collect.split import rank
from limbeck.errors import ModelError
from limbeck.evaluate.answers import write_answers
from limbeck.evaluate.compare import shared_width, sum_over_example, warm_up
from limbeck.evaluate.continuation import WRITERS, answers_of
from limbeck.evaluate.figures import Row, Subject, reading_interval, scores_of
from limbeck.evaluate.scores import write_scores
from limbeck.evaluate.statistics import LEVEL, RESAMPLES
from limbeck.progress import Line
from limbeck.recipe import EndpointTeacher, FileTeacher, LocalTeacher, Recipe
from limbeck.records import Example, Score
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed

_SUBJECTS: tuple[Subject, ...] = ("before", "student", "teacher")


@dataclass
class _Measured:
    rows: dict[Subject, list[Row]] = field(default_factory=lambda: {subject: [] for subject in _SUBJECTS})
    models: dict[str, JsonValue] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a teacher could not be asked, by its name."""

    @property
    def no_teacher(self) -> str | None:
        """Why some examples have no live teacher, or None."""
        return "; ".join(f"teacher {name}: {why}" for name, why in self.missing.items()) or None


def evaluate(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Measures the held-out prompts, writes RUN/scores.json and RUN/answers.json, returns the facts for the
    ledger.

    Scores rest on the first `evaluate.held_out` held-out prompts in the order of
    `limbeck.collect.split.rank` whose answers were kept. A teacher whose weights cannot be had leaves its
    figures unscored, with the reason.
    """
    models.release()
    chosen = choose(read_examples(run / "examples").held_out, recipe.evaluate.held_out)
    first: dict[str, Example] = {}
    for example in chosen:
        first.setdefault(example.prompt_id, example)
    shown = list(first.values())[: recipe.evaluate.answers]
    seed = derive_seed(recipe.seed, "evaluate", "bootstrap") >> 10
    total = len(_SUBJECTS) * len(chosen) + len(WRITERS) * len(shown)
    with run.progress.line("evaluate", total, "answers") as line:
        measured = _measure(recipe, run, chosen, line)
        line.note("side by side")
        answers = answers_of(recipe, run, shown, line)
    models.release()
    scores = [
        score
        for subject in _SUBJECTS
        for score in scores_of(subject, measured.rows[subject], seed=seed, no_teacher=measured.no_teacher)
    ]
    write_scores(run / "scores.json", scores)
    write_answers(run / "answers.json", answers)
    return _facts(recipe, chosen, measured, scores, seed) | {"side_by_side": len(answers)}


def choose(held_out: Sequence[Example], count: int) -> list[Example]:
    """All examples of the first `count` prompts by rank, prompt by prompt, each prompt's in the order
    given.
    """
    prompts = sorted({e.prompt_id for e in held_out}, key=rank)[:count]
    place = {prompt: i for i, prompt in enumerate(prompts)}
    return sorted((e for e in held_out if e.prompt_id in place), key=lambda e: place[e.prompt_id])


def _measure(recipe: Recipe, run: RunDir, chosen: Sequence[Example], line: Line) -> _Measured:
    """Each teacher is loaded once, the subjects one at a time next to it; each example meets the teacher
    that wrote it.
    """
    measured = _Measured()
    words = models.load_tokenizer(str(run / "student"))
    for spec in recipe.teachers:
        own = [e for e in chosen if e.teacher == spec.name]
        teacher = _teacher(spec, measured) if own else None
        for subject in _SUBJECTS if own else ():
            place = spec.model if subject == "teacher" else str(run / WRITERS[subject])
            model = teacher if subject == "teacher" else _load(place, recipe.train.precision)
            if model is None:
                line.advance(len(own))
                continue
            line.note(subject)
            width = shared_width(model if teacher is None else teacher, model, len(words))
            warm_up(model, own[0])
            for example in own:
                sums = sum_over_example(teacher, model, example, vocabulary=width)
                measured.rows[subject].append(Row(example.prompt_id, sums))
                line.advance()
            key = f"teacher:{spec.name}" if subject == "teacher" else subject
            measured.models[key] = _describe(model, place)
    return measured


def _teacher(spec: LocalTeacher | FileTeacher | EndpointTeacher, measured: _Measured) -> PreTrainedModel | None:
    if not isinstance(spec, LocalTeacher):
        measured.missing[spec.name] = (
            "its weights are not here, and neither an endpoint nor a file gives whole distributions"
        )
        return None
    try:
        return _load(spec.model, spec.precision)
    except ModelError as error:
        measured.missing[spec.name] = "; ".join([error.summary, *(p.found for p in error.problems)])
        return None


def _load(ref: str, precision: models.Precision) -> PreTrainedModel:
    return models.load_model(ref, precision, models.processor().device)


def _describe(model: PreTrainedModel, ref: str) -> dict[str, JsonValue]:
    """How large a model is, and the precision it was measured in."""
    source = models.resolve(ref)
    files = [source.path / source.gguf] if source.gguf else source.path.glob("*.safetensors")
    return {
        "parameters": model.num_parameters(),
        "layers": model.config.get_text_config().num_hidden_layers,
        "bytes": sum(file.stat().st_size for file in files),
        "precision": str(model.dtype).removeprefix("torch."),
    }


def _facts(
    recipe: Recipe, chosen: Sequence[Example], measured: _Measured, scores: Sequence[Score], seed: int
) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = {f"{s.name} of {s.subject}": s.value for s in scores if s.value is not None}
    reading: dict[str, JsonValue] = {
        subject: dict(reading_interval(rows, seed)._asdict()) for subject, rows in measured.rows.items() if rows
    }
    return {
        "prompts": len({e.prompt_id for e in chosen}),
        "prompts_asked_for": recipe.evaluate.held_out,
        "answers": len(chosen),
        "positions": sum(e.supervised for e in chosen),
        "values": values,
        "unscored": {f"{s.name} of {s.subject}": s.unscored for s in scores if s.unscored is not None},
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "over": "prompts", "seed": seed},
        "models": measured.models,
        "reading_ms_a_token": reading,
        "processor": models.processor().name,
    }
