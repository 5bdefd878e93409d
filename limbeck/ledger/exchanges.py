"""What a request and its raw answer say, as far as a completion takes it over: read here from the bytes themselves, and
not by the code that collected them, so that the two must agree. docs/ledger.md lists which key is which value.

An answer is somebody's claim: any JSON value may stand in any place, and what an API does not promise is `malformed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue
from pydantic_core import from_json

MALFORMED = "malformed"
Object = Mapping[str, JsonValue]


class Call(NamedTuple):
    """A function that the model called."""

    name: str
    arguments: JsonValue
    """Text as it was given, or what was given in its place."""
    id: str | None


class Said(NamedTuple):
    """What an answer says."""

    text: str
    reasoning: str | None
    finish_reason: str
    model: str
    """Empty where it names none."""
    prompt_tokens: JsonValue = 0
    completion_tokens: JsonValue = 0
    calls: tuple[Call, ...] = ()
    batch: str | None = None
    """The provider's id of the batch in which it came."""


class Exchange(NamedTuple):
    """A request and its answer."""

    messages: JsonValue
    """As they were asked."""
    sample: JsonValue
    weights: JsonValue
    said: Said
    literal: bool = True
    """Whether messages stand in the request as they stand in a completion, also where they are more than text."""
    system_apart: bool = False
    """Whether the system's messages were put together into one."""
    answer_id: str | None = None
    """The provider's own id of the answer."""
    fingerprint: str | None = None
    """What the API says of the weights and the configuration that answered."""

    def asks(self, messages: Sequence[Mapping[str, JsonValue]]) -> bool:
        """Whether these messages were asked. Of those that are more than text, each API has words of its own, which are
        not read here.
        """
        if self.messages == messages:
            return True
        if not all(message.keys() == _PLAIN and message["role"] != "tool" for message in messages):
            return not self.literal
        if not self.system_apart:
            return False
        system = "\n\n".join(_text(message["content"]) for message in messages if message["role"] == "system")
        turns: list[JsonValue] = [dict(message) for message in messages if message["role"] != "system"]
        return self.messages == ([{"role": "system", "content": system}, *turns] if system else turns)


_PLAIN = {"role", "content"}


def read_exchange(request: bytes, raw: bytes) -> Exchange | None:
    """None for a form that is not known here, and for a request that cannot be read."""
    asked = read_json(request)
    if not isinstance(asked, dict):
        return None
    form = asked.get("form")
    reader = _FORMS.get(form) if type(form) is str else None
    return reader(asked, raw) if reader else None


def read_json(data: bytes) -> JsonValue:
    """The value of a JSON text, None for anything else: NaN and halves of surrogate pairs are no JSON here."""
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError:
        pass  # nested more deeply than the fast reader goes, or no JSON
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _no_constant(name: str) -> JsonValue:
    raise ValueError(name)


def _local(asked: Object, raw: bytes) -> Exchange | None:
    said = read_json(raw)
    if type(said) is not dict or said.get("form") != "local/1":
        return None
    told = Said(
        said.get("text"), None, said.get("finish_reason"), said.get("model"),  # pyright: ignore[reportArgumentType]
        said.get("prompt_tokens"), said.get("completion_tokens"),
    )  # fmt: skip
    return Exchange(asked.get("messages"), asked.get("sample"), asked.get("weights"), told)


def _file(asked: Object, raw: bytes) -> Exchange | None:
    """An answer that was taken from a file: nobody counted its tokens."""
    said = read_json(raw)
    if type(said) is not dict or said.get("form") != "file/1":
        return None
    told = (said.get(key) for key in ("text", "reasoning", "finish_reason", "model"))
    return Exchange(asked.get("messages"), asked.get("sample"), None, Said(*told))  # pyright: ignore[reportArgumentType]


