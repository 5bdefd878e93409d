"""From pydantic's errors to problems in the recipe's own words: dotted keys, both values, the nearest known
key.

Pydantic says where in its own tree of types something went wrong, union members included; a reader wants the
key that is in the file. So the recipe's values are walked along, and of a union only the `kind` that was
written counts.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from limbeck.errors import Problem
from limbeck.recipe import Recipe

Keys = tuple[str | int, ...]
"""A place in the recipe: names of keys and positions in lists."""

_EXPECTED = {
    "string_type": "text",
    "string_unicode": "text that UTF-8 can hold",
    "string_pattern_mismatch": "text of the form {pattern}",
    "string_too_long": "at most {max_length} characters",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "date_type": "a date such as 2026-01-31",
    "date_parsing": "a date such as 2026-01-31",
    "date_from_datetime_parsing": "a date such as 2026-01-31",
    "date_from_datetime_inexact": "a date such as 2026-01-31, without a time",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "tuple_type": "a list",
    "too_short": "at least {min_length} entry",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "invalid_key": "a key that is text",
    "recursion_loop": "a value that does not contain itself",
    "address": "{text}",
    "own_keys": "{text}",
}
"""What each of pydantic's error types means, in the words of this package."""

_NOT_SHOWN = frozenset({"api_key", "api_key_env", "api_key_file", "base_url"})
"""Keys at whose place somebody may have written a secret."""


def problems(errors: Sequence[ErrorDetails], data: Mapping[Any, Any], where: Callable[[Keys], str]) -> list[Problem]:
    """What pydantic found wrong with `data` as a Recipe; `where` turns a place into file, line and key."""
    places = [(_keys(error, data), error) for error in errors]
    # With the wrong kind, what is said about the other fields is about another kind's fields.
    wrong = {keys[:-1] for keys, error in places if error["type"] == "literal_error" and keys[-1] == "kind"}
    found = []
    for keys, error in places:
        if error["type"] == "parts_disagree":
            listed = error.get("ctx", {})["problems"]
            found += [problem._replace(where=where(_whole(keys, problem.where))) for problem in listed]
        elif keys and keys[:-1] in wrong and keys[-1] != "kind":
            continue
        # Pydantic also calls a list too short if none of its entries is right.
        elif error["type"] != "too_short" or not error["input"]:
            found.append(_problem(keys, error, data, where(keys)))
    return found


def _whole(keys: Keys, told: str) -> Keys:
    """The place that a part of the recipe tells of itself, from the top: parts tell it from the top, or, where they
    stand in several places, from themselves or the part around them.
    """
    inner = tuple(told.split("."))
    if not keys or inner[0] == keys[0]:
        return inner
    return (*keys[:-1], *inner) if inner[0] == keys[-1] else (*keys, *inner)


def _problem(keys: Keys, error: ErrorDetails, data: Mapping[Any, Any], where: str) -> Problem:
    kind, found, ctx = error["type"], error["input"], error.get("ctx", {})
    candidates = _candidates(keys[:-1], data)
    model = _chosen(candidates, _value(keys[:-1], data))
    if kind == "extra_forbidden":
        return _unknown_key(keys, model, candidates, where)
    if kind.startswith("union_tag"):
        kinds = [str(_kind(m)) for m in candidates]
        if kind == "union_tag_not_found":
            return Problem(where, "the key is missing", f"one of {', '.join(kinds)}", f"add {dotted(keys)}")
        return Problem(where, repr(ctx["tag"]), f"one of {', '.join(kinds)}", _nearest(str(ctx["tag"]), kinds))
    field = model.model_fields.get(str(keys[-1])) if model and keys else None
    meaning = " ".join((field.description or "").split()) if field else ""
    if kind == "missing":
        return Problem(where, "the key is missing", meaning, f"add {dotted(keys)}")
    if kind == "literal_error":
        words = ctx["expected"].replace("'", "").replace(" or ", ", ")
        return Problem(where, describe(found), f"one of {words}", _nearest(str(found), words.split(", ")))
    expected = _EXPECTED[kind].format(**ctx) if kind in _EXPECTED else error["msg"]
    if keys and str(keys[-1]) in _NOT_SHOWN:
        hidden = "a value that is not shown, as it may hold a secret"
        return Problem(where, hidden, expected, f"correct the value. {meaning}".strip())
    if kind == "string_type" and isinstance(found, bool | int | float):
        return Problem(where, describe(found), expected, "put it in quotes")
    return Problem(where, describe(found), expected, f"correct the value. {meaning}".strip())


