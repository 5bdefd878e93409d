"""The records that flow from stage to stage, one type per arrow.

    Recipe --collect--> Completion --curate--> Verdict --render--> Example --annotate--> Signal
           --train--> Checkpoint --evaluate--> Score --report--> Report

What is evidence on disk is a frozen pydantic model with a version; what meets the processor (`Example`, the signals
in `limbeck.signal`) is a frozen dataclass that can be derived again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

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


class Message(_Record):
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Parent(_Record):
    """What a prompt was made from."""

    id: Digest
    """`Prompt.id_of` its messages."""
    source: str
    """The file or data set."""
    licence: str
    """SPDX id of the source's licence, or `unknown`."""


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
    parents: tuple[Parent, ...] = ()
    """What its writer made it from; for an evolved prompt, the seed it began as."""

    @staticmethod
    def id_of(messages: tuple[Message, ...]) -> Digest:
        """The content digest that names a prompt: equal messages have equal ids, whatever their source."""
        return digest_json([m.model_dump(mode="json") for m in messages])


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

    @property
    def id(self) -> Digest:
        """Digest of what was asked and answered; not of when or in which run."""
        return digest_json([self.prompt_id, self.sample, self.teacher, self.text, self.reasoning, self.finish_reason])


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
