"""POST /v1/chat/completions.

Fields of requests and answers as in the openai Python client 3.57 (generated from OpenAI's own description). From
elsewhere: `reasoning_content` (DeepSeek, vLLM) and `reasoning` (newer vLLM) beside `content`. Streaming is not
offered: `stream: true` is refused with a 400. Images, in messages, cost 85 tokens each and change the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, JsonValue

from limbeck.testing.answers import Answer, Ask, Json, Tool, compose
from limbeck.testing.calls import Call, Desk, Reply, Usage
from limbeck.testing.errors import Refused
from limbeck.testing.requests import Body, Message, checked, chosen, render, stops

_FINISH = {"stop_sequence": "stop", "tool": "tool_calls", "filter": "content_filter", "refusal": "stop"}


class ChatRequest(Body):
    """The keys that the server obeys."""

    model: str
    messages: list[Message] = Field(min_length=1)
    n: int | None = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=1, ge=0, le=2)
    seed: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    response_format: Json | None = None
    stream: bool | None = False


def chat(desk: Desk, call: Call) -> Reply:
    """Answers a chat."""
    request = checked(ChatRequest, call.body)
    if request.stream:
        raise Refused("invalid", "The test server does not stream.", param="stream")
    ask = _ask(request, call)
    model, prompt_tokens = desk.admitted(ask, "messages")
    answers = [compose(ask, choice, model, desk.settings, desk.vocabulary) for choice in range(ask.n)]
    usage = Usage(ask.model, prompt_tokens, sum(a.tokens for a in answers), sum(a.reasoning_tokens for a in answers))
    empty = ask.twist is not None and ask.twist.kind == "empty"
    context = desk.vocabulary.encode(ask.prompt) if request.logprobs else []
    choices = [] if empty else [
        {
            "index": index,
            "message": _message(answer, ask, model.reasoning_key, call, index),
            "logprobs": _logprobs(desk, context, answer, request) if request.logprobs else None,
            "finish_reason": _FINISH.get(answer.finish, answer.finish),
        }
        for index, answer in enumerate(answers)
    ]  # fmt: skip
    body = {
        "id": f"chatcmpl-{call.serial}",
        "object": "chat.completion",
        "created": int(call.time),
        "model": ask.model,
        "choices": choices,
        "usage": usage_body(usage),
        "service_tier": "default",
        "system_fingerprint": "fp_limbeck",
    }
    return Reply(body, usage)


def _ask(request: ChatRequest, call: Call) -> Ask:
    text, images = render(request.messages)
    form = request.response_format or {}
    schema: JsonValue = {} if form.get("type") == "json_object" else None
    if form.get("type") == "json_schema":
        inner = form.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            raise Refused("invalid", "Missing required parameter.", param="response_format.json_schema.schema")
        schema = inner["schema"]
    return Ask(
        model=request.model,
        seed=call.seed,
        prompt=text,
        extra_tokens=images,
        n=request.n or 1,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=stops(request.stop),
        tool=_tool(request),
        schema=schema,
        twist=call.twist,
    )


def _tool(request: ChatRequest) -> Tool | None:
    tools = []
    for item in request.tools or []:
        function = item.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("invalid", "A tool has no function with a name.", param="tools")
        tools.append(Tool(str(function["name"]), function.get("parameters", {"type": "object"})))
    choice, name = request.tool_choice, None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = str(function.get("name")) if isinstance(function, dict) else None
    answered = request.messages[-1].role == "tool"
    return chosen(tools, choice if isinstance(choice, str) else None, name, answered=answered)


def _message(answer: Answer, ask: Ask, reasoning_key: str, call: Call, index: int) -> Json:
    refused = answer.finish == "refusal"
    message: Json = {
        "role": "assistant",
        "content": None if refused or answer.arguments is not None else answer.text,
        "refusal": answer.text if refused else None,
        "annotations": [],
    }
    if answer.reasoning and reasoning_key != "none":
        message[reasoning_key] = answer.reasoning
    if answer.arguments is not None and ask.tool is not None:
        function: JsonValue = {"name": ask.tool.name, "arguments": answer.arguments}
        message["tool_calls"] = [{"id": f"call_{call.serial}_{index}", "type": "function", "function": function}]
    return message


def usage_body(usage: Usage) -> Json:
    """The `usage` of a chat completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _logprobs(desk: Desk, context: Sequence[int], answer: Answer, request: ChatRequest) -> Json:
    return {"content": token_logprobs(desk, context, answer.text, request.top_logprobs or 0), "refusal": None}


def token_logprobs(desk: Desk, context: Sequence[int], text: str, top: int) -> list[JsonValue]:
    """Log-probabilities of an answer's tokens: of each, the toy distribution after prompt and answer so far. They do
    not make the text, which is cut from ready words; so an answer's token need not be a likely one.
    """
    vocabulary, before = desk.vocabulary, list(context)
    content: list[JsonValue] = []
    for token in vocabulary.encode(text):
        logprobs = vocabulary.logprobs(before)
        best: list[JsonValue] = [_entry(desk, number, float(logprobs[number])) for number in desk.top(logprobs, top)]
        content.append({**_entry(desk, token, float(logprobs[token])), "top_logprobs": best})
        before.append(token)
    return content


def _entry(desk: Desk, token: int, logprob: float) -> Json:
    shown: Json = {
        "token": desk.vocabulary.text(token),
        "logprob": logprob,
        "bytes": list(desk.vocabulary.tokens[token]),
    }
    return {"id": token, **shown} if desk.settings.token_ids else shown
