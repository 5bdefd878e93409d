"""The numbers of a pruned student, held against what its teacher has."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig

from limbeck.errors import ModelError, Problem
from limbeck.recipe import PrunedStudent
from limbeck.student.width import Heads, Width, heads_of, neurons_of


class Wanted(NamedTuple):
    """How large the student is to be."""

    layers: int
    width: Width | None
    """None where every layer keeps all it has."""


def wanted(student: PrunedStudent, config: PreTrainedConfig, teacher: str) -> Wanted:
    """What the recipe asks for, with the numbers that it leaves open filled in.

    Raises:
        ModelError: more than the teacher has, or heads that do not divide into groups of one size; all that is
            wrong, in one error.

    """
    problems: list[Problem] = []
    there = config.get_text_config().num_hidden_layers
    layers = _at_most("layers", student.layers, there, f"the layers of {teacher}", problems)
    heads = _heads(student, config, teacher, problems)
    neurons = None
    if student.intermediate_size is not None:
        neurons = student.intermediate_size
        if (most := neurons_of(config)) is not None:
            _at_most("intermediate_size", neurons, most, f"the MLP neurons in each layer of {teacher}", problems)
    if problems:
        raise ModelError("the student would be larger than its teacher, or not of one size throughout", problems)
    return Wanted(there if layers is None else layers, Width(heads, neurons) if heads or neurons else None)


def refuse_whole(student: PrunedStudent, config: PreTrainedConfig, teacher: str) -> None:
    """Raises `ModelError` where what the recipe keeps is all that there is, so that nothing would be pruned."""
    size, there = wanted(student, config, teacher), config.get_text_config().num_hidden_layers
    width = size.width or Width(None, None)
    if size.layers < there or width.heads not in (None, heads_of(config)):
        return
    if width.neurons not in (None, neurons_of(config)):
        return
    asked = ", ".join(f"{key}: {value}" for key, value in student if key not in ("kind", "choose") and value)
    expected = "at least one number below the teacher's"
    keys = [f"student.{key}" for key, value in student if key not in ("kind", "choose") and value]
    remedy = (
        f"set {' or '.join(keys)} lower, or begin as the whole teacher, student: {{kind: pretrained, model: "
        f'"{teacher}"}}'
    )
    problem = Problem("student", f"{asked}, all that {teacher} has", expected, remedy)
    raise ModelError("nothing would be pruned", [problem])


def _heads(student: PrunedStudent, config: PreTrainedConfig, teacher: str, problems: list[Problem]) -> Heads | None:
    asked, asked_groups, before = student.attention_heads, student.key_value_heads, len(problems)
    if asked is None and asked_groups is None:
        return None
    there = heads_of(config)
    if there is None:
        # What the configuration lacks is said by check_width, which looks at the model too.
        return Heads(asked or 1, asked_groups or 1, 1)
    _at_most("attention_heads", asked, there.attention, f"the attention heads in each layer of {teacher}", problems)
    _at_most(
        "key_value_heads", asked_groups, there.key_value, f"the key-value heads in each layer of {teacher}", problems
    )
    if len(problems) > before:
        return None
    groups = min(there.key_value, asked or there.attention) if asked_groups is None else asked_groups
    heads = groups * there.group if asked is None else asked
    if heads % groups or heads // groups > there.group:
        fitting = [groups * size for size in range(1, there.group + 1)]
        key = "student.attention_heads"
        expected = f"{_listed(fitting)}: 1 to {there.group} for each of {groups} key-value heads"
        remedy = f"set {key} to one of these, or set student.key_value_heads"
        problems.append(Problem(key, str(heads), expected, remedy))
    return Heads(heads, groups, there.dim)


def _at_most(key: str, asked: int | None, there: int, what: str, problems: list[Problem]) -> int | None:
    if asked is not None and asked > there:
        remedy = f"set student.{key} to {there} or less"
        problems.append(Problem(f"student.{key}", str(asked), f"at most {there}, {what}", remedy))
    return asked


def _listed(numbers: list[int]) -> str:
    told = [str(n) for n in numbers]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} or {told[-1]}"