def _unknown_key(
    keys: Keys, model: type[BaseModel] | None, candidates: Sequence[type[BaseModel]], where: str
) -> Problem:
    name, known = str(keys[-1]), list(model.model_fields) if model else []
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    others = [str(_kind(other)) for other in candidates if name in other.model_fields]
    elsewhere = [key for key in _every_key(Recipe) if key.rpartition(".")[2] == name]
    if others:
        remedy = f"remove it, or take kind: {' or '.join(others)}, which has it"
    elif near:
        remedy = f"did you mean {dotted((*keys[:-1], near[0]))}?"
    elif elsewhere:
        remedy = f"did you mean {elsewhere[0]}?"
    else:
        remedy = "remove it"
    return Problem(where, f"unknown key {name!r}", f"one of {', '.join(known)}", remedy)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "take one of these"


def describe(value: object) -> str:
    """A value as an error shows it: short, and with its type, since that may be what is wrong."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {_cut(', '.join(map(str, value)))}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, bool):
        return str(value).lower() + " (true or false)"
    words = {int: "a whole number", float: "a number", str: "text"}
    shown = repr(value) if isinstance(value, str) else str(value)
    return f"{_cut(shown)} ({words.get(type(value), type(value).__name__)})"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(keys: Keys) -> str:
    """A place as `--set` takes it: `prompts.0.path`."""
    return ".".join(map(str, keys))


def _keys(error: ErrorDetails, data: Mapping[Any, Any]) -> Keys:
    """Pydantic's place without the names of union members, which are no keys of the recipe."""
    value: Any = data
    keys: Keys = ()
    last = len(error["loc"]) - 1
    named = None
    for n, step in enumerate(error["loc"]):
        if isinstance(value, Mapping):
            # Once a mapping: a key of it may be called as its kind is.
            if n < last and step == value.get("kind") and named is not value:
                named = value
                continue
            if step in value or (n == last and error["type"] == "missing"):
                keys, value = (*keys, step), value.get(step)
        elif isinstance(value, list | tuple) and isinstance(step, int):
            keys, value = (*keys, step), value[step]
    return (*keys, "kind") if error["type"].startswith("union_tag") else keys


def _value(keys: Keys, data: Mapping[Any, Any]) -> Any:
    value: Any = data
    for key in keys:
        value = value[key]
    return value


def _candidates(keys: Keys, data: Mapping[Any, Any]) -> list[type[BaseModel]]:
    """The types that the mapping at a place could have, before its `kind` is looked at."""
    models: list[type[BaseModel]] = [Recipe]
    value: Any = data
    for key in keys:
        if isinstance(value, Mapping):
            model = _chosen(models, value)
            field = model.model_fields.get(str(key)) if model else None
            models = list(dict.fromkeys(_models(field.annotation))) if field else []
        value = value[key]
    return models


def _chosen(models: Sequence[type[BaseModel]], value: object) -> type[BaseModel] | None:
    """The one type among several that a mapping's `kind` names."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    named = [model for model in models if kind is not None and _kind(model) == kind]
    return named[0] if named else models[0] if len(models) == 1 else None


def _kind(model: type[BaseModel]) -> str | None:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every type of mapping that a field can hold, itself or in a list."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from _models(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType, tuple):
        for inner in typing.get_args(annotation):
            yield from _models(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _every_key(model: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield above + name
        entry = ".0" if typing.get_origin(field.annotation) is tuple else ""
        for inner in dict.fromkeys(_models(field.annotation)):
            yield from _every_key(inner, f"{above}{name}{entry}.")
