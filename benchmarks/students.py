"""Students trained from the same beginning, in the same order, for the same number of steps, each from another form.

Part of `benchmarks/signals.py`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from stored_forms import Entries
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback

from limbeck import models
from limbeck.evaluate.compare import sum_over_example
from limbeck.evaluate.evaluate import choose
from limbeck.evaluate.figures import Row, scores_of
from limbeck.render.batches import Batch
from limbeck.render.examples import ExampleSet
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed
from limbeck.signal.head import head_of
from limbeck.signal.types import SampledSignal, concat
from limbeck.train.feed import Feed
from limbeck.train.schedule import Schedule, make_schedule
from limbeck.train.sources import SignalSource
from limbeck.train.stage import arguments
from limbeck.train.trainer import DistillationTrainer


class Kept(NamedTuple):
    """One draw of a form over one example, and the teacher's entropy at its positions."""

    entries: Entries
    entropy_N: torch.Tensor


class KeptSource:
    """Kept forms as the trainer's source. Every entry is a head of a `SampledSignal`: a head has any weight."""

    def __init__(self, kept: Mapping[str, Kept], vocab_size: int, temperature: float):
        self._kept, self._vocab_size, self._temperature = kept, vocab_size, temperature

    def take(self, batch: Batch) -> SampledSignal:
        """The signal of these examples."""
        return concat([self._signal(self._kept[i]) for i in batch.example_ids])

    def _signal(self, kept: Kept) -> SampledSignal:
        counts_N, ids_E, weights_E = kept.entries
        none_N = torch.zeros_like(counts_N)
        return SampledSignal(
            counts_N, none_N, ids_E, weights_E, kept.entropy_N, 1.0, self._vocab_size, self._temperature
        )


class Reached(NamedTuple):
    """Where a student got to on the held-out answers, each with its 95 % interval over prompts."""

    kl: tuple[float | None, float | None, float | None]
    agreement: tuple[float | None, float | None, float | None]
    seconds: float
    """Of the training."""


def schedule_of(run: RunDir, examples: ExampleSet, steps: int) -> Schedule:
    """The recipe's own order, as long as `steps`."""
    settings = run.recipe().train
    lengths = [len(e.tokens_T) for e in examples.train]
    per_epoch = -(-len(lengths) // settings.batch_size)
    seed = derive_seed(run.recipe().seed, "train", "order")
    whole = make_schedule(
        lengths, batch_size=settings.batch_size, epochs=-(-steps // per_epoch), pieces=settings.accumulate, seed=seed
    )
    return dataclasses.replace(whole, steps=whole.steps[:steps], prompts=whole.prompts[:steps])


def train_student(run: RunDir, examples: ExampleSet, schedule: Schedule, source: SignalSource) -> Reached:
    """Train RUN/beginning on `source` and hold it against the live teacher. Forward KL, the recipe's settings."""
    recipe, started = run.recipe(), time.monotonic()
    dtype = models.precision_dtype(recipe.train.precision)
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_pretrained(run / "beginning", dtype=torch.float32)
    head_of(student)  # proves the head in parts now: under the trainer's autocast its products would be rounded
    with tempfile.TemporaryDirectory() as scratch:
        settings = arguments(recipe, Path(scratch), len(schedule.steps), dtype)
        trainer = DistillationTrainer(
            student,
            feed=Feed(examples.train, schedule, accumulate=recipe.train.accumulate),
            source=source,
            loss="forward_kl",
            temperature=recipe.train.temperature,
            args=dataclasses.replace(settings, save_strategy="no"),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.monotonic() - started
    student.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    return measure(run, examples, student.eval(), seconds)


def measure(run: RunDir, examples: ExampleSet, student: PreTrainedModel, seconds: float = 0.0) -> Reached:
    """A student on the recipe's held-out prompts."""
    recipe = run.recipe()
    teacher = models.load_model(recipe.local_teachers[0].model, recipe.local_teachers[0].precision)
    chosen = choose(examples.held_out, recipe.evaluate.held_out)
    rows = [Row(e.prompt_id, sum_over_example(teacher, student, e)) for e in chosen]
    scores = {s.name: (s.value, s.low, s.high) for s in scores_of("student", rows, seed=0, no_teacher=None)}
    return Reached(scores["kl_forward"], scores["agreement_top1"], seconds)
