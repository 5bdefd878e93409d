"""A teacher behind an endpoint: what is asked, and what an answer says. Sending is done elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import orjson
from pydantic import JsonValue

from limbeck import recipe
from limbeck.collect.contents import Wanted, tools_of
from limbeck.collect.endpoints.anthropic import AnthropicMessages
from limbeck.collect.endpoints.batch_raw import batch_of, unwrapped
from limbeck.collect.endpoints.dialects import Dialect, Read, read_raw
from limbeck.collect.endpoints.openai_chat import OpenAIChat
from limbeck.collect.endpoints.openai_responses import OpenAIResponses
from limbeck.collect.endpoints.reply import Usage
from limbeck.collect.rows import shown
from limbeck.collect.teachers import Parsed, Request
from limbeck.errors import Problem, PromptError
from limbeck.ledger.canonical import canonical, digest_bytes
from limbeck.records import Prompt, TeacherIdentity, Tool
from limbeck.seeds import derive_seed

_OVERHEAD, _OVERHEAD_TOOLS = 512, 1024
"""Tokens that a server may put around what was sent: its chat template, a system prompt of its own; and around tools
or a schema."""
_IMAGE_TOKENS = 50_000
"""The most that an image is billed for anywhere: 48,169, by OpenAI's rule for gpt-4o-mini in full detail (its guide to
images, 2025)."""
_TYPE_MARK = b'"type":"i'
_IMAGE_MARKS = (b'"type":"image_url"', b'"type":"input_image"', b'"type":"image"')
_BODY, _AFTER_BODY = b'{"body":', b',"endpoint":'
"""What stands around the body in a request's canonical JSON. Where a key of the body is called so too, it comes before;
texts cannot look like it, since quotes inside of them are escaped."""
_TOOL_MARKS = (b'"tools":[', b'"json_schema"')
"""What only a request's own keys look like: quotes inside of texts are escaped."""


_EXACT = 2**53
"""Integers from here on are not exact in JSON."""


class Bound(NamedTuple):
    """The most that a request can be billed for, in tokens."""

    prompt: int
    completion: int


def make_dialect(settings: recipe.EndpointTeacher) -> Dialect:
    """The API that the settings name."""
    if settings.kind == "anthropic":
        return AnthropicMessages()
    if settings.api == "responses":
        return OpenAIResponses()
    limit = settings.limit_key
    if limit == "auto":
        limit = "max_completion_tokens" if settings.host == "api.openai.com" else "max_tokens"
    return OpenAIChat(limit)


def canonical_fast(value: JsonValue) -> bytes:
    """What `limbeck.ledger.canonical.canonical` gives, twenty times as fast for what is mostly text.

    orjson writes text as RFC 8785 has it, and sorts keys as it does where they are ASCII; numbers with a point are
    written by the slow way.
    """
    try:
        return orjson.dumps(_prepared(value), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, TypeError, ValueError):
        return canonical(value)


def _prepared(value: JsonValue) -> object:
    """The value with its floats as RFC 8785 writes them. Raises `ValueError` for what orjson would write otherwise."""
    kind = type(value)
    if kind is dict:
        if not "".join(value).isascii():  # type: ignore[arg-type]
            raise ValueError
        return {
            key: inner if type(inner) is str or (type(inner) is int and -_EXACT < inner < _EXACT) else _prepared(inner)
            for key, inner in value.items()  # type: ignore[union-attr]
        }
    if kind is list:
        return [inner if type(inner) is str else _prepared(inner) for inner in value]  # type: ignore[union-attr]
    if kind is float:
        return orjson.Fragment(_float(value))  # type: ignore[arg-type]
    if kind is int and abs(value) >= _EXACT:  # type: ignore[arg-type, operator]
        raise ValueError
    return value


@lru_cache(maxsize=256)
def _float(value: float) -> bytes:
    return canonical(value)


