"""What the server answers: a pure function of the request, so that a test can know what must come.

An answer's text depends on the request's content: model, messages, tools, schema, temperature, seed. It does not
depend on how many tokens or choices were asked for, so a shorter limit gives a prefix of the longer one's text.
Equal requests give equal answers, at any temperature; requests that should differ are told apart by `seed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import orjson
from pydantic import JsonValue

from limbeck.testing.schema import instance, spoilt
from limbeck.testing.settings import Model, Settings
from limbeck.testing.vocabulary import WORDS, Vocabulary

Json = dict[str, JsonValue]

Finish = Literal["stop", "stop_sequence", "length", "tool", "filter", "refusal"]

_STRETCH = 4096
"""Words of the text from which answers are cut."""

_APART = {
    "n", "max_tokens", "max_completion_tokens", "max_output_tokens", "stop", "stop_sequences", "stream",
    "stream_options", "logprobs", "top_logprobs", "user", "metadata", "store", "service_tier",
}  # fmt: skip
"""Keys of a body that do not change what the model would write."""


class Twist(NamedTuple):
    """A fault that changes what the model writes."""

    kind: Literal["truncated", "empty", "refusal", "filter", "off_schema", "prose"]
    share: float = 0.5
    """Of a truncated answer, the share that is kept."""


class Tool(NamedTuple):
    """The tool that will be called, and the JSON schema of its arguments."""

    name: str
    parameters: JsonValue


@dataclass(frozen=True, slots=True)
class Ask:
    """A request in no provider's words."""

    model: str
    seed: bytes
    """Digest of the content; all that text depends on."""
    prompt: str
    extra_tokens: int = 0
    """Tokens of the prompt that are no text: images."""
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    tool: Tool | None = None
    schema: JsonValue = None
    """Of a structured answer; `{}` for any JSON object, None for text."""
    reasoning: int | None = None
    """Tokens to think, where the request says so; else the model's own."""
    twist: Twist | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote for one choice."""

    text: str
    reasoning: str
    arguments: str | None
    """JSON text of the arguments of the called tool; None where none is called."""
    finish: Finish
    stop_sequence: str | None
    text_tokens: int
    reasoning_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens billed."""
        return self.text_tokens + self.reasoning_tokens


def body_digest(body: Json) -> str:
    """SHA-256 of a request body as JSON with sorted keys, in hexadecimal: what the bill counts by."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def content_seed(body: Json) -> bytes:
    """Digest of what an answer's text depends on."""
    content = {key: value for key, value in body.items() if key not in _APART}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).digest()


def words(seed: bytes, count: int) -> str:
    """`count` words, of which the first eight tell one seed from another."""
    first = [WORDS[byte % len(WORDS)] for byte in seed[: min(count, 8)]]
    if count <= len(first):
        return " ".join(first)
    start = int.from_bytes(seed[8:12], "big") % _STRETCH
    end = start + count - len(first)
    return " ".join(first) + _stretch(end // _STRETCH + 1)[5 * start : 5 * end]


@lru_cache(maxsize=4)
def _stretch(times: int) -> str:
    """Words in no order that repeats, each with a space before; so many times over."""
    drawn = (hashlib.sha256(b"%d" % number).digest()[0] for number in range(_STRETCH))
    return "".join(f" {WORDS[byte % len(WORDS)]}" for byte in drawn) * times


def compose(ask: Ask, choice: int, model: Model, settings: Settings, vocabulary: Vocabulary) -> Answer:
    """What the model writes for one choice of a request."""
    seed = ask.seed if choice == 0 else hashlib.sha256(ask.seed + choice.to_bytes(4, "big")).digest()
    wanted = model.reasoning if ask.reasoning is None else ask.reasoning
    limit = ask.max_tokens
    if ask.twist and ask.twist.kind in ("refusal", "filter"):
        return _withheld(ask.twist, seed, vocabulary)
    if ask.twist and ask.twist.kind == "truncated":
        short = int((wanted + _written(ask, seed, settings, vocabulary)[1]) * ask.twist.share)
        limit = short if limit is None else min(short, limit)
    thought = wanted if limit is None else min(wanted, limit)
    left = None if limit is None else limit - thought
    text, tokens = _written(ask, seed, settings, vocabulary)
    text, stopped = _up_to_stop(text, ask.stop if ask.tool is None else ())
    tokens = vocabulary.count(text) if stopped else tokens
    finish: Finish = "stop_sequence" if stopped else "stop" if ask.tool is None else "tool"
    if left is not None and tokens > left:
        text, tokens, finish, stopped = vocabulary.decode(vocabulary.encode(text)[:left]), left, "length", None
    arguments = text if ask.tool is not None and left != 0 else None
    reasoning = words(hashlib.sha256(seed).digest(), thought) if thought else ""
    return Answer("" if ask.tool else text, reasoning, arguments, finish, stopped, tokens, thought)


def _written(ask: Ask, seed: bytes, settings: Settings, vocabulary: Vocabulary) -> tuple[str, int]:
    """The text of an answer, or the arguments of its tool call, before any limit; and its tokens."""
    twisted = ask.twist.kind if ask.twist and ask.tool is None else None
    if ask.tool is not None or (ask.schema is not None and twisted != "prose"):
        schema = ask.schema if ask.tool is None else ask.tool.parameters
        made: JsonValue = instance(schema, seed) if schema else {"answer": words(seed, 8)} if ask.tool is None else {}
        if twisted == "off_schema":
            made = spoilt(made, schema or {"type": "object"})
        text = orjson.dumps(made).decode()
        return text, vocabulary.count(text)
    count = settings.words
    if settings.spread:
        away = settings.spread * (int.from_bytes(seed[12:16], "big") / 0xFFFFFFFF * 2 - 1)
        count = max(1, round(count * (1 + away)))
    if settings.items:
        seeds = [hashlib.sha256(seed + number.to_bytes(4, "big")).digest() for number in range(1, settings.items + 1)]
        text = "\n".join(f"{number}. {words(item, count)}" for number, item in enumerate(seeds, 1))
        return text, vocabulary.count(text)
    text = words(seed, count)
    # Counting is most of the work of an answer, and with all words in the vocabulary, each is a token.
    return text, count if vocabulary.knows_words else vocabulary.count(text)


def _withheld(twist: Twist, seed: bytes, vocabulary: Vocabulary) -> Answer:
    text = "I cannot help with that." if twist.kind == "refusal" else words(seed, 8)
    finish: Finish = "refusal" if twist.kind == "refusal" else "filter"
    return Answer(text, "", None, finish, None, vocabulary.count(text), 0)


def _up_to_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    found = [(at, stop) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if not found:
        return text, None
    at, stop = min(found)
    return text[:at], stop
