"""Whether the disk has room for what training writes, asked before anything is spent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from limbeck import models
from limbeck.errors import DiskFullError, InputError, Problem
from limbeck.progress import Progress
from limbeck.recipe import LocalTeacher, PrunedStudent, Recipe
from limbeck.student.layers import stack_of
from limbeck.student.wanted import wanted
from limbeck.student.width import narrowed

CHECKPOINTS = 2
"""Complete ones that are kept. A third is written before the oldest goes."""
_LEARNING = 12
"""Bytes a parameter in a checkpoint: itself and AdamW's two moments, in float32."""


class Room(NamedTuple):
    """Bytes of weights that a run writes; what else it writes is not counted."""

    beginning: int
    checkpoint: int
    """0 where an adapter is all that learns, whose size the recipe's few numbers keep small."""
    student: int

    @property
    def least(self) -> int:
        """What no run can do without: every training ends with a checkpoint, which stays until the student is there."""
        return self.beginning + self.checkpoint + self.student

    @property
    def most(self) -> int:
        """What a run of more than two checkpoints needs at once."""
        saving = (CHECKPOINTS + 1) * self.checkpoint
        return self.beginning + max(saving, CHECKPOINTS * self.checkpoint + self.student)


def room_of(recipe: Recipe) -> Room:
    """By the configurations of the models alone; of a pruned student, with its smallest layers."""
    student, trained = recipe.student, models.precision_dtype(recipe.train.precision)
    if isinstance(student, PrunedStudent):
        teacher = recipe.teachers[0]
        assert isinstance(teacher, LocalTeacher)  # a recipe with another is refused
        config = models.load_config(teacher.model, teacher.precision)
        size = wanted(student, config, teacher.model)
        parameters = _parameters(config if size.width is None else narrowed(config, size.width), size.layers)
        begins = models.precision_dtype(teacher.precision, models.processor().device)
    else:
        config = models.load_config(student.model)
        parameters = _parameters(config, None)
        begins = torch.bfloat16 if config.get_text_config().dtype == torch.bfloat16 else torch.float32
    checkpoint = 0 if recipe.train.adapter else _LEARNING * parameters
    return Room(begins.itemsize * parameters, checkpoint, trained.itemsize * parameters)


def _parameters(config: PreTrainedConfig, layers: int | None) -> int:
    """Of a model of this configuration, with its smallest `layers`, or with all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if layers is None:
        return model.num_parameters()
    sizes = sorted(sum(weight.numel() for weight in layer.parameters()) for layer in stack_of(model).layers)
    return model.num_parameters() - sum(sizes[layers:])


def refuse_without_room(recipe: Recipe, out: str | os.PathLike[str], progress: Progress) -> None:
    """Raise `DiskFullError` where the disk of `out` has less room than the weights need in any case, and `ModelError`
    for a teacher whose layers cannot be told apart; say so where it has less than they may need.
    """
    place = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.is_dir())
    try:
        room = room_of(recipe)
    except InputError:
        raise
    except ValueError:  # transformers knows no causal language model of this kind, which is said where one is loaded
        return
    free, where = shutil.disk_usage(place).free, os.fspath(out)
    parts = (
        f"{room.beginning:,} for the student as it begins, {room.checkpoint:,} for a checkpoint, {room.student:,} for "
        "the student"
    )
    if free < room.least:
        expected = f"at least {room.least:,} bytes: {parts}"
        remedy = "free some space, use an --out on another disk, or take a smaller student"
        problem = Problem(where, f"{free:,} bytes free on its disk", expected, remedy)
        raise DiskFullError("the disk has too little room to train the student", [problem])
    if free < room.most:
        many = f"{CHECKPOINTS + 1} checkpoints at a time"
        told = f"{where}: {free:,} bytes free on its disk, and training may need {room.most:,}: {parts}, and {many}"
        progress.begin(told)
        progress.say(told)