def _endpoint(
    messages: Callable[[Object], JsonValue], answer: Callable[[Object], Said]
) -> Callable[[Object, bytes], Exchange]:
    """A reader of one API. What names no model was answered by the one that was asked."""

    def read(asked: Object, raw: bytes) -> Exchange:
        batch, found = _unwrapped(raw)
        body = _object(asked.get("body"))
        said, named = (answer(found), found) if found is not None else (_nothing(MALFORMED), {})
        if batch is not None or not said.model:
            said = said._replace(batch=batch, model=said.model or _text(body.get("model")))
        return Exchange(
            messages(body), asked.get("sample"), None, said, False, answer is _anthropic,
            _text(named.get("id")) or None, _text(named.get("system_fingerprint")) or None,
        )  # fmt: skip

    return read


_BATCH = b"\x1ebatch "
"""Before an answer that came in a batch: then the batch's id, a line feed, and the line of results."""


def _unwrapped(raw: bytes) -> tuple[str | None, Object | None]:
    """The batch, and the object that the endpoint would have answered with by itself."""
    name = None
    if raw.startswith(_BATCH):
        head, _, raw = raw.partition(b"\n")
        name = head[len(_BATCH) :].decode(errors="replace")
    found = read_json(raw)
    if name is not None:
        line = _object(found)
        if "result" in line:  # Anthropic's
            result = _object(line["result"])
            found = result.get("message" if result.get("type") == "succeeded" else "error")
        else:
            response = _object(line.get("response"))
            found = response.get("body") if response else {"error": line.get("error")}
    return name, found if isinstance(found, dict) else None


def _chat_messages(body: Object) -> JsonValue:
    return body.get("messages")


def _responses_messages(body: Object) -> JsonValue:
    return body.get("input")


def _anthropic_messages(body: Object) -> JsonValue:
    """With the system's, which stands apart."""
    system, turns = body.get("system"), body.get("messages")
    return turns if system is None or type(turns) is not list else [{"role": "system", "content": system}, *turns]


def _chat(found: Object) -> Said:
    """OpenAI's chat completions and what speaks them."""
    model, choices = _text(found.get("model")), _list(found.get("choices"))
    if not choices:
        return _nothing(_refusal(found) or MALFORMED, model)
    choice = _object(choices[0])
    message, finish = choice.get("message"), choice.get("finish_reason")
    if type(message) is not dict:
        return _nothing(MALFORMED, model)
    content, refusal = message.get("content"), _text(message.get("refusal"))
    text = _joined(content, None, "text") if type(content) is list else _text(content)
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning")) or None
    if reasoning is None:
        text, reasoning = _thought(text)
    if refusal:
        text, finish = text or refusal, "refusal"
    elif type(finish) is str:
        finish = _CHAT_ENDS.get(finish, finish)
    else:
        finish = MALFORMED
    calls = list[Call]()
    for item in map(_object, _list(message.get("tool_calls"))):
        function = _object(item.get("function"))
        calls += _call(item.get("id"), function.get("name"), function.get("arguments"))
    usage = _usage(found, ("prompt_tokens",), "completion_tokens")
    return Said(text, reasoning, finish, model, *usage, tuple(calls))


