"""RUN/answers.json: what the teacher said, and what the student says before and after training, side by
side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from limbeck.errors import InputError, Problem
from limbeck.records import Digest, Message
from limbeck.rundir import atomic


class Drawn(BaseModel):
    """How the student's answers were drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int
    temperature: float
    top_p: float
    seed: Annotated[int, Field(ge=0, lt=2**53)]


class Answers(BaseModel):
    """One held-out prompt and three answers to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: Digest
    messages: tuple[Message, ...]
    teacher: str
    """What the teacher answered when it was collected, with the recipe's `collect` settings."""
    before: str
    """What the student answers before training."""
    student: str
    """And after."""
    teacher_name: str
    cut_off: tuple[str, ...]
    """Which of `before` and `student` ran into `drawn.max_tokens`."""
    drawn: Drawn


_LIST = TypeAdapter(tuple[Answers, ...])


def write_answers(path: str | os.PathLike[str], answers: Sequence[Answers]) -> None:
    """Write them as a JSON list, whole or not at all."""
    with atomic(path) as half:
        half.write_bytes(_LIST.dump_json(tuple(answers), indent=1))


def read_answers(path: str | os.PathLike[str]) -> list[Answers]:
    """`read_answers(p)` after `write_answers(p, a)` is `list(a)`. Raises `InputError` with all that does not
    fit.
    """
    try:
        return list(_LIST.validate_json(Path(path).read_bytes()))
    except ValidationError as error:
        problems = [
            Problem(
                f"{os.fspath(path)}: {'.'.join(map(str, detail['loc'])) or 'the whole file'}",
                repr(detail["input"])[:200],
                detail["msg"],
                "remove the file and run `limbeck evaluate` again",
            )
            for detail in error.errors(include_url=False)
        ]
        raise InputError("not a list of answers", problems) from error
