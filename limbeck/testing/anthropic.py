"""POST /v1/messages.

Fields of requests and answers as in the anthropic Python client 2.13 (generated from Anthropic's own description):
content blocks `thinking` (with `signature`), `text`, `tool_use`; stop_reason `end_turn`, `max_tokens`,
`stop_sequence`, `tool_use`, `refusal`. Streaming is not offered: `stream: true` is refused with a 400. The API has
no `n`, no `seed` and no log-probabilities.
"""

from __future__ import annotations

import orjson
from pydantic import Field, JsonValue

from limbeck.testing.answers import Answer, Ask, Json, Tool, compose
from limbeck.testing.calls import Call, Desk, Reply, Usage
from limbeck.testing.errors import Refused
from limbeck.testing.requests import Body, Message, checked, chosen, render, text_of

_STOP = {"stop": "end_turn", "length": "max_tokens", "tool": "tool_use", "filter": "refusal"}


class MessagesRequest(Body):
    """The keys that the server obeys."""

    model: str
    max_tokens: int = Field(ge=1)
    messages: list[Message] = Field(min_length=1)
    system: JsonValue = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    thinking: Json | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None
    output_config: Json | None = None
    stream: bool | None = False


def messages(desk: Desk, call: Call) -> Reply:
    """Answers a message."""
    request = checked(MessagesRequest, call.body)
    if request.stream:
        raise Refused("invalid", "stream: the test server does not stream")
    ask = _ask(request, call)
    model, prompt_tokens = desk.admitted(ask, "messages")
    answer = compose(ask, 0, model, desk.settings, desk.vocabulary)
    usage = Usage(ask.model, prompt_tokens, answer.tokens, answer.reasoning_tokens)
    empty = ask.twist is not None and ask.twist.kind == "empty"
    body = {
        "id": f"msg_{call.serial}",
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": [] if empty else _content(answer, ask, call),
        "stop_reason": _STOP.get(answer.finish, answer.finish),
        "stop_sequence": answer.stop_sequence,
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": usage.completion_tokens,
            "service_tier": "standard",
        },
    }
    return Reply(body, usage)


def _ask(request: MessagesRequest, call: Call) -> Ask:
    text, images = render(request.messages, text_of(request.system)[0])
    thinks = request.thinking is not None and request.thinking.get("type") in ("enabled", "adaptive")
    return Ask(
        model=request.model,
        seed=call.seed,
        prompt=text,
        extra_tokens=images,
        max_tokens=request.max_tokens,
        stop=tuple(request.stop_sequences or ()),
        tool=_tool(request),
        schema=_schema(request),
        reasoning=_budget(request) if thinks else 0,
        twist=call.twist,
    )


def _budget(request: MessagesRequest) -> int:
    """Tokens to think: an eighth of what is allowed, at most 64."""
    budget = (request.thinking or {}).get("budget_tokens")
    if isinstance(budget, int) and not isinstance(budget, bool):
        if budget < 1024:
            raise Refused("invalid", "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
        if budget >= request.max_tokens:
            raise Refused("invalid", "`max_tokens` must be greater than `thinking.budget_tokens`.")
        return min(64, budget // 8)
    return 64


def _schema(request: MessagesRequest) -> JsonValue:
    form = (request.output_config or {}).get("format")
    return form.get("schema") if isinstance(form, dict) and form.get("type") == "json_schema" else None


def _tool(request: MessagesRequest) -> Tool | None:
    tools = [
        Tool(str(item.get("name")), item.get("input_schema", {"type": "object"}))
        for item in request.tools or []
        if isinstance(item.get("name"), str)
    ]
    choice = request.tool_choice or {}
    kind = choice.get("type")
    content = request.messages[-1].content
    parts = content if isinstance(content, list) else []
    answered = any(isinstance(part, dict) and part.get("type") == "tool_result" for part in parts)
    name = str(choice.get("name")) if kind == "tool" else None
    return chosen(tools, str(kind) if kind else None, name, answered=answered)


def _content(answer: Answer, ask: Ask, call: Call) -> list[JsonValue]:
    blocks: list[JsonValue] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": call.seed.hex()})
    if answer.arguments is not None and ask.tool is not None:
        blocks.append({"type": "tool_use", "id": f"toolu_{call.serial}", "name": ask.tool.name,
                       "input": _arguments(answer.arguments)})  # fmt: skip
    elif answer.text:
        blocks.append({"type": "text", "text": answer.text})
    return blocks


def _arguments(text: str) -> JsonValue:
    """Arguments as an object; those cut off by the limit are left empty, for Anthropic sends no half JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
