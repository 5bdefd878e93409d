"""The records that flow from stage to stage, one type per arrow.

    Recipe --collect--> Completion --curate--> Verdict --render--> Example --annotate--> Signal
           --train--> Checkpoint --evaluate--> Score --report--> Report

What is evidence on disk is a frozen pydantic model with a version; what meets the processor (`Example`, the signals
in `limbeck.signal`) is a frozen dataclass that can be derived again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from limbeck.ledger.canonical import digest_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A tagged hash: the algorithm's name and every parameter that changes the output come before the colon."""


class Split(StrEnum):
    """What a prompt is for. A held-out prompt is never trained on, whether or not the evaluation comes to use it."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tool(_Record):
    """A function that a teacher may call."""

    name: str
    description: str | None = None
    parameters: JsonValue = Field(default={"type": "object", "properties": {}})
    """JSON Schema of its arguments."""


class ToolCall(_Record):
    """A function that an assistant called."""

    name: str
    arguments: str
    """As they were given: JSON text, or what was meant to be."""
    id: str | None = None
    """By which a result refers to it."""

    def values(self) -> dict[str, JsonValue]:
        """The arguments as an object. Raises `ValueError` where they are none."""
        found = json.loads(self.arguments or "{}")
        if not isinstance(found, dict):
            raise ValueError(f"arguments that are no object: {self.arguments[:80]}")
        return found


class Part(_Record):
    """A piece of a message that is more than text: text, or an image."""

    text: str | None = None
    image: str | None = None
    """A `data:` URL that holds the image, or an address that the teacher fetches it from."""
    digest: Digest | None = None
    """Of the image's bytes; None for an address: nobody here has read what lies there."""


class Message(_Record):
    """One chat message. What only some messages have stands nowhere in the others' dumps and digests."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    """Its text; of a message in parts, their texts, a line each."""
    parts: tuple[Part, ...] | None = None
    """The message in its order, where it has images."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """What an assistant called."""
    tool_call_id: str | None = None
    """Which call a tool's message is the result of."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}

    @property
    def images(self) -> int:
        """How many images it has."""
        return sum(part.image is not None for part in self.parts or ())


class Parent(_Record):
    """What a prompt was made from."""

    id: Digest
    """`Prompt.id_of` its messages."""
    source: str
    """The file or data set; for an earlier prompt, its own source."""
    licence: str
    """SPDX id of the source's licence, or `unknown`."""
    kind: Literal["seed", "document", "persona", "task", "prompt"] | None = None
    """What it was to its writer. A `prompt` was written before, and is an earlier row of the same table. None where an
    earlier version did not say.
    """


class Prompt(_Record):
    """What a teacher is asked: chat messages, where they came from, and which split they belong to."""

    id: Digest
    messages: tuple[Message, ...]
    source: str
    """The file, or the model that wrote the prompt (`self-prompt:MODEL`)."""
    licence: str
    """SPDX id of the source's licence, or `unknown`."""
    split: Split
    writer: str | None = None
    """The teacher that wrote the prompt's tokens (a `TeacherIdentity.name`), or None if no model did."""
    tools: tuple[Tool, ...] | None = None
    """Functions that may be called; None leaves it to the recipe."""
    json_schema: dict[str, JsonValue] | None = None
    """What the answer has to be; None leaves it to the recipe."""
    parents: tuple[Parent, ...] | None = None
    """What its writer made it from: rows of files, and prompts written before. An evolved prompt has the seed that it
    began as, and the prompt that it was evolved from."""

    @staticmethod
    def id_of(
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...] | None = None,
        json_schema: dict[str, JsonValue] | None = None,
    ) -> Digest:
        """The content digest that names a prompt: equal messages have equal ids, whatever their source. Tools and a
        schema of its own make another prompt of it.
        """
        said: list[JsonValue] = [m.model_dump(mode="json") for m in messages]
        if tools is None and json_schema is None:
            return digest_json(said)
        named: list[JsonValue] | None = None if tools is None else [tool.model_dump(mode="json") for tool in tools]
        return digest_json({"messages": said, "tools": named, "json_schema": json_schema})


class TeacherIdentity(_Record):
    """Who answers: enough to say later which model it was and on which terms it was used."""

    name: str
    """The model as the recipe writes it; unique within a recipe."""
    kind: str
    provider: str
    """Who runs it: `self-hosted`, or the API's host."""
    route: str
    """How it is reached: `self-hosted`, `maker-api` or `router`."""
    model: str
    """The model that was asked for."""
    weights: Digest | None
    """Digest of the weights' bytes, where they are at hand."""
    terms: str


