"""What a row of a prompt file says beyond text: calls of functions and their results, images, tools, a schema.

Forms are those of OpenAI's chat completions. Images are data URLs, addresses, or paths relative to the prompt file,
which are read and embedded.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue, ValidationError

from limbeck.ledger.canonical import digest_bytes
from limbeck.records import Message, Part, Tool, ToolCall

IMAGE_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "gif": "image/gif", "webp": "image/webp"}
"""By suffix: what every API takes."""


class NotThis(ValueError):  # noqa: N818 - caught where the row is known
    """Something that is not what it should be: `found`, `expected`, `remedy`."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(found)
        self.told = (found, expected, remedy)


class Wanted(NamedTuple):
    """What a prompt asks for beside an answer in words; None leaves it to the recipe."""

    tools: tuple[Tool, ...] | None = None
    json_schema: dict[str, JsonValue] | None = None


def message_of(where: str, item: Mapping[str, JsonValue], base: Path) -> Message:
    """A message with more than a role and text. Raises `NotThis`."""
    known = {"role", "content", "tool_calls", "tool_call_id", "name"}
    if more := sorted(key for key, value in item.items() if key not in known and value is not None):
        raise NotThis(f"{where} has {', '.join(more)} too", f"nothing but {', '.join(sorted(known))}", "remove them")
    role, content = str(item.get("role")), item.get("content")
    called, answered = item.get("tool_calls"), item.get("tool_call_id")
    if called is not None and role != "assistant":
        raise NotThis(f"{where}: tool_calls by {role}", "tool_calls of an assistant", "remove them")
    if answered is not None and (role != "tool" or not isinstance(answered, str)):
        raise NotThis(f"{where}: tool_call_id of {role}", "a text, in a message of role tool", "remove it")
    calls = _calls(where, called) if called is not None else None
    parts = _parts(where, content, base) if isinstance(content, list) else None
    if parts is None and not isinstance(content, str) and not (content is None and calls):
        raise NotThis(f"{where}.content: {json.dumps(content)[:72]}", "text, or a list of parts", "write it as text")
    text = content if isinstance(content, str) else "\n".join(p.text for p in parts or () if p.text is not None)
    has_images = any(part.image is not None for part in parts or ())
    if has_images and role != "user":
        raise NotThis(f"{where}: an image of role {role}", "images of the user", "move it into a user's message")
    return Message.model_validate(
        {"role": role, "content": text, "parts": parts if has_images else None, "tool_calls": calls,
         "tool_call_id": answered}
    )  # fmt: skip


