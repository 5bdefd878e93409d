"""POST /v1/responses.

Fields of requests and answers as in the openai Python client 3.57: output items `reasoning`, `message` with
`output_text` or `refusal`, `function_call`; `status` and `incomplete_details`. Answers are not stored: there is no
GET /v1/responses, `previous_response_id` is refused, and so is `stream: true`.
"""

from __future__ import annotations

from pydantic import Field, JsonValue

from limbeck.testing.answers import Answer, Ask, Json, Tool, compose
from limbeck.testing.calls import Call, Desk, Reply, Usage
from limbeck.testing.errors import Refused
from limbeck.testing.openai_chat import token_logprobs
from limbeck.testing.requests import Body, Message, checked, chosen, render

_REASONS = {"length": "max_output_tokens", "filter": "content_filter"}


class ResponsesRequest(Body):
    """The keys that the server obeys."""

    model: str
    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=16)
    temperature: float | None = Field(default=1, ge=0, le=2)
    reasoning: Json | None = None
    text: Json | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    previous_response_id: str | None = None
    stream: bool | None = False
    metadata: Json | None = None


def responses(desk: Desk, call: Call) -> Reply:
    """Answers a response request."""
    request = checked(ResponsesRequest, call.body)
    if request.stream:
        raise Refused("invalid", "The test server does not stream.", param="stream")
    if request.previous_response_id is not None:
        raise Refused("not_found", "The test server stores no responses.", param="previous_response_id")
    ask = _ask(request, call)
    model, prompt_tokens = desk.admitted(ask, "input")
    answer = compose(ask, 0, model, desk.settings, desk.vocabulary)
    usage = Usage(ask.model, prompt_tokens, answer.tokens, answer.reasoning_tokens)
    reason = _REASONS.get(answer.finish)
    wanted = "message.output_text.logprobs" in (request.include or [])
    context = desk.vocabulary.encode(ask.prompt)
    logprobs = token_logprobs(desk, context, answer.text, request.top_logprobs or 0) if wanted else []
    empty = ask.twist is not None and ask.twist.kind == "empty"
    body = {
        "id": f"resp_{call.serial}",
        "object": "response",
        "created_at": int(call.time),
        "status": "incomplete" if reason else "completed",
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": ask.model,
        "output": [] if empty else _output(answer, ask, request, call, logprobs),
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **(request.reasoning or {})},
        "service_tier": "default",
        "temperature": request.temperature,
        "text": request.text or {"format": {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "metadata": request.metadata or {},
    }
    return Reply(body, usage)


def _ask(request: ResponsesRequest, call: Call) -> Ask:
    items: list[Json] = (
        [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    )
    if not items:
        raise Refused("invalid", "The input is empty.", param="input")
    text, images = render([_message(item) for item in items], request.instructions or "")
    form = (request.text or {}).get("format")
    form = form if isinstance(form, dict) else {}
    schema: JsonValue = {} if form.get("type") == "json_object" else None
    if form.get("type") == "json_schema":
        if not isinstance(form.get("schema"), dict):
            raise Refused("invalid", "Missing required parameter.", param="text.format.schema")
        schema = form["schema"]
    return Ask(
        model=request.model,
        seed=call.seed,
        prompt=text,
        extra_tokens=images,
        max_tokens=request.max_output_tokens,
        tool=_tool(request, items),
        schema=schema,
        twist=call.twist,
    )


def _message(item: Json) -> Message:
    """An input item as a message: messages as they are, results of functions as a tool's."""
    if item.get("type") == "function_call_output":
        return Message(role="tool", content=item.get("output"))
    return Message(role=str(item.get("role", "assistant")), content=item.get("content", item.get("arguments")))


def _tool(request: ResponsesRequest, items: list[Json]) -> Tool | None:
    tools = [
        Tool(str(item["name"]), item.get("parameters") or {"type": "object"})
        for item in request.tools or []
        if item.get("type") == "function" and "name" in item
    ]
    choice, name = request.tool_choice, None
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = str(choice.get("name"))
    answered = items[-1].get("type") == "function_call_output"
    return chosen(tools, choice if isinstance(choice, str) else None, name, answered=answered)


def _output(
    answer: Answer, ask: Ask, request: ResponsesRequest, call: Call, logprobs: list[JsonValue]
) -> list[JsonValue]:
    status = "incomplete" if answer.finish in _REASONS else "completed"
    items: list[JsonValue] = []
    if answer.reasoning:
        summarised = (request.reasoning or {}).get("summary") is not None
        summary: list[JsonValue] = [{"type": "summary_text", "text": answer.reasoning}] if summarised else []
        items.append({"type": "reasoning", "id": f"rs_{call.serial}", "summary": summary, "status": "completed"})
    if answer.arguments is not None and ask.tool is not None:
        items.append({"type": "function_call", "id": f"fc_{call.serial}", "call_id": f"call_{call.serial}",
                      "name": ask.tool.name, "arguments": answer.arguments, "status": status})  # fmt: skip
    elif answer.text:
        content: JsonValue = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": logprobs}
        if answer.finish == "refusal":
            content = {"type": "refusal", "refusal": answer.text}
        items.append({"type": "message", "id": f"msg_{call.serial}", "status": status, "role": "assistant",
                      "content": [content]})  # fmt: skip
    return items