_CHAT_ENDS = {
    **dict.fromkeys(("stop", "eos", "end_turn"), "stop"),
    **dict.fromkeys(("length", "max_tokens"), "length"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool_calls"),
}


def _thought(text: str) -> tuple[str, str | None]:
    """Text and reasoning, which some servers leave in the text between `<think>` and `</think>` before it."""
    begun = text.lstrip()
    end = begun.find("</think>")
    if not begun.startswith("<think>") or end < 0:
        return text, None
    return begun[end + len("</think>") :].lstrip("\n"), begun[len("<think>") : end].strip("\n") or None


def _responses(found: Object) -> Said:
    """OpenAI's responses."""
    model, output, status = _text(found.get("model")), found.get("output"), found.get("status")
    if (refused := _refusal(found)) is not None:
        return _nothing(refused, model)
    if type(output) is not list or type(status) is not str:
        return _nothing(MALFORMED, model)
    parts = [part for item in output for part in _list(_object(item).get("content"))]
    summary = [part for item in output for part in _list(_object(item).get("summary"))]
    refusal, kinds = _joined(parts, "refusal", "refusal"), [_object(item).get("type") for item in output]
    if refusal:
        finish = "refusal"
    elif status == "incomplete":
        why = _text(_object(found.get("incomplete_details")).get("reason"))
        finish = "length" if why == "max_output_tokens" else why or status
    elif status == "completed":
        finish = "tool_calls" if "function_call" in kinds or "custom_tool_call" in kinds else "stop"
    else:
        finish = status
    reasoning = _joined(parts, "reasoning_text", "text")
    reasoning = reasoning or "\n\n".join(filter(None, (_text(_object(part).get("text")) for part in summary)))
    usage = _usage(found, ("input_tokens",), "output_tokens")
    text = _joined(parts, "output_text", "text") or refusal
    return Said(text, reasoning or None, finish, model, *usage, _calls(output, "function_call", "call_id", "arguments"))


def _anthropic(found: Object) -> Said:
    """Anthropic's messages."""
    if (refused := _refusal(found)) is not None:
        return _nothing(refused)
    model, blocks, stop = _text(found.get("model")), found.get("content"), found.get("stop_reason")
    if type(blocks) is not list or type(stop) is not str:
        return _nothing(MALFORMED, model)
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    usage, reasoning = _usage(found, parts, "output_tokens"), _joined(blocks, "thinking", "thinking") or None
    calls = _calls(blocks, "tool_use", "id", "input")
    return Said(_joined(blocks, "text", "text"), reasoning, _ANTHROPIC_ENDS.get(stop, stop), model, *usage, calls)


_ANTHROPIC_ENDS = {
    **dict.fromkeys(("end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("max_tokens", "model_context_window_exceeded"), "length"),
    "tool_use": "tool_calls",
}


def _refusal(found: Object) -> str | None:
    """The reason of an error in the place of an answer; None where there is none."""
    error = found.get("error")
    if type(error) is str:
        error = {"message": error}
    elif type(error) is not dict:
        if found.get("object") != "error" and found.get("type") != "error":
            return None
        error = found
    said = " ".join(_text(error.get(key)) for key in ("code", "type", "message")).lower()
    return next((reason for reason, signs in _REFUSED.items() if any(sign in said for sign in signs)), "error")


_REFUSED = {
    "content_filter": ("content_filter", "content_policy", "moderation"),
    "context_length": ("context_length", "context length", "context size", "prompt is too long"),
}


def _nothing(reason: str, model: str = "") -> Said:
    return Said("", None, reason, model)


def _usage(found: Object, prompt: Sequence[str], completion: str) -> tuple[int, int]:
    """Tokens of prompt and answer; none where one of them was not counted."""
    said = _object(found.get("usage"))
    parts, written = [_count(said.get(key)) for key in prompt], _count(said.get(completion))
    if parts[0] is None or written is None:
        return 0, 0
    return sum(filter(None, parts)), written


def _count(value: JsonValue) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _joined(parts: JsonValue, kind: str | None, key: str) -> str:
    """What the parts of a kind, or all, say under a key."""
    if type(parts) is not list:
        return ""
    told = [part.get(key) for part in parts if type(part) is dict and (kind is None or part.get("type") == kind)]
    return "".join([text for text in told if type(text) is str])


def _calls(items: Iterable[JsonValue], kind: str, id_: str, arguments: str) -> tuple[Call, ...]:
    told = [item for item in items if type(item) is dict and item.get("type") == kind]
    return tuple([call for item in told for call in _call(item.get(id_), item.get("name"), item.get(arguments))])


def _call(id_: JsonValue, name: JsonValue, arguments: JsonValue) -> list[Call]:
    if type(name) is not str:
        return []
    return [Call(name, {} if arguments is None else arguments, id_ if type(id_) is str else None)]


def _object(value: JsonValue) -> Object:
    return value if type(value) is dict else {}


def _list(value: JsonValue) -> Sequence[JsonValue]:
    return value if type(value) is list else ()


def _text(value: JsonValue) -> str:
    return value if type(value) is str else ""


_FORMS: dict[str, Callable[[Object, bytes], Exchange | None]] = {
    "local/1": _local,
    "file/1": _file,
    "openai-chat/1": _endpoint(_chat_messages, _chat),
    "openai-responses/1": _endpoint(_responses_messages, _responses),
    "anthropic-messages/1": _endpoint(_anthropic_messages, _anthropic),
}
