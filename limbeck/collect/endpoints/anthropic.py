"""Anthropic's messages API, version 2023-06-01.

It takes no seed: samples of one prompt differ by chance, and by their number in the journal's key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from limbeck import recipe
from limbeck.collect.contents import Wanted
from limbeck.collect.endpoints import forms
from limbeck.collect.endpoints.dialects import NOTHING, Body, Read, nothing
from limbeck.collect.endpoints.reply import MALFORMED, error_of, mapping, refusal_reason, text, usage_of
from limbeck.collect.teachers import Parsed
from limbeck.records import Message

_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refusal",
    "tool_use": "tool_calls",
}
"""From `stop_reason` to the words of this package; others are kept as they are."""


class AnthropicMessages:
    """A `Dialect`."""

    form = "anthropic-messages/1"

    def address(self, base_url: str) -> str:
        """See `Dialect.address`."""
        return f"{base_url}/messages" if base_url.endswith("/v1") else f"{base_url}/v1/messages"

    def headers(self, key: str | None) -> dict[str, str]:
        """See `Dialect.headers`."""
        version = {"anthropic-version": "2023-06-01"}
        return version | {"x-api-key": key} if key else version

    def body(
        self, model: str, messages: Sequence[Message], settings: recipe.Collect, seed: int, wanted: Wanted = NOTHING
    ) -> Body:
        """See `Dialect.body`. System messages stand apart; current models refuse `top_p` beside `temperature`, so it is
        sent only where it is not 1.
        """
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        body: dict[str, JsonValue] = {
            "model": model,
            "messages": forms.anthropic_turns(messages),
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        if system:
            body["system"] = system
        if settings.top_p != 1:
            body["top_p"] = settings.top_p
        if wanted.tools:
            body["tools"] = [forms.anthropic_tool(tool) for tool in wanted.tools]
        if wanted.json_schema is not None:
            # Without a beta header since early 2026; before that it was `output_format`.
            body["output_config"] = {"format": {"type": "json_schema", "schema": wanted.json_schema}}
        return body

    def read(self, found: Mapping[str, JsonValue]) -> Read:
        """See `Dialect.read`."""
        if (error := error_of(found)) is not None:
            return nothing(refusal_reason(error))
        said = mapping(found.get("usage"))
        prompt = [said.get(f"{kind}input_tokens") for kind in ("", "cache_creation_", "cache_read_")]
        usage = usage_of(prompt, said.get("output_tokens"))
        model, blocks, stop = text(found.get("model")), found.get("content"), found.get("stop_reason")
        if not isinstance(blocks, list) or not isinstance(stop, str):
            return nothing(MALFORMED, model)._replace(usage=usage)
        counts = (usage.prompt, usage.completion) if usage else (0, 0)
        reasoning = _joined(blocks, "thinking") or None
        calls = forms.read_items(blocks, "tool_use", "id", "input")
        said = Parsed(_joined(blocks, "text"), reasoning, _REASONS.get(stop, stop), model, *counts, tool_calls=calls)
        return Read(said, usage)


def _joined(blocks: Sequence[JsonValue], kind: str) -> str:
    """What all blocks of a type say; a block has its words under the name of its type."""
    return "".join(text(mapping(block).get(kind)) for block in blocks if mapping(block).get("type") == kind)