class Endpoint:
    """A `Teacher` that is asked over HTTP."""

    def __init__(self, settings: recipe.EndpointTeacher, collect: recipe.Collect, seed: int):
        self.settings, self._collect, self._seed = settings, collect, seed
        self.dialect = make_dialect(settings)
        self.address = self.dialect.address(settings.base_url)
        self.identity = TeacherIdentity(
            name=settings.name,
            kind=settings.kind,
            provider="self-hosted" if settings.reached == "self-hosted" else settings.host,
            route=settings.reached,
            model=settings.model,
            weights=None,
            terms=settings.terms,
        )

    def request(self, prompt: Prompt, sample: int) -> Request:
        """What is asked for this sample of this prompt: the address, every key that is sent, and the sample's number.
        Raises `PromptError` where the API has no words for it.
        """
        # 31 bits: what every server takes.
        seed, settings = derive_seed(self._seed, "answer", prompt.id, sample) >> 32, self.settings
        try:
            body = self.dialect.body(
                settings.model, prompt.messages, self._collect, seed, wanted(prompt, self._collect)
            )
        except ValueError as error:
            raise self._not_taken(prompt, str(error)) from None
        sent = {key: value for key, value in body.items() if key not in settings.omit} if settings.omit else dict(body)
        content: dict[str, JsonValue] = {
            "form": self.dialect.form,
            "endpoint": self.address,
            "sample": sample,
            "body": sent | settings.extra,
        }
        canonical = canonical_fast(content)
        return Request(digest_bytes(canonical), canonical)

    def _not_taken(self, prompt: Prompt, found: str) -> PromptError:
        where = f"{prompt.source}: {shown(prompt.messages[-1].content)}"
        remedy = "change the roles of its messages, or take a teacher that knows them"
        problem = Problem(where, found, f"roles that the API of {self.identity.name} takes", remedy)
        return PromptError("the teacher's API cannot be asked these prompts", [problem])

    def parse(self, request: Request, raw: bytes) -> Parsed:
        """Text and counts of a raw answer, whatever it is; where it names no model, the one that was asked for."""
        return self.read(raw).parsed

    def usage(self, raw: bytes) -> Usage | None:
        """What the provider counted; None where it did not say."""
        return self.read(raw).usage

    def read(self, raw: bytes) -> Read:
        """The same as `parse` and `usage`, together."""
        read = read_raw(self.dialect, unwrapped(raw))
        return read if read.parsed.model else Read(read.parsed._replace(model=self.settings.model), read.usage)

    def batch(self, raw: bytes) -> str | None:
        """The provider's id of the batch in which an answer came; None where it was asked for alone."""
        return batch_of(raw)

    def wire(self, request: Request) -> bytes:
        """The bytes that are sent: the request's first value, since `body` is the first of its keys."""
        start, end = len(_BODY), request.body.rindex(_AFTER_BODY)
        return request.body[start:end]

    def bound(self, wire: bytes) -> Bound:
        """The most that a request can be billed for.

        A tokenizer that knows bytes makes no more tokens of a text than it has bytes, and JSON makes the text no
        shorter; so the length of what is sent bounds the prompt.
        """
        prompt = len(wire) + _OVERHEAD
        if _TYPE_MARK in wire:
            prompt += _IMAGE_TOKENS * sum(map(wire.count, _IMAGE_MARKS))
        if _TOOL_MARKS[0] in wire or _TOOL_MARKS[1] in wire:
            prompt += _OVERHEAD_TOOLS
        return Bound(prompt, self._collect.max_tokens)


def wanted(prompt: Prompt, collect: recipe.Collect) -> Wanted:
    """What a prompt asks for: its own tools and schema, or the recipe's."""
    tools, schema = prompt.tools, prompt.json_schema
    if tools is None and collect.tools:
        tools = _recipe_tools(orjson.dumps(collect.tools))
    return Wanted(tools, collect.json_schema if schema is None else schema)


@lru_cache(maxsize=8)
def _recipe_tools(written: bytes) -> tuple[Tool, ...]:
    return tools_of(orjson.loads(written))
