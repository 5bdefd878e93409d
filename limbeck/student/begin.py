"""The student stage: RUN/examples to RUN/beginning, the student as it is before it learns.

A pruned student is the first teacher with layers removed; the layers that stay are the teacher's, bit for
bit. A pretrained student is any model with the teacher's tokenizer. Either way RUN/beginning has Hugging
Face layout, with the teacher's tokenizer and chat template: chats were rendered with them, so those are
what the student learns to read.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from limbeck import models
from limbeck.errors import ModelError, Problem
from limbeck.recipe import LocalTeacher, PretrainedStudent, PrunedStudent, Recipe
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir, atomic
from limbeck.student.choose import MEASURED, Choice, choose_layers
from limbeck.student.layers import only, stack_of

_PROBE = 16
"""Tokens that the saved student is compared on with the one that was measured."""


def begin(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write the student as it begins.

    Raises:
        ModelError: layers that cannot be removed, or a student whose tokenizer is not the teacher's.

    """
    started = time.monotonic()
    if isinstance(recipe.student, PrunedStudent):
        facts = _prune(recipe, recipe.student, run)
    else:
        facts = _take(recipe, recipe.student, run)
    return facts | {"seconds": time.monotonic() - started}


def _prune(recipe: Recipe, student: PrunedStudent, run: RunDir) -> dict[str, JsonValue]:
    teacher = recipe.teachers[0]
    assert isinstance(teacher, LocalTeacher)  # a recipe with another is refused
    model, words = (
        models.load_model(teacher.model, teacher.precision, models.processor().device),
        models.load_tokenizer(teacher.model),
    )
    count = len(stack_of(model).layers)
    with run.progress.line("student", count, "layers") as line:
        choice = choose_layers(
            model,
            [e for e in read_examples(run / "examples").train if e.teacher == teacher.name],
            student.layers,
            MEASURED if student.choose == "importance" else student.choose,
            seed=recipe.seed,
            on_measured=line.advance,
        )
    with only(model, choice.kept), atomic(run / "beginning") as half:
        _save(model, words, half)
        _prove(model, half)
        parameters = model.num_parameters()
    return {
        "kind": "pruned",
        "teacher": teacher.name,
        "layers": len(choice.kept),
        "teacher_layers": count,
        "parameters": parameters,
        "teacher_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    } | facts_of(choice)


def facts_of(choice: Choice) -> dict[str, JsonValue]:
    """A choice of layers, as the ledger keeps it."""
    return {
        "criterion": choice.criterion,
        "layers_kept": list(choice.kept),
        "layers_removed": list(choice.removed),
        "scores": list(choice.scores),
        "scores_unit": choice.unit,
        "divergence_nats": list(choice.divergence),
        "calibration_tokens": choice.tokens,
    }


def _take(recipe: Recipe, student: PretrainedStudent, run: RunDir) -> dict[str, JsonValue]:
    writer = recipe.words_of(recipe.teachers[0])
    words, own = models.load_tokenizer(writer), models.load_tokenizer(student.model)
    models.refuse_other_tokenizer(f"student.model: {student.model}", words, own)
    with run.progress.line("student", 1, "models") as line:
        stored = models.load_config(student.model).get_text_config().dtype
        model = models.load_model(student.model, "bf16" if stored == torch.bfloat16 else "float32")
        if (rows := model.get_input_embeddings().weight.shape[0]) < len(words):  # pyright: ignore
            where, expected = f"student.model: {student.model}", f"at least {len(words)}, one for each token"
            remedy = "take a model whose embeddings fit its tokenizer"
            problem = Problem(where, f"{rows} embeddings", expected, remedy)
            raise ModelError("the student has too few embeddings", [problem])
        model = copy.copy(model)
        model.generation_config = _generation_config(writer)
        model.generation_config.eos_token_id = sorted(models.stop_ids(model, words))
        with atomic(run / "beginning") as half:
            _save(model, words, half)
        line.advance()
    return {
        "kind": "pretrained",
        "model": student.model,
        "digest": models.resolve(student.model).digest,
        "layers": model.config.get_text_config().num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _generation_config(ref: str) -> GenerationConfig:
    """How the teacher writes; the student, trained on its answers, has to stop where it stops."""
    source = models.resolve(ref)
    if source.gguf is None and (source.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(source.path, local_files_only=True)
    return GenerationConfig.from_model_config(models.load_config(ref))


def _save(model: PreTrainedModel, words: PreTrainedTokenizerBase, directory: Path) -> None:
    with _quiet():
        model.save_pretrained(directory)
    words.save_pretrained(directory)


def _prove(model: PreTrainedModel, directory: Path) -> None:
    """Load what was saved and compare it with the model that was measured: an architecture whose layers
    depend on their number in a way that the configuration does not show would come back as another model.
    """
    with _quiet():
        both: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    saved, told = both
    unfit = {*told["missing_keys"], *told["unexpected_keys"], *(str(m[0]) for m in told["mismatched_keys"])}
    if unfit:
        raise _other_model(model, f"{len(unfit)} weights that do not fit: {', '.join(sorted(unfit)[:4])}")
    tokens_1T = torch.arange(_PROBE)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        measured, loaded = (
            m(input_ids=tokens_1T.to(m.device), use_cache=False).logits.float().cpu() for m in (model, saved.eval())
        )
    difference = float((measured - loaded).abs().mean() / measured.std())
    if not difference < 0.01:
        raise _other_model(model, f"logits that differ by {difference:.2g} standard deviations")


def _other_model(model: PreTrainedModel, found: str) -> ModelError:
    remedy = "this architecture cannot lose layers; use student: {kind: pretrained, ...}"
    problem = Problem(type(model).__name__, found, "the same weights and logits", remedy)
    return ModelError("the pruned student is another model when it is loaded again", [problem])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, and without its warnings: what they warn of is checked."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
