"""Where prompts come from: files, data sets, and models that write them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from limbeck.errors import Problem
from limbeck.recipe.parts import WHOLE, Part, PositiveFloat, PositiveInt, Probability

_Turns = Annotated[int, Field(ge=2, lt=2**53), WHOLE]


class TemplateMessage(Part):
    """One message of a template."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: str
    """Jinja over the row's columns, such as `Translate: {{ text }}`."""


class Template(Part):
    """Messages made of a row's columns, in Jinja. A column that a row lacks is an error."""

    prompt: str | None = None
    """The user's message."""
    system: str | None = None
    """A system message before `prompt`."""
    messages: tuple[TemplateMessage, ...] | None = None
    """The whole chat instead of `prompt` and `system`; it ends with the user's message."""

    @model_validator(mode="after")
    def _one_form(self) -> Template:
        given = [key for key in ("prompt", "system", "messages") if getattr(self, key) is not None]
        if given not in (["prompt"], ["prompt", "system"], ["messages"]):
            remedy = "leave out messages, or the others" if "messages" in given else "add prompt"
            problem = Problem("template", ", ".join(given) or "nothing", "prompt, with or without system; or messages")
            problem = problem._replace(remedy=remedy)
            raise PydanticCustomError("parts_disagree", "{text}", {"text": str(problem), "problems": [problem]})
        return self

    @property
    def parts(self) -> tuple[TemplateMessage, ...]:
        """The messages, however they were given."""
        if self.messages is not None:
            return self.messages
        system = () if self.system is None else (TemplateMessage(role="system", content=self.system),)
        return (*system, TemplateMessage(role="user", content=self.prompt or ""))


class _Rows(Part):
    column: str | None = None
    """The column with the prompt's text, where it is called neither `prompt` nor `messages`."""
    template: Template | None = None
    """Makes the prompt of several columns, instead of taking it from one."""
    licence: str = "unknown"
    """SPDX id of the licence the prompts are under."""
    terms: str | None = None
    """Id of the terms the prompts are under, where a model wrote them or the terms of a data set hold; null says that
    no model wrote them."""
    generated: date | None = None
    """Day on which a model wrote them, or the data set was had; needed with `terms`."""
    limit: PositiveInt | None = None
    """Use only the first so many different prompts."""

    @model_validator(mode="after")
    def _one_way(self) -> _Rows:
        if self.template is not None and self.column is not None:
            problem = Problem("column", "column and template", "one of them", "remove column")
            raise PydanticCustomError("parts_disagree", "{text}", {"text": str(problem), "problems": [problem]})
        return self


class FilePrompts(_Rows):
    """Prompts from a JSONL, Parquet, CSV or TSV file, with rows of `messages` or of `prompt`."""

    kind: Literal["file"] = "file"
    """Rows of a file."""
    path: str
    """The file; all but Parquet may be packed (`.gz`, `.zst`). A relative path starts at the recipe's directory, or
    else at the working directory."""
    format: Literal["auto", "jsonl", "parquet", "csv", "tsv"] = "auto"
    """`auto` goes by the file's suffix."""

    @property
    def name(self) -> str:
        """What the records call this source."""
        return self.path


class DatasetPrompts(_Rows):
    """Prompts from a Hugging Face data set, read row by row (needs the extra `datasets`)."""

    kind: Literal["dataset"] = "dataset"
    """Rows of a data set."""
    path: str
    """The data set's name on the hub, or a local directory that holds one: with data files, or as `save_to_disk` wrote
    it."""
    config: str | None = None
    """The configuration, where there are several."""
    split: str = "train"
    """Which split."""
    revision: str | None = None
    """Commit, tag or branch on the hub. Name a commit: then the rows stay what they are."""
    data_files: tuple[str, ...] = ()
    """Only these files of it; patterns are allowed."""

    @property
    def name(self) -> str:
        """What the records call this source."""
        more = "".join(f"{mark}{value}" for mark, value in (("@", self.revision), (":", self.config)) if value)
        return f"{self.path}{more}:{self.split}"


class SelfPrompt(Part):
    """Prompts the teacher writes itself: it is given its own chat template up to the user's turn."""

    kind: Literal["self-prompt"] = "self-prompt"
    """Written by the teacher."""
    count: PositiveInt
    """How many different prompts to gather."""
    max_tokens: PositiveInt = 48
    """Longest prompt kept, in tokens; what runs longer is dropped, not cut."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the prompts; higher is more varied."""
    top_p: Probability = 0.95
    """Each token is drawn from the likeliest ones that together have this probability."""
    system: str | None = None
    """A system message to start from; null leaves what the chat template puts there itself."""


