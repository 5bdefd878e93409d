"""OpenAI's chat completions, which vLLM, llama.cpp's server, Ollama, SGLang and the routers speak too.

Reasoning stands under `reasoning_content` (DeepSeek, llama.cpp, older vLLM) or `reasoning` (newer vLLM, OpenRouter).
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
    split_thinking,
    text,
    usage_of,
)
from limbeck.collect.teachers import Parsed
from limbeck.records import Message

_REASONS = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}
"""From what servers say to the words of this package; others are kept as they are."""


class OpenAIChat:
    """A `Dialect`."""

    form = "openai-chat/1"

    def __init__(self, limit_key: str):
        self._limit_key = limit_key

    def address(self, base_url: str) -> str:
        """See `Dialect.address`."""
        return f"{base_url}/chat/completions"

    def headers(self, key: str | None) -> dict[str, str]:
        """See `Dialect.headers`."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(
        self, model: str, messages: Sequence[Message], settings: recipe.Collect, seed: int, wanted: Wanted = NOTHING
    ) -> Body:
        """See `Dialect.body`. `top_p` is left out where it is 1, because some models refuse it."""
        body: dict[str, JsonValue] = {
            "model": model,
            "messages": [forms.chat_message(message) for message in messages],
            self._limit_key: settings.max_tokens,
            "temperature": settings.temperature,
            "seed": seed,
        }
        if settings.top_p != 1:
            body["top_p"] = settings.top_p
        if wanted.tools:
            body["tools"] = [forms.chat_tool(tool) for tool in wanted.tools]
        if wanted.json_schema is not None:
            body["response_format"] = forms.response_format(wanted.json_schema)
        if settings.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": settings.logprobs}
        return body

    def read(self, found: Mapping[str, JsonValue]) -> Read:
        """See `Dialect.read`."""
        said = mapping(found.get("usage"))
        usage = usage_of([said.get("prompt_tokens")], said.get("completion_tokens"))
        model, choices = text(found.get("model")), items(found.get("choices"))
        if not choices:
            error = error_of(found)
            return nothing(MALFORMED if error is None else refusal_reason(error), model)._replace(usage=usage)
        choice = mapping(choices[0])
        message = choice.get("message")
        if not isinstance(message, dict):
            return nothing(MALFORMED, model)._replace(usage=usage)
        answer, reasoning, reason = _said(message, choice.get("finish_reason"))
        counts = (usage.prompt, usage.completion) if usage else (0, 0)
        calls = forms.read_chat_calls(message.get("tool_calls"))
        return Read(Parsed(answer, reasoning, reason, model, *counts, tool_calls=calls), usage)


def _said(message: Mapping[str, JsonValue], finish: JsonValue) -> tuple[str, str | None, str]:
    """Answer, reasoning and finish reason of one message."""
    content, refusal = _content(message.get("content")), text(message.get("refusal"))
    reasoning = text(message.get("reasoning_content")) or text(message.get("reasoning")) or None
    if reasoning is None:
        content, reasoning = split_thinking(content)
    if refusal:
        return content or refusal, reasoning, "refusal"
    if not isinstance(finish, str):
        return content, reasoning, MALFORMED
    return content, reasoning, _REASONS.get(finish, finish)


def _content(value: JsonValue) -> str:
    """Text, or the texts of a list of parts."""
    if isinstance(value, list):
        return "".join(text(mapping(part).get("text")) for part in value)
    return text(value)
