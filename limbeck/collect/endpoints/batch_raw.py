"""How an answer that came in a batch lies in the journal: a line that names the batch, then the result as it came.

Whoever reads an answer gets the same out of it, whichever way it came: `unwrapped` gives the body that the endpoint
would have answered with.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from pydantic import JsonValue

from limbeck.collect.endpoints.reply import document, mapping

_MARK = b"\x1ebatch "
"""No JSON begins so (RFC 8259), and no server's words: an answer that was asked for alone is never taken for one."""


def wrapped(name: str, line: bytes) -> bytes:
    """What is journaled of a result: the provider's id of the batch, and the line."""
    return _MARK + name.encode() + b"\n" + line


def batch_of(raw: bytes) -> str | None:
    """The provider's id of the batch in which an answer came; None where it was asked for alone."""
    return raw[len(_MARK) : raw.index(b"\n")].decode() if raw.startswith(_MARK) else None


def unwrapped(raw: bytes) -> bytes:
    """The body of an answer."""
    if not raw.startswith(_MARK):
        return raw
    found = document(raw[raw.index(b"\n") + 1 :])
    return orjson.dumps(body_of(found or {}))


def body_of(found: Mapping[str, JsonValue]) -> JsonValue:
    """The body in one line of results: OpenAI's under `response`, or its `error`; Anthropic's under `result`."""
    if "result" in found:
        result = mapping(found["result"])
        return result.get("message") if result.get("type") == "succeeded" else result.get("error")
    response = mapping(found.get("response"))
    return response.get("body") if response else {"error": found.get("error")}
