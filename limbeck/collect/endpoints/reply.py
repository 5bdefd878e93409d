"""What an endpoint sent, looked at without trust: any JSON value may stand in any place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import orjson
from pydantic import JsonValue

MALFORMED = "malformed"
"""Finish reason of an answer that is not what the API promises."""


class Usage(NamedTuple):
    """Tokens as the provider counted them, which is how it bills them."""

    prompt: int
    completion: int
    """Reasoning included."""


def document(raw: bytes) -> Mapping[str, JsonValue] | None:
    """The JSON object in these bytes; None where there is none."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    """The object that is there, or an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: JsonValue) -> Sequence[JsonValue]:
    """The list that is there, or an empty one."""
    return value if isinstance(value, list) else ()


def text(value: JsonValue) -> str:
    """The text that is there, or an empty one."""
    return value if isinstance(value, str) else ""


def count(value: JsonValue) -> int | None:
    """The number of things that is there, or None; what 64 bits cannot hold is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def usage_of(prompt: Sequence[JsonValue], completion: JsonValue) -> Usage | None:
    """The usage where it was said: prompt tokens may be counted in several parts, of which the first must be there."""
    parts, written = [count(part) for part in prompt], count(completion)
    if not parts or parts[0] is None or written is None:
        return None
    return Usage(sum(part or 0 for part in parts), written)


def error_of(found: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
    """The error that an endpoint answered with instead of a completion; None where there is none.

    OpenAI and Anthropic have an object under `error`; some servers have the fields at the top, or a text.
    """
    error = found.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):
        return {"message": error}
    if found.get("object") == "error" or found.get("type") == "error":
        return found
    return None


def refusal_reason(error: Mapping[str, JsonValue]) -> str:
    """The finish reason for a prompt that was refused before the model saw it."""
    said = " ".join(text(error.get(key)).lower() for key in ("code", "type", "message"))
    if "content_filter" in said or "content_policy" in said or "moderation" in said:
        return "content_filter"
    if any(sign in said for sign in ("context_length", "context length", "context size", "prompt is too long")):
        return "context_length"
    return "error"


def split_thinking(answer: str) -> tuple[str, str | None]:
    """Answer and reasoning, where a server leaves the reasoning in the text as `<think>...</think>` before it."""
    start = answer.lstrip()
    if not start.startswith("<think>") or "</think>" not in start:
        return answer, None
    reasoning, _, rest = start.removeprefix("<think>").partition("</think>")
    return rest.lstrip("\n"), reasoning.strip("\n") or None
