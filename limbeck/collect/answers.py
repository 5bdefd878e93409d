"""A teacher whose answers lie in a file: nothing is asked, and everything is journaled like any other answer.

A row is `{"prompt": ..., "completion": ...}` or `{"messages": [...], "completion": ...}`, where the messages end with
the user's; `reasoning` and `finish_reason` may stand beside. Several rows with one prompt are its samples, in their
order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from limbeck import recipe
from limbeck.collect.readers.jsonl import read_jsonl
from limbeck.collect.readers.row import Columns
from limbeck.collect.rows import Wrong, messages_of, not_utf8, shown
from limbeck.collect.teachers import Answer, Parsed, Request
from limbeck.errors import InputError, Problem, PromptError
from limbeck.ledger.canonical import canonical, digest_json
from limbeck.recipe import FilePrompts
from limbeck.records import Digest, Prompt, TeacherIdentity

_LISTED = 20


class FileAnswer(BaseModel):
    """What the journal holds of an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["file/1"] = "file/1"
    model: str
    text: str
    reasoning: str | None = None
    finish_reason: str = "stop"
    generated: str | None = None
    """The day, as the recipe says it."""

    def value(self) -> dict[str, JsonValue]:
        """As it is journaled."""
        return self.model_dump(mode="json")


class FileTeacher:
    """A `Writing` teacher."""

    def __init__(self, settings: recipe.FileTeacher):
        self._settings = settings
        self.identity = TeacherIdentity(
            name=settings.name,
            kind="file",
            provider=settings.provider,
            route=settings.route,
            model=settings.model,
            weights=None,
            terms=settings.terms,
        )

    @cached_property
    def answers(self) -> dict[Digest, list[FileAnswer]]:
        """By the prompt's id. Raises `PromptError` with every wrong row."""
        return read_answers(self._settings)

    def request(self, prompt: Prompt, sample: int) -> Request:
        """What stands for having asked: the prompt, and the digest of the answer that the file has. Raises
        `PromptError` where it has none.
        """
        found = self.answers.get(prompt.id, [])
        if sample >= len(found):
            have = f"{len(found)} answers" if found else "no answer"
            where = f"{prompt.source}: {shown(prompt.messages[-1].content)}"
            remedy = "add a row, remove the prompt, or lower collect.samples"
            problem = Problem(where, f"{have} in {self._settings.path}", f"an answer for sample {sample}", remedy)
            raise PromptError("prompts without an answer in the file", [problem])
        messages: list[JsonValue] = [message.model_dump(mode="json") for message in prompt.messages]
        return Request.of({
            "form": "file/1", "model": self._settings.model, "messages": messages, "sample": sample,
            "answer": digest_json(found[sample].value()),
        })  # fmt: skip

    def answer(
        self, stretches: Iterable[Sequence[Request]], wrote: Callable[[int], None] | None = None
    ) -> Iterator[list[Answer]]:
        """Each stretch at once: nothing is computed, and nothing written."""
        by_digest = {digest_json(a.value()): a for several in self.answers.values() for a in several}
        for stretch in stretches:
            yield [Answer(request, canonical(by_digest[_asked(request)].value())) for request in stretch]

    def parse(self, request: Request, raw: bytes) -> Parsed:
        """What the row says. Tokens were not counted by anybody, so none are told. Raises `InputError` for bytes that
        no file teacher journaled.
        """
        try:
            found = FileAnswer.model_validate_json(raw)
        except ValidationError as error:
            where, told = f"an answer of {self.identity.name}", shown(raw[:200].decode(errors="replace"))
            problem = Problem(where, told, "an answer of form file/1", "use the limbeck that wrote the journal")
            raise InputError("a journaled answer cannot be read", [problem]) from error
        return Parsed(found.text, found.reasoning, found.finish_reason, found.model, 0, 0)


def _asked(request: Request) -> str:
    """The digest of the answer that a request is for."""
    return json.loads(request.body)["answer"]


def read_answers(settings: recipe.FileTeacher) -> dict[Digest, list[FileAnswer]]:
    """The answers of a file by their prompt. Raises `PromptError` with every wrong row, the first 20 listed."""
    if not Path(settings.path).is_file():
        problem = Problem(settings.path, "no such file", "a JSONL file of answers", "check `path` of the teacher")
        raise PromptError("the answers cannot be read", [problem])
    found: dict[Digest, list[FileAnswer]] = {}
    wrong: list[Problem] = []
    for where, row in read_jsonl(FilePrompts(path=settings.path), Columns((), every=False)):
        messages = row if isinstance(row, Wrong) else messages_of(row, None)
        answer = row if isinstance(row, Wrong) else _answer(row, settings)
        if isinstance(messages, Wrong):
            wrong.append(Problem(where, *messages))
        elif isinstance(answer, Wrong):
            wrong.append(Problem(where, *answer))
        else:
            found.setdefault(Prompt.id_of(messages), []).append(answer)
    if wrong:
        listed = f", the first {_LISTED} of them" if len(wrong) > _LISTED else ""
        raise PromptError(f"{settings.path}: {len(wrong)} wrong rows{listed}", wrong[:_LISTED])
    return found


def _answer(row: dict[str, JsonValue], settings: recipe.FileTeacher) -> FileAnswer | Wrong:
    expected = "text; reasoning and finish_reason too, where they are there"
    values = {key: row.get(key) for key in ("completion", "reasoning", "finish_reason")}
    for key, value in values.items():
        if not isinstance(value, str) and (value is not None or key == "completion"):
            return Wrong(f"{key}: {shown(value)}", expected, "write the answer as text in quotes, under `completion`")
        if isinstance(value, str) and (lone := not_utf8(value)):
            return Wrong(f"{key}: {lone}", "text that UTF-8 can hold", "replace it, or remove the row")
    day = settings.generated.isoformat() if settings.generated else None
    said = {"text": values["completion"], "reasoning": values["reasoning"], "generated": day}
    finish = {"finish_reason": values["finish_reason"]} if values["finish_reason"] else {}
    return FileAnswer.model_validate(said | {"model": settings.model} | finish)
