"""The training stage: RUN/beginning, RUN/examples and RUN/signals to RUN/student and RUN/training.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils.import_utils import is_flash_attn_2_available

from limbeck import models, ranks
from limbeck import recipe as recipe_
from limbeck.collect.journal import Journal
from limbeck.ledger.canonical import digest_json, digest_path
from limbeck.progress import Line
from limbeck.recipe import LocalTeacher, Recipe
from limbeck.records import Digest, Rollout
from limbeck.render.examples import ExampleSet, read_examples
from limbeck.rundir import RunDir, atomic
from limbeck.seeds import derive_seed
from limbeck.signal.annotate import signal_key
from limbeck.signal.head import head_of
from limbeck.signal.store import SignalStore
from limbeck.signal.types import SignalKind
from limbeck.tables import write_records
from limbeck.terms.obligations import NOTICE, notice
from limbeck.terms.rulings import rulings_of
from limbeck.terms.token import require_token
from limbeck.train.adapter import adapted, merged_copy
from limbeck.train.feed import Feed
from limbeck.train.losses import Loss, Pairing, check_pairing
from limbeck.train.rollouts import Rollouts
from limbeck.train.room import CHECKPOINTS
from limbeck.train.schedule import Schedule, make_schedule
from limbeck.train.sources import LiveTeacher, SignalSource, Stored
from limbeck.train.trainer import DistillationTrainer, SealCheckpoints, last_checkpoint

_CHECKPOINTING = next(
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)
"""What the installed transformers calls computing activations again: the first name is the newer one."""


def train(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Train the student, if the terms gate let its set through; resumes from the last complete checkpoint."""
    settings = recipe.train
    models.release()
    models.keep_memory()
    examples = _let_through(recipe, run)
    store = SignalStore.open(run / "signals", expect=signal_key(recipe, examples), examples=examples.train)
    loss = loss_of(settings)
    pairings = check_pairing(loss, store.manifest.kind, allow_biased=settings.allow_biased)
    schedule = _schedule(recipe, examples)
    dtype = models.precision_dtype(settings.precision)
    model = _student(recipe, run, dtype)
    tokenizer = models.load_tokenizer(str(run / "beginning"))
    made_from = _made_from(run, recipe, schedule)
    if ranks.first():
        _forget_other_checkpoints(run, made_from)
    resume = ranks.share(last_checkpoint(run / "checkpoints") if ranks.first() else None)
    with _journal(run) as journal, run.progress.line("train", len(schedule.steps), "steps") as line:
        rollouts = settings.on_policy and Rollouts(
            model,
            tokenizer,
            examples=examples.train,
            schedule=schedule,
            settings=settings.on_policy,
            journal=journal,
            made_from=made_from,
            seed=recipe.seed,
            dtype=dtype,
        )
        feed = Feed(
            examples.train,
            schedule,
            own_answers=rollouts.answers if rollouts else None,
            accumulate=settings.accumulate,
            process=ranks.rank(),
            processes=ranks.count(),
            packed=packed(settings.layout),
        )
        trainer = DistillationTrainer(
            model,
            feed=feed,
            source=_source(recipe, store),
            loss=loss,
            temperature=settings.temperature,
            allow_biased=settings.allow_biased,
            args=arguments(recipe, run / "checkpoints", len(schedule.steps), dtype),
            callbacks=[SealCheckpoints(), _Show(line)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        weights = cast(
            "dict[str, torch.Tensor]", trainer.accelerator.get_state_dict(trainer.model)
        )  # takes every process
        padding = _padding(feed)
        if not ranks.first():
            return {}
        write_records(run / "rollouts.parquet", rollouts.records() if rollouts else (), Rollout)
    _save_student(model, weights, tokenizer, run, dtype)
    biased = biased_terms(recipe, store.manifest.kind, pairings)
    return _record(recipe, run, trainer.state.log_history, model, schedule, examples, dtype, padding, biased)


def _let_through(recipe: Recipe, run: RunDir) -> ExampleSet:
    """The examples. Raises `RefusedError` where RUN has no token of the terms gate for exactly these."""
    examples = read_examples(run / "examples")
    if ranks.first():
        require_token(recipe, run, examples.examples)
    return examples


def _student(recipe: Recipe, run: RunDir, dtype: torch.dtype) -> PreTrainedModel:
    """The student as it begins: float32 weights that learn, or weights in `dtype` with an adapter that learns."""
    adapter = recipe.train.adapter
    model = AutoModelForCausalLM.from_pretrained(
        run / "beginning",
        dtype=dtype if adapter else torch.float32,
        **({"attn_implementation": "flash_attention_2"} if varlen() else {}),
    )
    head_of(model)  # proves the head in parts now: under the trainer's autocast its products would be rounded
    if adapter is None:
        return model
    torch.manual_seed(derive_seed(recipe.seed, "train", "adapter") % 2**32)
    return adapted(model, adapter)


def _journal(run: RunDir) -> Journal | nullcontext[None]:
    """Held by the first process only; what it holds, the others are told."""
    return Journal(run / "journal.db") if ranks.first() else nullcontext()


def _padding(feed: Feed) -> float:
    """Share of the positions computed, over all processes, that hold no token."""
    tokens, positions = (
        sum(part) for part in zip(*ranks.collect((feed.counts.tokens, feed.counts.positions)), strict=True)
    )
    return 1 - tokens / positions if positions else 0.0


def _schedule(recipe: Recipe, examples: ExampleSet) -> Schedule:
    settings, own = recipe.train, recipe.train.on_policy
    start = own and (own.share if own.share_at_start is None else own.share_at_start)
    return make_schedule(
        [len(e.tokens_T) for e in examples.train],
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        pieces=settings.accumulate * ranks.count(),
        seed=derive_seed(recipe.seed, "train", "order"),
        own=(start or 0.0, own.share if own else 0.0),
    )


def varlen() -> bool:
    """Whether attention over packed sequences costs no more than over each by itself: on a GPU with flash attention."""
    return torch.cuda.is_available() and is_flash_attn_2_available()


def packed(layout: Literal["auto", "padded", "packed"]) -> bool:
    """Whether sequences are packed in one row. On a CPU, passes over sequences of like length are faster."""
    return layout == "packed" or (layout == "auto" and varlen())


def loss_of(settings: recipe_.Train) -> tuple[Loss, ...]:
    """The recipe's loss as the weighted sum that the losses know."""
    return tuple(
        Loss(
            term.name,
            term.beta if term.beta is not None else term.alpha,
            term.weight,
            "text" if term.on == "text" else None,
            term.temperature,
        )
        for term in settings.terms
    )


def biased_terms(recipe: Recipe, kind: SignalKind, pairings: Sequence[Pairing]) -> list[JsonValue]:
    """The terms whose value is not the loss they are named after, each with its signal and the reason."""
    return [
        {"term": str(term), "signal": "text" if term.on == "text" else kind, "why": pairing.why}
        for term, pairing in zip(recipe.train.terms, pairings, strict=True)
        if pairing.bias != "none"
    ]


def _source(recipe: Recipe, store: SignalStore) -> SignalSource:
    if store.manifest.kind != "hidden":
        return Stored(store)
    teacher = recipe.teachers[0]
    assert isinstance(teacher, LocalTeacher)  # a recipe with another is refused
    model = models.load_model(teacher.model, teacher.precision, models.processor().device)
    return LiveTeacher(model, store.manifest.key.vocab_size)


def _made_from(run: RunDir, recipe: Recipe, schedule: Schedule) -> Digest:
    """Digest of all that a step depends on: recipe, order, number of processes, beginning, examples and signals."""
    read = [digest_path(run / name) for name in ("beginning", "examples", "signals")]
    return digest_json([recipe.digest, schedule.digest, ranks.count(), *read])


def _forget_other_checkpoints(run: RunDir, key: Digest) -> None:
    """Checkpoints are resumed from only if they were made from the same things."""
    mark = run / "checkpoints" / "made_from"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != key:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        with atomic(mark) as half:
            half.write_text(key, encoding="utf-8")


def arguments(recipe: Recipe, directory: Path, steps: int, dtype: torch.dtype) -> TrainingArguments:
    """The recipe in the library's words. One item of our data set is a micro-batch, and all epochs are one pass."""
    settings = recipe.train
    return TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=1,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SchedulerType(settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip,
        optim="adamw_torch_fused",
        bf16=dtype is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=derive_seed(recipe.seed, "train") % 2**32,
        save_strategy="steps",
        save_steps=settings.checkpoint_every,
        save_total_limit=CHECKPOINTS,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **cast("dict[str, Any]", {_CHECKPOINTING: settings.activation_checkpointing}),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


class _Show(TrainerCallback):
    """Moves the progress line, and keeps the library from printing its log."""

    def __init__(self, line: Line):
        self._line = line

    def on_train_begin(self, args, state, control, **kwargs):
        self._line.advance(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._line.advance()
            self._line.note(f"loss {logs['loss']:.3f} nats a token")


def _save_student(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer, run: RunDir, dtype: torch.dtype
) -> None:
    """`weights` are the model's, whole, wherever its parts lie. An adapter is saved beside its sum with the model."""
    with atomic(run / "student") as half:
        if hasattr(model, "peft_config"):
            model.save_pretrained(half / "adapter")
            model = merged_copy(model)
            weights = model.state_dict()
        model.config.use_cache = True
        model.config.dtype = dtype
        model.save_pretrained(half, state_dict=_narrowed(weights, dtype))
        tokenizer.save_pretrained(half)
        if told := notice(ruled.rulings if (ruled := rulings_of(run.root)) else ()):
            (half / NOTICE).write_text(told, encoding="utf-8")


def _narrowed(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`. Those that are one tensor under two names, such as a tied head, stay one, so that they
    are written once.
    """
    made: dict[tuple, torch.Tensor] = {}
    found = {}
    for name, weight in weights.items():
        same = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        found[name] = made.setdefault(same, weight.to(dtype) if weight.is_floating_point() else weight)
    return found


def _record(
    recipe: Recipe,
    run: RunDir,
    history: list[dict[str, float]],
    model: PreTrainedModel,
    schedule: Schedule,
    examples: ExampleSet,
    dtype: torch.dtype,
    padding: float,
    biased: list[JsonValue],
) -> dict[str, JsonValue]:
    """Writes the loss curve; returns the facts of the stage."""
    rows = [row for row in history if "loss" in row]
    steps: list[JsonValue] = [
        {
            "step": row["step"],
            "epoch": row["step"] / schedule.steps_per_epoch,
            "loss": row["loss"],
            "tokens": row["tokens"],
            "learning_rate": row["learning_rate"],
            "seconds": row["seconds"],
        }
        for row in rows
    ]
    facts: dict[str, JsonValue] = {
        "loss": recipe.train.loss_in_words,
        "biased": biased,
        "unit": "nats a token",
        "precision": str(dtype).removeprefix("torch."),
        "examples": len(examples.train),
        "tokens": rows[-1]["tokens"],
        "seconds": rows[-1]["seconds"],
        "padding": padding,
        "processes": ranks.count(),
        "order": schedule.digest,
        "parameters": model.num_parameters(),
        "parameters_trained": model.num_parameters(only_trainable=True),
    }
    with atomic(run / "training.json") as half:
        half.write_text(json.dumps({"steps": steps} | facts, indent=1), encoding="utf-8")
    return facts | {"steps": len(steps), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