RowPrompts = Annotated[FilePrompts | DatasetPrompts, Field(discriminator="kind")]
"""Rows that somebody wrote before."""


class _Written(Part):
    count: PositiveInt
    """How many different prompts to gather."""
    by: str | None = None
    """The teacher that writes them, by its `model`; null is the first. It is recorded as their writer."""
    max_tokens: PositiveInt = 512
    """Longest prompt, in tokens; what runs longer is dropped, not cut."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the prompts."""
    top_p: Probability = 0.95
    """Each token is drawn from the likeliest ones that together have this probability."""
    min_words: PositiveInt = 3
    """Prompts with fewer words are dropped."""
    max_words: PositiveInt = 400
    """Prompts with more words are dropped."""
    similarity: Probability | None = 0.7
    """Prompts more alike than this to what they were made from, or to one kept before, are dropped: twice the longest
    common subsequence of words, over the words of both (ROUGE-L). null drops none."""


class EvolvePrompts(_Written):
    """Prompts that a teacher makes of others, harder ones or ones beside them (Evol-Instruct, arXiv 2304.12244)."""

    kind: Literal["evolve"] = "evolve"
    """Evolved from seeds."""
    seeds: RowPrompts
    """The prompts to begin with."""
    rounds: PositiveInt = 3
    """The first round evolves seeds, each later one what the round before made."""


class PersonaPrompts(_Written):
    """Prompts that a teacher writes as somebody else would: a persona with a task (arXiv 2406.20094)."""

    kind: Literal["personas"] = "personas"
    """A persona with a task."""
    personas: RowPrompts
    """Who asks, a description a row."""
    tasks: RowPrompts
    """What is asked for, a task a row."""


class DocumentPrompts(_Written):
    """Questions that a teacher asks about documents."""

    kind: Literal["documents"] = "documents"
    """Questions about documents."""
    documents: RowPrompts
    """The documents, one a row."""
    words: PositiveInt = 300
    """Most words of a piece: each document is cut into as few pieces as that allows, all of one length."""
    show: bool = True
    """Whether the piece stands in the prompt before the question; else it is only used to ask."""


class SelfInstructPrompts(_Written):
    """Prompts that a teacher adds to a list of others (Self-Instruct, arXiv 2212.10560)."""

    kind: Literal["self-instruct"] = "self-instruct"
    """Added to a list of seeds."""
    seeds: RowPrompts
    """The prompts to begin with; of a chat, the user's last words."""
    max_tokens: PositiveInt = 1024
    """Longest list of new prompts, in tokens; the last of a list that runs longer is dropped."""
    examples: PositiveInt = 8
    """Prompts that the teacher is shown at a time: seeds, and from the second round on one in four that it wrote
    before."""
    each: PositiveInt = 8
    """New prompts that it is asked for at a time."""
    rounds: PositiveInt = 4
    """What was kept in a round is among the examples of all later ones."""


class MultiTurnPrompts(_Written):
    """Chats that a teacher leads with itself: it answers, and then says what the user says next."""

    kind: Literal["multi-turn"] = "multi-turn"
    """Chats of several turns."""
    seeds: RowPrompts
    """What the chats begin with: rows that end with the user's message."""
    turns: _Turns = 3
    """The user's messages: the seed's last, and what is written after it. The chat ends with one."""
    teacher: str | None = None
    """The teacher that answers the user, by its `model`; null is the one of `by`, who plays the user. It has to be the
    same one, since a prompt is recorded with one writer."""
    max_tokens: PositiveInt = 1024
    """Longest message, in tokens; a chat with a longer one is dropped, not cut."""


WrittenPrompts = EvolvePrompts | PersonaPrompts | DocumentPrompts | SelfInstructPrompts | MultiTurnPrompts
"""Prompts that a teacher writes when it is told to."""

PromptSource = Annotated[
    FilePrompts
    | DatasetPrompts
    | SelfPrompt
    | EvolvePrompts
    | PersonaPrompts
    | DocumentPrompts
    | SelfInstructPrompts
    | MultiTurnPrompts,
    Field(discriminator="kind"),
]


def rows_of(source: Part) -> Iterator[tuple[str, FilePrompts | DatasetPrompts]]:
    """The rows that a source reads, each with its key below the source's: `` for its own, else such as `seeds`."""
    if isinstance(source, FilePrompts | DatasetPrompts):
        yield "", source
        return
    for key in type(source).model_fields:
        if isinstance(value := getattr(source, key), FilePrompts | DatasetPrompts):
            yield key, value
