"""From a recipe file and `--set` overrides to a `Recipe`, with errors that point into the file.

Overrides go into the recipe before it is checked, so a key means the same in the file and on the command
line. Every problem is reported at once, each with its line, its dotted key, what was found and what was
expected. Unknown keys are errors and name the nearest known key.

`python -m limbeck.recipe_file PATH` writes the JSON Schema that editors use (docs/recipe.schema.json).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import JsonValue, ValidationError

from limbeck.errors import Problem, RecipeError
from limbeck.recipe import Recipe
from limbeck.recipe_problems import Keys, describe, dotted, problems

_START = "`limbeck init` writes a recipe to start from"
_MERGE = "tag:yaml.org,2002:merge"


class _Written(NamedTuple):
    """A recipe as it was written: the file's nodes know their lines, the rest came from the command line."""

    path: Path
    root: yaml.Node
    overridden: frozenset[Keys]

    def where(self, keys: Keys) -> str:
        """`recipe.yaml:12: train.epochs`, or `--set train.epochs` for what an override put there."""
        if any(keys[: len(place)] == place for place in self.overridden):
            return f"--set {dotted(keys)}"
        return f"{self.path}:{_line(self.root, keys)}: {dotted(keys)}" if keys else str(self.path)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, put the overrides (`train.epochs=3`, `prompts.0.path=x.jsonl`) into it, and check it.

    Relative paths of prompt files and models start at the recipe's directory, or at the working directory if
    they exist only there; the recipe that comes back holds absolute ones. Raises `RecipeError` with every
    problem where the file cannot be read or is not YAML, or where keys or values are wrong.
    """
    file = Path(path)
    root, data = _read(file)
    written = _Written(file, root, _override(data, overrides))
    _read_files(data, written)
    recipe = _check(data, written)
    resolved = _absolute_paths(recipe, file.absolute().parent)
    # Checked again because two ways to write one path may turn out to be the same teacher.
    return recipe if resolved == recipe.model_dump() else _check(resolved, written)


def json_schema() -> dict[str, JsonValue]:
    """The JSON Schema (draft 2020-12) of a recipe, with a description of every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _check(data: dict[str, Any], written: _Written) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found = problems(error.errors(include_url=False), data, written.where)
    raise RecipeError(f"{written.path}: the recipe is not right", found)


# Reading


def _read(file: Path) -> tuple[yaml.Node, dict[str, Any]]:
    """The file's nodes, which know their lines, and its values."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _no_recipe(file, "no such file", "a recipe in YAML", f"check the path; {_START}") from None
    except UnicodeDecodeError as error:
        raise _no_recipe(file, f"byte {error.start} is not UTF-8", "text in UTF-8", "save it as UTF-8") from None
    except OSError as error:
        found = error.strerror or str(error)
        raise _no_recipe(file, found, "a readable file", "check the path and its permissions") from None
    root, data = _parse(file, text)
    if root is None or data is None:
        raise _no_recipe(file, "nothing", "the keys of a recipe", _START)
    if not isinstance(data, dict):
        raise _no_recipe(file, describe(data), "a mapping of keys to values", _START)
    return root, data


def _no_recipe(where: Path | str, found: str, expected: str, remedy: str) -> RecipeError:
    return RecipeError("the recipe cannot be read", [Problem(str(where), found, expected, remedy)])


def _parse(file: Path, text: str) -> tuple[yaml.Node | None, Any]:
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        twice = sorted(_duplicates(file, root, (), set())) if root is not None else []
        data = loader.construct_document(root) if root is not None and not twice else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        remedy = "check indentation, colons and quotes thereabouts"
        found = ", ".join(filter(None, [error.context, error.problem]))
        raise _no_recipe(where, found, "YAML", remedy) from None
    except yaml.reader.ReaderError as error:
        found = f"the character U+{error.character:04X}, {error.position} characters in"
        raise _no_recipe(file, found, "printable text", "remove it") from None
    except (ValueError, RecursionError) as error:
        # A date that does not exist, a number too long to read, nesting without end.
        raise _no_recipe(file, str(error), "YAML values", "correct it, or put it in quotes") from None
    if twice:
        raise RecipeError("the recipe has keys that are written twice", twice)
    return root, data


def _duplicates(file: Path, node: yaml.Node, keys: Keys, seen: set[int]) -> Iterator[Problem]:
    """Keys that a mapping holds twice. YAML libraries let the last one win, silently."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            yield from _duplicates(file, child, (*keys, position), seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            place = (*keys, name)
            if name in lines and key.tag != _MERGE:
                found = f"the same key in line {lines[name]} and in line {line}"
                yield Problem(f"{file}:{line}: {dotted(place)}", found, "each key once", "remove one of them")
            lines[name] = line
            yield from _duplicates(file, child, place, seen)