class Completion(_Record):
    """One answer of one teacher to one prompt."""

    prompt_id: Digest
    sample: int
    """0 to `collect.samples` - 1."""
    messages: tuple[Message, ...]
    """The prompt's messages, as they were sent."""
    text: str
    reasoning: str | None
    """What the teacher thought before it answered, where it says so apart."""
    finish_reason: str
    """`stop`, `length` (cut off at max_tokens), or what the provider said."""
    model: str
    """The model that answered, by its own word."""
    teacher: str
    """`TeacherIdentity.name` of the teacher that was asked."""
    provider: str
    route: str
    weights: Digest | None
    terms: str
    prompt_tokens: int
    completion_tokens: int
    created: datetime
    """When the answer was journaled, UTC."""
    request_id: str
    """The journal's key: digest of the full request and the sample index."""
    response: Digest
    """Digest of the raw response bytes in the journal."""
    split: Split
    batch: str | None = None
    """The provider's id of the batch in which it came; None where it was asked for alone, or written here."""
    tools: tuple[Tool, ...] | None = None
    """Functions that it was told of, by its prompt or by the recipe."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """What it called, in its order."""
    json_schema: dict[str, JsonValue] | None = None
    """What the answer had to be, by its prompt or by the recipe."""
    mismatch: str | None = None
    """How the answer is not what its schema asks for; None where it is, or where none was asked."""
    answer_id: str | None = None
    """The provider's own id of the answer, where it gave one."""
    fingerprint: str | None = None
    """What the API says of the weights and the configuration that answered, where it does (`system_fingerprint`)."""

    @property
    def id(self) -> Digest:
        """Digest of what was asked and answered; not of when or in which run."""
        said: list[JsonValue] = [
            self.prompt_id, self.sample, self.teacher, self.text, self.reasoning, self.finish_reason
        ]  # fmt: skip
        if self.tool_calls:
            said.append([call.model_dump(mode="json") for call in self.tool_calls])
        return digest_json(said)

    def answers(self, prompt_id: Digest) -> bool:
        """Whether these messages are that prompt's. Tools and schema may be its own or the recipe's."""
        return prompt_id in {
            Prompt.id_of(self.messages, tools, schema)
            for tools in ([self.tools, None] if self.tools else [None])
            for schema in ([self.json_schema, None] if self.json_schema else [None])
        }


class Verdict(NamedTuple):
    """Keep a completion, or drop it: by which filter and why."""

    prompt_id: str
    sample: int
    teacher: str
    completion: str
    """`Completion.id`."""
    keep: bool
    filter: str
    """Name of the filter that dropped it; empty when kept."""
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One chat as tokens. A cache: derived from a completion by tokenizer and chat template.

    `mask_T[t]` is True where token t was written by the teacher and is to be learned; the position that predicts it
    is t - 1.
    """

    id: str
    """Digest of tokens, mask and parent completion."""
    tokens_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]
    prompt_id: str
    completion: str
    """`Completion.id`, the parent."""
    teacher: str
    split: Split

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int(self.mask_T.sum())


class Rollout(_Record):
    """One answer that the student wrote while it learned, and learned from."""

    step: int
    """The optimiser step, from 0, that learned from it."""
    slot: int
    """Its number among the answers of that step."""
    written_at: int
    """Steps the student had learned when it wrote it; at most `step`."""
    prompt_id: Digest
    tokens: tuple[int, ...]
    """What was written, with the token that ended it."""
    text: str
    finish_reason: str
    """`stop`, or `length` (cut off at max_tokens)."""
    created: datetime
    """When the answer was journaled, UTC."""
    request_id: Digest
    """The journal's key: digest of the full request."""
    response: Digest
    """Digest of the raw answer in the journal."""


class Checkpoint(_Record):
    """A model directory in Hugging Face layout."""

    path: str
    """Relative to RUN."""
    manifest: Digest
    """Digest over the names and digests of all its files."""
    step: int
    tokens: int
    """Supervised tokens seen, over all epochs."""


class Score(_Record):
    """One figure with its interval, or the reason why there is none. Never 0 for "did not run"."""

    name: str
    subject: Literal["student", "before", "teacher"]
    value: float | None
    low: float | None
    high: float | None
    """A 95 % interval, bootstrapped over held-out prompts."""
    n: int
    """Held-out prompts the figure rests on."""
    unit: str
    seed: int
    unscored: str | None = None
    """Why there is no value."""


class Entry(_Record):
    """One ledger record: what a stage read, what it wrote, with which settings and which code."""

    version: Literal[1] = 1
    index: int = Field(ge=0)
    stage: str
    started: datetime
    finished: datetime
    inputs: dict[str, Digest]
    """Digest of each thing read, by its path in RUN, or by a name for what lies outside."""
    outputs: dict[str, Digest]
    recipe: Digest
    """`Recipe.digest`."""
    facts: dict[str, JsonValue]
    """Counts and choices a reader wants to see: rows, tokens, layers kept and why."""
    limbeck: str
    """Version of the code."""
    commit: str | None
    """Git commit of the code, where it runs from a checkout."""
    dirty: bool | None
    """Whether that checkout had uncommitted changes."""
    previous: Digest
    """Digest of the entry before; of the empty string for the first."""


class Report(_Record):
    """What a person reads."""

    path: str
    entries: tuple[Digest, ...]
    """The ledger entries its claims rest on."""
