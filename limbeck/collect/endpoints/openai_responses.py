"""OpenAI's responses API, one question at a time: nothing is stored at the provider, and no answer builds on another.

It takes no seed: samples of one prompt differ by chance, and by their number in the journal's key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from limbeck import recipe
from limbeck.collect.contents import Wanted
from limbeck.collect.endpoints import forms
from limbeck.collect.endpoints.dialects import NOTHING, Body, Read, nothing
from limbeck.collect.endpoints.reply import (
    MALFORMED,
    error_of,
    items,
    mapping,
    refusal_reason,
    text,
    usage_of,
)
from limbeck.collect.teachers import Parsed
from limbeck.records import Message

_INCOMPLETE = {"max_output_tokens": "length", "content_filter": "content_filter"}
"""From the reason for an incomplete answer to the words of this package; others are kept as they are."""
_CALLS = frozenset({"function_call", "custom_tool_call"})


class OpenAIResponses:
    """A `Dialect`."""

    form = "openai-responses/1"

    def address(self, base_url: str) -> str:
        """See `Dialect.address`."""
        return f"{base_url}/responses"

    def headers(self, key: str | None) -> dict[str, str]:
        """See `Dialect.headers`."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(
        self, model: str, messages: Sequence[Message], settings: recipe.Collect, seed: int, wanted: Wanted = NOTHING
    ) -> Body:
        """See `Dialect.body`."""
        body: dict[str, JsonValue] = {
            "model": model,
            "input": forms.response_items(messages),
            "max_output_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "store": False,
        }
        if settings.top_p != 1:
            body["top_p"] = settings.top_p
        if wanted.tools:
            body["tools"] = [forms.response_tool(tool) for tool in wanted.tools]
        if wanted.json_schema is not None:
            body["text"] = forms.text_format(wanted.json_schema)
        if settings.logprobs is not None:
            body |= {"include": ["message.output_text.logprobs"], "top_logprobs": settings.logprobs}
        return body

    def read(self, found: Mapping[str, JsonValue]) -> Read:
        """See `Dialect.read`."""
        said = mapping(found.get("usage"))
        usage = usage_of([said.get("input_tokens")], said.get("output_tokens"))
        model, output, status = text(found.get("model")), found.get("output"), found.get("status")
        if (error := error_of(found)) is not None:
            return nothing(refusal_reason(error), model)._replace(usage=usage)
        if not isinstance(output, list) or not isinstance(status, str):
            return nothing(MALFORMED, model)._replace(usage=usage)
        answer, refusal = _parts(output, "output_text", "text"), _parts(output, "refusal", "refusal")
        counts = (usage.prompt, usage.completion) if usage else (0, 0)
        reason = "refusal" if refusal else _reason(found, output, status)
        calls = forms.read_items(output, "function_call", "call_id", "arguments")
        return Read(Parsed(answer or refusal, _reasoning(output), reason, model, *counts, tool_calls=calls), usage)


def _reason(found: Mapping[str, JsonValue], output: Sequence[JsonValue], status: str) -> str:
    if status == "incomplete":
        why = text(mapping(found.get("incomplete_details")).get("reason"))
        return _INCOMPLETE.get(why, why or status)
    if status != "completed":
        return status
    return "tool_calls" if any(text(mapping(item).get("type")) in _CALLS for item in output) else "stop"


def _parts(output: Sequence[JsonValue], kind: str, key: str) -> str:
    """What all parts of this type say, over all messages."""
    parts = [mapping(part) for item in output for part in items(mapping(item).get("content"))]
    return "".join(text(part.get(key)) for part in parts if part.get("type") == kind)


def _reasoning(output: Sequence[JsonValue]) -> str | None:
    """The reasoning itself where the server shows it (vLLM), or else its summary."""
    whole = _parts(output, "reasoning_text", "text")
    summaries = [mapping(part) for item in output for part in items(mapping(item).get("summary"))]
    return whole or "\n\n".join(said for part in summaries if (said := text(part.get("text")))) or None
