"""An instance of a JSON schema, chosen by a digest: what a model with structured output would write.

Covers what providers accept in structured output: type, properties, required, items, enum, const, anyOf, oneOf,
allOf, $ref into the same document, bounds of numbers, lengths of strings and arrays, and the formats date,
date-time and email. `pattern` is not obeyed.
"""

from __future__ import annotations

import hashlib

from pydantic import JsonValue

from limbeck.testing.vocabulary import WORDS

_DEPTH = 12
"""Beyond it, optional properties are left out and arrays are as short as they may be, so recursion ends."""

_FORMATS = {"date": "2026-01-01", "date-time": "2026-01-01T00:00:00Z", "email": "batu@example.org"}


def instance(schema: JsonValue, digest: bytes) -> JsonValue:
    """A value that the schema accepts; equal arguments, equal value."""
    return _Maker(schema, digest).make(schema, 0)


def spoilt(made: JsonValue, schema: JsonValue) -> JsonValue:
    """Something near to an instance that the schema does not accept: without one property, or of another type. Null
    where the schema accepts all of that.
    """
    from jsonschema.validators import validator_for

    names = list(made) if isinstance(made, dict) else []
    tried: list[JsonValue] = [{key: made[key] for key in names if key != name} for name in names]  # type: ignore[index]
    whole = schema if isinstance(schema, dict | bool) else {}
    checked = validator_for(whole)(whole)
    return next((value for value in [*tried, [], {}, "", 0, False] if not checked.is_valid(value)), None)


class _Maker:
    def __init__(self, root: JsonValue, digest: bytes):
        self._root, self._digest, self._drawn = root, digest, 0

    def _draw(self, bound: int) -> int:
        self._drawn += 1
        seed = self._digest + self._drawn.to_bytes(4, "big")
        return int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big") % bound

    def make(self, schema: JsonValue, depth: int) -> JsonValue:
        if not isinstance(schema, dict):
            return self._word()
        if isinstance(ref := schema.get("$ref"), str):
            return self.make(self._resolve(ref), depth + 1)
        if "const" in schema:
            return schema["const"]
        if isinstance(choices := schema.get("enum"), list) and choices:
            return choices[self._draw(len(choices))]
        for key in ("anyOf", "oneOf"):
            if isinstance(members := schema.get(key), list) and members:
                return self.make(members[-1 if depth > _DEPTH else self._draw(len(members))], depth + 1)
        if isinstance(parts := schema.get("allOf"), list) and parts:
            schema = _merged([schema, *(self._followed(part) for part in parts)])
        return self._typed(schema, depth)

    def _typed(self, schema: dict[str, JsonValue], depth: int) -> JsonValue:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = kind[0]
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return bool(self._draw(2))
        return None if kind == "null" else self._string(schema)

    def _object(self, schema: dict[str, JsonValue], depth: int) -> JsonValue:
        properties, required = schema.get("properties"), schema.get("required")
        needed = required if isinstance(required, list) else []
        wanted = properties if isinstance(properties, dict) else {}
        made = {name: self.make(part, depth + 1) for name, part in wanted.items() if depth < _DEPTH or name in needed}
        return {**made, **{str(name): self._word() for name in needed if name not in made}}

    def _array(self, schema: dict[str, JsonValue], depth: int) -> JsonValue:
        least, most = _whole(schema, "minItems", 0), _whole(schema, "maxItems", 1 << 30)
        count = least if depth > _DEPTH else min(max(least, 1 + self._draw(2)), most)
        return [self.make(schema.get("items", {"type": "string"}), depth + 1) for _ in range(count)]

    def _number(self, schema: dict[str, JsonValue], *, whole: bool) -> JsonValue:
        low = _bound(schema, "minimum", "exclusiveMinimum", 1)
        high = _bound(schema, "maximum", "exclusiveMaximum", -1)
        low = (0 if high is None else min(0, high)) if low is None else low
        high = low + 100 if high is None else high
        step = schema.get("multipleOf", 1)
        if not isinstance(step, int | float) or step <= 0:
            step = 1
        first, last = -(-low // step), high // step
        if last < first:
            return (low + high) / 2
        value = (first + self._draw(int(last - first) + 1)) * step
        return int(value) if whole else value

    def _string(self, schema: dict[str, JsonValue]) -> str:
        if (form := schema.get("format")) in _FORMATS:
            return _FORMATS[str(form)]
        text = " ".join(self._word() for _ in range(1 + self._draw(3)))
        while len(text) < _whole(schema, "minLength", 0):
            text += " " + self._word()
        return text[: _whole(schema, "maxLength", len(text))]

    def _word(self) -> str:
        return WORDS[self._draw(len(WORDS))]

    def _resolve(self, ref: str) -> JsonValue:
        found: JsonValue = self._root
        for step in ref.removeprefix("#").strip("/").split("/") if ref != "#" else []:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        return found

    def _followed(self, schema: JsonValue) -> dict[str, JsonValue]:
        while isinstance(schema, dict) and isinstance(ref := schema.get("$ref"), str):
            schema = self._resolve(ref)
        return schema if isinstance(schema, dict) else {}


def _merged(parts: list[dict[str, JsonValue]]) -> dict[str, JsonValue]:
    """One schema of several that all hold: properties and required names together, of the rest the last."""
    properties: dict[str, JsonValue] = {}
    required: list[JsonValue] = []
    whole: dict[str, JsonValue] = {}
    for part in parts:
        whole |= part
        if isinstance(some := part.get("properties"), dict):
            properties |= some
        if isinstance(names := part.get("required"), list):
            required += names
    return {**whole, "properties": properties, "required": required}


def _whole(schema: dict[str, JsonValue], key: str, default: int) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) else default


def _bound(schema: dict[str, JsonValue], key: str, strict: str, inward: int) -> float | None:
    value, beyond = schema.get(key), schema.get(strict)
    if isinstance(beyond, int | float) and not isinstance(beyond, bool):
        return beyond + inward
    return value if isinstance(value, int | float) else None