def _line(root: yaml.Node, keys: Keys) -> int:
    """The line of a key, or of the nearest one above it that is in the file."""
    node, line = root, root.start_mark.line
    for step in keys:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((k.start_mark.line, v) for k, v in node.value if k.value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            found = node.value[step].start_mark.line, node.value[step]
        if found is None:
            break
        line, node = found
    return line + 1


# Overrides


def _override(data: dict[str, Any], overrides: Sequence[str]) -> frozenset[Keys]:
    """Put every `a.b=value` into the data; returns the places they went to."""
    places, wrong = set(), []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            wrong.append(Problem(f"--set {text}", "no key and value", "key=value", "write it as train.epochs=3"))
            continue
        try:
            place = _put(data, key.split("."), yaml.safe_load(value))
        except (yaml.YAMLError, ValueError, RecursionError):
            place = Problem(f"--set {key}", value, "a YAML value", "put text with special characters in quotes")
        if isinstance(place, Problem):
            wrong.append(place)
        else:
            places.add(place)
    if wrong:
        raise RecipeError("overrides that cannot be put into the recipe", wrong)
    return frozenset(places)


def _put(data: dict[str, Any], names: Sequence[str], value: object) -> Keys | Problem:
    """Put one value in its place, making mappings on the way; gives the place, or says why there is none."""
    where = f"--set {'.'.join(names)}"
    inner: Any = data
    keys: Keys = ()
    for name in names:
        step: Any = name
        if isinstance(inner, list):
            if not (name.isascii() and name.isdigit() and int(name) < len(inner)):
                found = f"{name!r} as a position in {dotted(keys)}, {describe(inner)}"
                expected = f"0 to {len(inner) - 1}" if inner else "a list with entries"
                return Problem(where, found, expected, f"or give the whole list: --set '{dotted(keys)}=[...]'")
            step = int(name)
        elif not isinstance(inner, dict):
            found = f"{dotted(keys)} is {describe(inner)}"
            return Problem(where, found, "a mapping or a list", f"give it whole: --set '{dotted(keys)}={{...}}'")
        keys = (*keys, step)
        if len(keys) == len(names):
            inner[step] = value
        elif isinstance(inner, dict) and inner.get(step) is None:
            inner[step] = {}
        inner = inner[step]
    return keys


# Paths


def _read_files(data: dict[str, Any], written: _Written) -> None:
    """Put in the recipe what stands in files of their own, so that it is evidence as a whole."""
    collect = data.get("collect")
    wrong = []
    for key in ("tools", "json_schema"):
        if not isinstance(collect, dict) or not isinstance(name := collect.get(key), str):
            continue
        place = _absolute(name, written.path.absolute().parent)
        try:
            collect[key] = json.loads(Path(place).read_text(encoding="utf-8"))
        except OSError as error:
            told = error.strerror or str(error)
            wrong.append(Problem(written.where(("collect", key)), f"{name}: {told}", "a JSON file", "check the path"))
        except (ValueError, RecursionError) as error:
            wrong.append(Problem(written.where(("collect", key)), f"{name}: {error}", "a JSON file", "correct it"))
    if wrong:
        raise RecipeError("files that the recipe names cannot be read", wrong)


def _absolute_paths(recipe: Recipe, base: Path) -> dict[str, Any]:
    """The recipe's values with the paths of prompt files and models absolute."""
    data = recipe.model_dump()
    for source in data["prompts"]:
        for rows in (source, *(value for value in source.values() if isinstance(value, dict))):
            # A data set's path may be a name on the hub: it is a path here where there is such a directory.
            if "path" in rows and (rows["kind"] == "file" or Path(_absolute(rows["path"], base)).is_dir()):
                rows["path"] = _absolute(rows["path"], base)
    teachers = data["teacher"] if isinstance(data["teacher"], tuple) else (data["teacher"],)
    if data["collect"]["journal"] is not None:
        data["collect"]["journal"] = _absolute(data["collect"]["journal"], base)
    for part in teachers:
        for key in ("api_key_file", "path"):
            if part.get(key):
                part[key] = _absolute(part[key], base)
    data["waivers"] = tuple(_absolute(path, base) for path in data["waivers"])
    for part in (*(teacher for teacher in teachers if teacher["kind"] == "local"), data["student"]):
        if "model" in part and _is_path(part["model"], base):
            was, part["model"] = part["model"], _absolute(part["model"], base)
            for source in data["prompts"]:
                if source.get("by") == was and part is not data["student"]:
                    source["by"] = part["model"]
    return data


def _is_path(model: str, base: Path) -> bool:
    """A model reference is a path if it looks like one, or if a directory or GGUF file has that name."""
    if model.startswith(("wheel:", "hf:")):
        return False
    if model.startswith(("./", "../", "~", "/")) or model in (".", ".."):
        return True
    place = Path(_absolute(model, base))
    return place.is_dir() or (place.suffix == ".gguf" and place.is_file())


def _absolute(path: str, base: Path) -> str:
    expanded = os.path.expanduser(path)
    here, there = base / expanded, Path.cwd() / expanded
    return os.path.abspath(there if there.exists() and not here.exists() else here)


def schema_text() -> str:
    """The JSON Schema as the file holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
    else:
        sys.stdout.write(schema_text())
