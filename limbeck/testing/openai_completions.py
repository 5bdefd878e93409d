"""POST /v1/completions, with what vLLM adds: token-id prompts, `prompt_logprobs`, token ids in answers.

Texts are drawn from the toy distribution token by token (greedily at temperature 0), so every number can be checked
against `Server.distribution(context)`. Fields as in the openai Python client 3.57 (`logprobs`: text_offset,
token_logprobs, tokens, top_logprobs) and in vLLM's `CompletionRequest` and `CompletionResponseChoice`
(`prompt_logprobs`: None for the first token, then token id as text to logprob, rank and decoded_token;
`return_tokens_as_token_ids`, `return_token_ids`, `stop_reason`). Like vLLM, more log-probabilities than
`Settings.max_logprobs` are refused. `suffix`, `best_of` and streaming are not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import Field, JsonValue

from limbeck.testing.answers import Ask, Json
from limbeck.testing.calls import Call, Desk, Reply, Usage
from limbeck.testing.errors import Refused
from limbeck.testing.requests import Body, checked, stops
from limbeck.testing.vocabulary import END


class CompletionRequest(Body):
    """The keys that the server obeys."""

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    n: int | None = Field(default=1, ge=1, le=128)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=1, ge=0, le=2)
    seed: int | None = None
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False
    ignore_eos: bool | None = False
    stream: bool | None = False


class _Drawn(NamedTuple):
    """What was written for one choice."""

    tokens: list[int]
    text: str
    finish: str
    stop_reason: str | None


@dataclass(slots=True)
class _Columns:
    """`logprobs` of a choice, column by column."""

    tokens: list[JsonValue] = field(default_factory=list)
    token_logprobs: list[JsonValue] = field(default_factory=list)
    top_logprobs: list[JsonValue] = field(default_factory=list)
    text_offset: list[JsonValue] = field(default_factory=list)


def completions(desk: Desk, call: Call) -> Reply:
    """Answers a completion request."""
    request = checked(CompletionRequest, call.body)
    if request.stream:
        raise Refused("invalid", "The test server does not stream.", param="stream")
    _within(request.logprobs, "logprobs", desk)
    _within(request.prompt_logprobs, "prompt_logprobs", desk)
    prompts = [_ids(prompt, desk) for prompt in _prompts(request)]
    if request.model is None or desk.settings.model(request.model) is None:
        raise Refused("model", f"The model `{request.model}` does not exist.")
    choices: list[JsonValue] = []
    prompt_tokens = completion_tokens = 0
    for ids in prompts:
        desk.admitted(Ask(request.model, b"", "", len(ids), max_tokens=request.max_tokens), "prompt")
        prompt_tokens += len(ids)
        for sample in range(request.n or 1):
            drawn = _draw(request, ids, int.from_bytes(call.seed[:6], "big") + sample, desk, call)
            completion_tokens += len(drawn.tokens)
            choices.append(_choice(request, ids, drawn, len(choices), desk))
    usage = Usage(request.model, prompt_tokens, completion_tokens)
    empty = call.twist is not None and call.twist.kind == "empty"
    body: Json = {
        "id": f"cmpl-{call.serial}",
        "object": "text_completion",
        "created": int(call.time),
        "model": request.model,
        "choices": [] if empty else choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return Reply(body, usage)


def _within(count: int | None, param: str, desk: Desk) -> None:
    most = desk.settings.max_logprobs
    if count is not None and count > most:
        raise Refused(
            "invalid", f"Requested {param} of {count}, which is greater than max allowed: {most}", param=param
        )


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    many = [item for item in prompt if isinstance(item, str | list)]
    if many:
        return many
    return [[item for item in prompt if isinstance(item, int)]]


def _ids(prompt: str | list[int], desk: Desk) -> list[int]:
    ids = desk.vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
    wrong = [number for number in ids if not 0 <= number < desk.vocabulary.size]
    if wrong:
        raise Refused("invalid", f"Token id {wrong[0]} is out of vocabulary", param="prompt")
    if not ids:
        raise Refused("invalid", "The prompt cannot be empty", param="prompt")
    return ids


def _draw(request: CompletionRequest, ids: Sequence[int], seed: int, desk: Desk, call: Call) -> _Drawn:
    vocabulary, limit = desk.vocabulary, 16 if request.max_tokens is None else request.max_tokens
    if call.twist is not None and call.twist.kind == "truncated":
        limit = int(limit * call.twist.share)
    temperature = 1.0 if request.temperature is None else request.temperature
    context, start = list(ids), len(ids)
    ends = stops(request.stop)
    while len(context) - start < limit:
        token = vocabulary.draw(context, temperature, seed)
        if token == END and not request.ignore_eos:
            # The end is paid for, as elsewhere, but is no part of the text.
            return _Drawn([*context[start:], token], vocabulary.decode(context[start:]), "stop", None)
        context.append(token)
        text = vocabulary.decode(context[start:]) if ends else ""
        if found := [(text.find(end), end) for end in ends if end and end in text]:
            at, end = min(found)
            return _Drawn(context[start:], text[:at], "stop", end)
    return _Drawn(context[start:], vocabulary.decode(context[start:]), "length", None)


def _choice(request: CompletionRequest, ids: list[int], drawn: _Drawn, index: int, desk: Desk) -> Json:
    shown = desk.vocabulary.decode(ids) if request.echo else ""
    choice: Json = {
        "index": index,
        "text": shown + drawn.text,
        "logprobs": None,
        "finish_reason": drawn.finish,
        "stop_reason": drawn.stop_reason,
        "prompt_logprobs": None,
    }
    if request.logprobs is not None:
        choice["logprobs"] = _logprobs(request, request.logprobs, ids, drawn, desk)
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(request.prompt_logprobs, ids, desk)
    if request.return_token_ids:
        choice |= {"token_ids": list(drawn.tokens), "prompt_token_ids": list(ids)}
    return choice


def _logprobs(request: CompletionRequest, top: int, ids: list[int], drawn: _Drawn, desk: Desk) -> Json:
    """One entry a token; with `echo`, the prompt's tokens come first, and the very first has none."""
    columns = _Columns()
    whole = ids + drawn.tokens
    start = 0 if request.echo else len(ids)
    offset = 0
    for at in range(start, len(whole)):
        token = whole[at]
        columns.tokens.append(_shown(token, request, desk))
        columns.text_offset.append(offset)
        offset += len(desk.vocabulary.text(token))
        if at == 0:
            columns.token_logprobs.append(None)
            columns.top_logprobs.append(None)
            continue
        logprobs = desk.vocabulary.logprobs(whole[:at])
        columns.token_logprobs.append(float(logprobs[token]))
        best = dict.fromkeys([*desk.top(logprobs, top), token])
        columns.top_logprobs.append({_shown(number, request, desk): float(logprobs[number]) for number in best})
    return {"tokens": columns.tokens, "token_logprobs": columns.token_logprobs, "top_logprobs": columns.top_logprobs,
            "text_offset": columns.text_offset}  # fmt: skip


def _shown(token: int, request: CompletionRequest, desk: Desk) -> str:
    return f"token_id:{token}" if request.return_tokens_as_token_ids else desk.vocabulary.text(token)


def _prompt_logprobs(top: int, ids: list[int], desk: Desk) -> list[JsonValue]:
    """For each token of the prompt the `top` most likely ones and itself, by id."""
    found: list[JsonValue] = [None]
    for at in range(1, len(ids)):
        logprobs = desk.vocabulary.logprobs(ids[:at])
        order = desk.top(logprobs, len(logprobs))
        best = dict.fromkeys([*order[:top], ids[at]])
        found.append({
            str(number): {
                "logprob": float(logprobs[number]),
                "rank": order.index(number) + 1,
                "decoded_token": desk.vocabulary.text(number),
            }
            for number in best
        })  # fmt: skip
    return found
