"""The teacher as a smaller model: without some of its layers, attention heads and MLP neurons.

Everything is scored once, on the whole teacher, and then goes at once. So does the implementation of Minitron by
its authors (NVIDIA Model Optimizer, modelopt/torch/prune/plugins/mcore_minitron.py: one forward loop gathers the
activations and the layers' scores). How far the student strays is measured on the student, with all of it gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedModel

from limbeck.recipe import PrunedStudent
from limbeck.records import Example
from limbeck.student.activation import TOKENS, Narrowing, choose_width
from limbeck.student.calibrate import calibrate, stray
from limbeck.student.choose import MEASURED, Choice, all_layers, choose_layers
from limbeck.student.layers import only
from limbeck.student.narrow import narrow
from limbeck.student.wanted import wanted
from limbeck.student.width import Heads, Width, check_width, heads_of, neurons_of


class ChosenWidth(NamedTuple):
    """What the layers keep, and why."""

    width: Width
    teacher_heads: Heads | None
    teacher_neurons: int | None
    layers: tuple[Narrowing, ...]
    """One for each layer that stays."""
    divergence: float
    """KL(teacher || student), nats a token, of the student with all that was removed."""
    tokens: int
    """Supervised tokens measured on."""


class Pruned(NamedTuple):
    """A student before it learns, and how it was chosen."""

    model: PreTrainedModel
    layers: Choice
    width: ChosenWidth | None
    """None where the layers keep all they have."""


@contextmanager
def pruned(
    model: PreTrainedModel,
    examples: Sequence[Example],
    student: PrunedStudent,
    teacher: str,
    *,
    seed: int = 0,
    on_measured: Callable[[], None] = lambda: None,
) -> Iterator[Pruned]:
    """While the block runs, the student that the recipe asks for; afterwards `model` is as it was.

    `examples` are the answers of `model`, which errors call `teacher`.

    Raises:
        ModelError: more than the teacher has, what cannot be told apart, or no examples to measure on.

    """
    size = wanted(student, model.config, teacher)
    if size.width:
        check_width(model, size.width)
    choice = all_layers(model)
    if student.layers is not None:
        how = MEASURED if student.choose == "importance" else student.choose
        choice = choose_layers(model, examples, size.layers, how, seed=seed, on_measured=on_measured)
    if size.width is None:
        with only(model, choice.kept):
            yield Pruned(model, choice, None)
        return
    calibration = calibrate(model, examples, seed=seed, tokens=TOKENS)
    there, neurons = heads_of(model.config), neurons_of(model.config)
    every = choose_width(model, calibration, size.width)
    layers = [every[i] for i in choice.kept]
    with only(model, choice.kept):
        made = narrow(model, size.width, [layer.kept for layer in layers])
    far = stray(made, calibration)
    yield Pruned(made, choice, ChosenWidth(size.width, there, neurons, tuple(layers), far, calibration.positions))
