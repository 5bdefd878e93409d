"""Writes docs/recipe.md from the Recipe itself: `python tools/recipe_docs.py > docs/recipe.md`."""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from limbeck.recipe import Recipe

EXACT = Lt(2**53)
"""The limit of every whole number is said once."""

HEAD = """# The recipe, key by key

A recipe is a YAML file. Unknown keys are errors; every key below can also be set at the command line, as
`--set train.epochs=3` or `--set prompts.0.path=other.jsonl`. The same as a schema for editors:
[recipe.schema.json](recipe.schema.json). Whole numbers are below 2^53, from where on JSON is not exact.

This page is made from `limbeck/recipe/` by `make docs`.
"""


def parts(annotation: Any) -> list[type[BaseModel]]:
    """The recipe parts that an annotation can hold, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in typing.get_args(annotation) for part in parts(inner)]


def allowed(field: FieldInfo) -> str:
    """What the values of a field may be, in words."""
    text = words(field.annotation)
    bounds = {Gt: "above {}", Ge: "at least {}", Lt: "below {}", Le: "at most {}"}
    limits = [
        bounds[kind].format(getattr(rule, kind.__name__.lower()))
        for rule in field.metadata
        for kind in bounds
        if isinstance(rule, kind) and rule != EXACT
    ]
    return f"{text}, {', '.join(limits)}" if limits else text


def words(annotation: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin is typing.Annotated:
        return words(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(a) for a in inner if a is not type(None))) + (
            " or nothing" if type(None) in inner else ""
        )
    if origin is dict:
        return "keys and values"
    if origin is tuple:
        return f"list of {words(inner[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true \\| false"}.get(annotation, "a part, below")


def default(field: FieldInfo) -> str:
    """The default as YAML would have it."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "see below"
    return "nothing" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(part: type[BaseModel]) -> str:
    """One part's keys as a table."""
    rows = [
        f"| `{name}` | {allowed(field)} | {default(field)} | {' '.join((field.description or '').split())} |"
        for name, field in part.model_fields.items()
    ]
    return "\n".join(["| key | values | default | |", "|---|---|---|---|", *rows])


def page() -> str:
    """The whole page."""
    out = [HEAD, "## Top level\n", table(Recipe), ""]
    for name, field in Recipe.model_fields.items():
        for part in dict.fromkeys(parts(field.annotation)):
            kind = part.model_fields.get("kind")
            title = f"`{name}`" + (f", kind `{kind.default}`" if kind else "")
            out += [f"## {title}\n", " ".join((part.__doc__ or "").split()) + "\n", table(part), ""]
            for inner_name, inner in part.model_fields.items():
                for nested in dict.fromkeys(parts(inner.annotation)):
                    out += [
                        f"### `{name}.{inner_name}`\n",
                        " ".join((nested.__doc__ or "").split()) + "\n",
                        table(nested),
                        "",
                    ]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
