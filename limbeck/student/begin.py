"""The student stage: RUN/examples to RUN/beginning, the student as it is before it learns.

A pruned student is the first teacher with layers, attention heads or MLP neurons removed; the weights that stay
are the teacher's, bit for bit. A pretrained student is any model with the teacher's tokenizer. Either way
RUN/beginning has Hugging Face layout, with the teacher's tokenizer and chat template: chats were rendered with
them, so those are what the student learns to read.
"""

from __future__ import annotations

import copy
import time

import torch
from pydantic import JsonValue
from transformers import GenerationConfig

from limbeck import models
from limbeck.errors import ModelError, Problem
from limbeck.recipe import LocalTeacher, PretrainedStudent, PrunedStudent, Recipe
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir, atomic
from limbeck.student.facts import facts_of_layers, facts_of_width
from limbeck.student.prune import pruned
from limbeck.student.saving import prove, save


def begin(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write the student as it begins.

    Raises:
        ModelError: layers, heads or neurons that cannot be removed, or a student whose tokenizer is not the
            teacher's.

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
    count, whole = model.config.get_text_config().num_hidden_layers, model.num_parameters()
    examples = [e for e in read_examples(run / "examples").train if e.teacher == teacher.name]
    with (
        run.progress.line("student", count, "layers") as line,
        pruned(model, examples, student, teacher.name, seed=recipe.seed, on_measured=line.advance) as student_now,
        atomic(run / "beginning") as half,
    ):
        save(student_now.model, words, half)
        prove(student_now.model, half)
        parameters = student_now.model.num_parameters()
    return {
        "kind": "pruned",
        "teacher": teacher.name,
        "layers": len(student_now.layers.kept),
        "teacher_layers": count,
        "parameters": parameters,
        "teacher_parameters": whole,
        "dtype": str(model.dtype).removeprefix("torch."),
        **facts_of_layers(student_now.layers),
        **(facts_of_width(student_now.width) if student_now.width else {}),
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
            save(model, words, half)
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
