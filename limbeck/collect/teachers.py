"""The one seam of collecting: what a teacher is, whoever runs it.

A teacher turns a prompt into a request, requests into raw answers, and a raw answer into text. The journal
stands between the last two, so that nothing which was paid for is lost, and a better parser can be run
over it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pydantic import JsonValue

from limbeck import recipe
from limbeck.ledger.canonical import canonical, digest_bytes
from limbeck.records import Digest, Prompt, TeacherIdentity, ToolCall

if TYPE_CHECKING:
    from limbeck.collect.endpoints.teacher import Endpoint


@dataclass(frozen=True, slots=True)
class Request:
    """All that the answer depends on: the weights or the endpoint, the messages or tokens, every sampling
    parameter, the seed, and which sample it is. Never a secret: it lies in the journal as it is.
    """

    key: Digest
    """Digest of the body."""
    body: bytes
    """Canonical JSON (RFC 8785)."""

    @classmethod
    def of(cls, content: JsonValue) -> Request:
        """The request with this content."""
        body = canonical(content)
        return cls(digest_bytes(body), body)


class Answer(NamedTuple):
    """What came back for a request, as it came."""

    request: Request
    raw: bytes


class Parsed(NamedTuple):
    """A raw answer, read."""

    text: str
    reasoning: str | None
    """What the teacher thought before it answered, where it says so apart."""
    finish_reason: str
    """`stop`, `length`, `context_length` (the prompt left no room for an answer), `refusal`, `content_filter`,
    `tool_calls`, `malformed` (not what the API promises), `error`, or what the provider said.
    """
    model: str
    """The model that answered, by its own word."""
    prompt_tokens: int
    completion_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    answer_id: str | None = None
    """The provider's own id of the answer, where it gave one."""
    fingerprint: str | None = None
    """What the API says of the weights and the configuration that answered, where it does."""


class Teacher(Protocol):
    """Somebody who answers prompts.

    Laws: equal arguments give equal requests; `parse` looks at nothing but the request and the raw bytes.
    """

    identity: TeacherIdentity

    def request(self, prompt: Prompt, sample: int) -> Request:
        """What is asked for this sample of this prompt. Raises `PromptError` where the prompt cannot be
        asked.
        """
        ...

    def parse(self, request: Request, raw: bytes) -> Parsed:
        """Text and counts of a raw answer. An answer that is cut off, refused or malformed is an answer
        too, and its `finish_reason` says so.
        """
        ...


class Writing(Teacher, Protocol):
    """A teacher that runs here and writes its answers itself. One behind an endpoint is asked by
    `limbeck.collect.endpoints.asking` instead, many requests at a time.
    """

    def answer(
        self, stretches: Iterable[Sequence[Request]], wrote: Callable[[int], None] | None = None
    ) -> Iterator[list[Answer]]:
        """The answers, in lists of which each is journaled in one commit before anything else uses it.
        Each request is answered once.

        Requests come in stretches, read as they are needed: what is still open of a fixed stretch of the
        prompts. A teacher whose answers depend on what runs beside them cuts its batches inside a stretch,
        so that after a kill the same batches remain. `wrote` is told, as they are written, of so many tokens more.
        """
        ...


def make_teacher(
    settings: recipe.LocalTeacher | recipe.FileTeacher | recipe.EndpointTeacher, collect: recipe.Collect, seed: int
) -> Writing | Endpoint:
    """The teacher that a recipe describes. Its weights are loaded when it first has to answer."""
    match settings.kind:
        case "local":
            from limbeck.collect.local import LocalTeacher

            return LocalTeacher(settings, collect, seed)
        case "file":
            from limbeck.collect.answers import FileTeacher

            return FileTeacher(settings)
        case "openai" | "anthropic":
            from limbeck.collect.endpoints.teacher import Endpoint

            return Endpoint(settings, collect, seed)
