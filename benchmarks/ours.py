"""limbeck's side of `training.py` and `quality.py`: one case, in a process of its own.

    annotate    the annotate stage, from a loaded nothing to a store on disk (tau 0.02)
    stored      distillation from that store
    text        the same trainer, batches and order with plain cross-entropy on the text
    live        distillation against the live teacher's hidden states
    halves      the same as live, each step computed in two pieces: the same gradient in less memory
    on-policy   the student writes all answers, 128 tokens at most, and learns by reverse KL to the live teacher;
                four steps' answers are written at a time
    strict      the same, each step's answers written by the student as it then is
    profile     two steps of `stored` under torch.profiler
    peak        the processor's bf16 matrix peak

With `--order`, which gives both sides the same steps, learning rates are transformers' own, as the other side's are.

To add a case, write a function here that returns its figures, and its row in CASES.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from bench import Result, write_result
from flops import forward_flops, matrix_peak, shape_of
from steps import BATCH, Counts, StepClock, arguments, figures, read_order, settings, weights_digest
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from limbeck import models
from limbeck.collect.journal import Journal
from limbeck.ledger.canonical import digest_bytes
from limbeck.recipe import (
    LocalTeacher,
    OnPolicy,
    PrunedStudent,
    Recipe,
    SampledSignalSettings,
    SelfPrompt,
    TextSignalSettings,
    Train,
)
from limbeck.records import Example
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal.annotate import annotate
from limbeck.signal.head import head_of
from limbeck.signal.store import SignalStore
from limbeck.train.feed import Feed
from limbeck.train.rollouts import Rollouts
from limbeck.train.schedule import Schedule, make_schedule
from limbeck.train.sources import LiveTeacher, SignalSource, Stored
from limbeck.train.trainer import DistillationTrainer


def recipe_of(options: argparse.Namespace, kind: str) -> Recipe:
    """What the annotate stage needs to know; prompts and student are there because a recipe has them."""
    return Recipe(
        name="benchmark",
        teacher=LocalTeacher(model=str(options.material / "teacher"), precision="bf16"),
        prompts=(SelfPrompt(count=1),),
        student=PrunedStudent(layers=1),
        signal=SampledSignalSettings(tau=0.02) if kind == "sampled" else TextSignalSettings(),
        train=Train(loss="forward_kl" if kind == "sampled" else "cross_entropy"),
    )


def store_of(options: argparse.Namespace, kind: str) -> SignalStore:
    """The store of that kind of signal; annotated if it is not there."""
    run = RunDir(options.material / kind)
    if not (run / "examples").exists():
        shutil.copytree(options.material / "examples", run / "examples")
    annotate(recipe_of(options, kind), run)
    return SignalStore.open(run / "signals", examples=read_examples(run / "examples").train)


def annotation(options: argparse.Namespace) -> Result:
    """Seconds of the whole stage, loading the teacher included."""
    shutil.rmtree(options.material / "sampled", ignore_errors=True)
    started = time.perf_counter()
    store = store_of(options, "sampled")
    seconds = time.perf_counter() - started
    counts = store.manifest.counts
    return {
        "seconds": seconds,
        "tokens": sum(len(e.tokens_T) for e in read_examples(options.material / "examples").train),
        "positions": counts.positions,
        "bytes_a_position": store.bytes_on_disk / counts.positions,
        "entries_a_position": counts.entries / counts.positions,
    }


def stored(options: argparse.Namespace) -> Result:
    return train(options, Stored(store_of(options, "sampled")), None, "forward_kl")


def text(options: argparse.Namespace) -> Result:
    return train(options, Stored(store_of(options, "text")), None, "cross_entropy")


def live(options: argparse.Namespace) -> Result:
    return train(options, *_live(options), "forward_kl")


def halves(options: argparse.Namespace) -> Result:
    return train(options, *_live(options), "forward_kl", pieces=2)


def _live(options: argparse.Namespace) -> tuple[SignalSource, PreTrainedModel]:
    teacher = models.load_model(str(options.material / "teacher"), "bf16")
    words = models.load_tokenizer(str(options.material / "teacher"))
    return LiveTeacher(teacher, min(len(words), teacher.config.get_text_config().vocab_size)), teacher


def on_policy(options: argparse.Namespace) -> Result:
    return train(options, *_live(options), "reverse_kl", own=OnPolicy(max_tokens=128, every=4))


def strictly_on_policy(options: argparse.Namespace) -> Result:
    return train(options, *_live(options), "reverse_kl", own=OnPolicy(max_tokens=128, every=1))


class _Profiled(TrainerCallback):
    """Profiles from the end of step `after` to the end of training."""

    def __init__(self, after: int):
        self._after = after
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._after:
            self.profiler.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.__exit__(None, None, None)


def profiled(options: argparse.Namespace) -> Result:
    """Where the time of a step goes: the share of every operation in the time of all, its own time only."""
    watch = _Profiled(options.skip)
    options.steps = options.skip + 2
    found = train(options, Stored(store_of(options, "sampled")), None, "forward_kl", callbacks=[watch])
    averages = watch.profiler.key_averages()
    total = sum(row.self_cpu_time_total for row in averages)
    rows = sorted(averages, key=lambda row: -row.self_cpu_time_total)[:20]
    shares = {row.key: row.self_cpu_time_total / total for row in rows}
    return found | {"shares": shares, "calls": {row.key: row.count for row in rows}, "microseconds": total}


def peak(options: argparse.Namespace) -> Result:
    return matrix_peak()._asdict()


def train(
    options: argparse.Namespace,
    source: SignalSource,
    teacher: PreTrainedModel | None,
    loss: str,
    *,
    own: OnPolicy | None = None,
    pieces: int = 1,
    callbacks: list[TrainerCallback] | None = None,
) -> Result:
    """Trains the student as the train stage does, without checkpoints; returns figures and operations. `own` lets the
    student write all of its answers.
    """
    models.keep_memory()
    examples = read_examples(options.material / "examples").train
    lengths = [len(e.tokens_T) for e in examples]
    schedule = make_schedule(lengths, batch_size=BATCH, epochs=options.epochs, pieces=pieces, seed=options.seed)
    given = tuple(map(tuple, read_order(options.order))) if options.order else schedule.steps
    whole = given[: options.steps or None]
    none = ((),) * len(whole)
    schedule = replace(schedule, steps=none if own else whole, prompts=whole if own else none)
    student = str(options.material / "student")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    head_of(model)  # as the train stage does: its proof must run before autocast is on
    written = _Written(model, options, examples, schedule, own) if own else None
    feed = Feed(examples, schedule, own_answers=written, accumulate=pieces)
    clock, steps = StepClock(), len(schedule.steps)
    same = arguments(
        str(options.material / "ours"), steps=steps, learning_rate=options.learning_rate, seed=options.seed
    ) | {"gradient_accumulation_steps": pieces}
    trainer = DistillationTrainer(
        model,
        feed=feed,
        source=source,
        loss=loss,
        temperature=1.0,
        library_rates=bool(options.order),
        args=TrainingArguments(**cast("dict[str, Any]", same), per_device_train_batch_size=1, num_train_epochs=1),
        callbacks=[*(callbacks or []), clock],
    )
    trainer.remove_callback(PrinterCallback)
    beginning = weights_digest(model) if options.order else ""
    trainer.train()
    batches = [
        [*(examples[i] for i in step), *(written.steps[n] if written else ())] for n, step in enumerate(schedule.steps)
    ]
    counts = Counts([sum(len(e.tokens_T) for e in b) for b in batches], [sum(e.supervised for e in b) for b in batches])
    if options.save:
        model.save_pretrained(options.save)
        models.load_tokenizer(student).save_pretrained(options.save)
    # A stretch of steps is timed with the writing of its answers, or not at all.
    skip = own.every * -(-options.skip // own.every) if own else options.skip
    found = figures(clock, counts, trainer.state.log_history, skip)
    if options.order:
        found["settings"] = settings(trainer, beginning)
    timed = batches[steps - cast("int", found["steps_timed"]) :]
    return found | {"flops": flops(model, teacher, timed), "padding": feed.counts.padding}


class _Written:
    """The student's answers, journaled in a file of its own, and kept by step to be counted."""

    def __init__(self, model, options: argparse.Namespace, examples: list[Example], schedule: Schedule, own: OnPolicy):
        self.steps: dict[int, list[Example]] = {}
        path = options.result.with_suffix(".journal.db")
        path.unlink(missing_ok=True)
        self._rollouts = Rollouts(
            model,
            models.load_tokenizer(str(options.material / "student")),
            examples=examples,
            schedule=schedule,
            settings=own,
            journal=Journal(path),
            made_from=digest_bytes(b"benchmark"),
            seed=options.seed,
            dtype=torch.bfloat16,
        )

    def __call__(self, step: int) -> list[Example]:
        self.steps[step] = self._rollouts.answers(step)
        return self.steps[step]


def flops(student: PreTrainedModel, teacher: PreTrainedModel | None, batches: list[list[Example]]) -> float:
    """Operations of the timed steps, as `flops.py` counts them."""
    lengths = [len(e.tokens_T) for batch in batches for e in batch]
    supervised = sum(e.supervised for batch in batches for e in batch)
    total = 3 * forward_flops(shape_of(student), lengths, supervised)
    return total + (forward_flops(shape_of(teacher), lengths, supervised) if teacher is not None else 0.0)


CASES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "annotate": annotation,
    "stored": stored,
    "text": text,
    "live": live,
    "halves": halves,
    "on-policy": on_policy,
    "strict": strictly_on_policy,
    "profile": profiled,
    "peak": peak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--material", type=Path, required=True, help="what benchmarks/material.py made")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0 is never")
    parser.add_argument("--skip", type=int, default=1, help="first steps left out of rates")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--order", type=Path, help="the chats of every step, instead of our own; with the library's rates"
    )
    parser.add_argument("--save", type=Path, help="where the student goes")
    parser.add_argument("--result", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    write_result(options.result, CASES[options.case](options))


if __name__ == "__main__":
    main()