def _calls(where: str, value: JsonValue) -> tuple[ToolCall, ...]:
    expected = '[{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}]'
    if not isinstance(value, list) or not value:
        raise NotThis(f"{where}.tool_calls: {json.dumps(value)[:72]}", expected, "write the calls as OpenAI does")
    calls = []
    for item in value:
        function = item.get("function") if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(item, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise NotThis(f"{where}.tool_calls: {json.dumps(item)[:72]}", expected, "write the calls as OpenAI does")
        given, id_ = function.get("arguments", "{}"), item.get("id")
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        call = ToolCall(name=name, arguments=text, id=id_ if isinstance(id_, str) else None)
        try:
            call.values()
        except ValueError:
            raise NotThis(f"{where}.tool_calls: arguments {text[:72]}", "a JSON object", "correct them") from None
        calls.append(call)
    return tuple(calls)


def _parts(where: str, value: Sequence[JsonValue], base: Path) -> tuple[Part, ...]:
    parts = []
    for item in value:
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(item, dict) and kind in ("text", "input_text") and isinstance(text := item.get("text"), str):
            parts.append(Part(text=text))
        elif isinstance(item, dict) and kind in ("image_url", "input_image"):
            inner = item.get("image_url")
            url = inner.get("url") if isinstance(inner, dict) else inner
            if not isinstance(url, str):
                expected = '{"type": "image_url", "image_url": {"url": "..."}}'
                raise NotThis(f"{where}: an image without its url", expected, "give its address, path, or data: URL")
            parts.append(_image(where, url, base))
        else:
            found, expected = f"{where}.content: {json.dumps(value)[:72]}", "text, or parts of type text or image_url"
            raise NotThis(found, expected, "write the content as text, or name the part's type")
    return tuple(parts)


def _image(where: str, url: str, base: Path) -> Part:
    """An image as it is sent, with the digest of its bytes where they are here."""
    if url.startswith(("http://", "https://")):
        return Part(image=url)
    if url.startswith("data:"):
        head, comma, body = url.partition(",")
        kind = head.removeprefix("data:").removesuffix(";base64")
        if not comma or not head.endswith(";base64") or kind not in IMAGE_TYPES.values():
            kinds = ", ".join(sorted(set(IMAGE_TYPES.values())))
            raise NotThis(f"{where}: {head[:72]}", f"data:TYPE;base64, with TYPE one of {kinds}", "encode it so")
        try:
            data = base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise NotThis(f"{where}: an image whose base64 is damaged ({error})", "base64", "encode it again") from None
    else:
        path = base / url
        kind = IMAGE_TYPES.get(path.suffix.lower().removeprefix("."), "")
        if not kind:
            known = ", ".join(f".{name}" for name in IMAGE_TYPES)
            raise NotThis(f"{where}: image {url[:72]}", f"a suffix of {known}", "convert it, or give a data: URL")
        try:
            data = path.read_bytes()
        except OSError as error:
            why = error.strerror or str(error)
            remedy = "correct the path; a relative one starts at the prompt file"
            raise NotThis(f"{where}: image {url[:72]}: {why}", "a file that can be read", remedy) from None
    if not data:
        raise NotThis(f"{where}: an image of no bytes", "an image", "correct it, or remove the row")
    return Part(image=f"data:{kind};base64,{base64.b64encode(data).decode()}", digest=digest_bytes(data))


def wanted_of(row: Mapping[str, JsonValue]) -> Wanted:
    """Tools and schema of a row, which a table may hold as JSON text. Raises `NotThis`."""
    given = {}
    for name in ("tools", "json_schema"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError:
                raise NotThis(f"{name}: {value[:72]}", "JSON", f"correct {name}, or leave it empty") from None
        given[name] = value or None
    tools = tools_of(given["tools"]) if given["tools"] is not None else None
    return Wanted(tools, schema_of(given["json_schema"]) if given["json_schema"] is not None else None)


def tools_of(value: object) -> tuple[Tool, ...]:
    """Tools in OpenAI's form. Raises `NotThis`."""
    expected = '[{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        function = item.get("function") if isinstance(item, Mapping) else None
        try:
            if not isinstance(function, Mapping):
                raise NotThis(f"tools: {str(item)[:72]}", expected, "write tools as OpenAI's chat completions do")
            keys = {"name", "description", "parameters"}
            found.append(Tool.model_validate({key: function[key] for key in keys if function.get(key) is not None}))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise NotThis(f"tools: {wrong}", expected, "write tools as OpenAI's chat completions do") from None
    names = [tool.name for tool in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise NotThis(f"tools: {', '.join(twice)} twice", "each name once", "rename one of them")
    return tuple(found)


def schema_of(value: object) -> dict[str, JsonValue]:
    """A JSON Schema, itself checked. Raises `NotThis`."""
    from jsonschema import SchemaError  # of the extra `collect`
    from jsonschema.validators import validator_for

    if not isinstance(value, dict):
        raise NotThis(f"json_schema: {str(value)[:72]}", "a JSON Schema, which is an object", "correct it")
    try:
        validator_for(value).check_schema(value)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "the whole"
        raise NotThis(f"json_schema, at {where}: {error.message[:200]}", "a JSON Schema", "correct it") from None
    return value


def mismatch(text: str, json_schema: dict[str, JsonValue]) -> str | None:
    """How an answer is not what a schema asks for; None where it is."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {str(error)[:200]}"
    try:
        worst = best_match(validator_for(json_schema)(json_schema).iter_errors(value))
    except RecursionError:
        return "nested too deeply to be checked"
    if worst is None:
        return None
    where = ".".join(map(str, worst.absolute_path))
    return f"{where + ': ' if where else ''}{worst.message[:200]}"
