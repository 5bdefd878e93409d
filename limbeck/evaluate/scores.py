"""RUN/scores.json: a list of scores, each with exactly the fields of `limbeck.records.Score`, in a fixed
order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from limbeck.errors import InputError, Problem
from limbeck.records import Score
from limbeck.rundir import atomic

NAMES = ("agreement_top1", "kl_forward", "perplexity_on_teacher")
SUBJECTS = ("before", "student", "teacher")

_LIST = TypeAdapter(tuple[Score, ...])


def write_scores(path: str | os.PathLike[str], scores: Iterable[Score]) -> None:
    """Write scores as a JSON list of objects, whole or not at all. A value that was not measured is null,
    never 0.
    """
    with atomic(path) as half:
        half.write_bytes(_LIST.dump_json(tuple(scores), indent=1))


def read_scores(path: str | os.PathLike[str]) -> list[Score]:
    """Read them back: `read_scores(p)` after `write_scores(p, s)` is `list(s)`.

    Raises `InputError` with every place at which the file is not a list of scores.
    """
    try:
        return list(_LIST.validate_json(Path(path).read_bytes()))
    except ValidationError as error:
        raise InputError("not a list of scores", list(_problems(path, error))) from error


def score_of(scores: Iterable[Score], name: str, subject: str) -> Score | None:
    """The score with that name and subject, or None where there is none."""
    return next((s for s in scores if s.name == name and s.subject == subject), None)


def _problems(path: str | os.PathLike[str], error: ValidationError) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        place = ".".join(str(part) for part in detail["loc"])
        yield Problem(
            f"{os.fspath(path)}: {place or 'the whole file'}",
            repr(detail["input"])[:200],
            detail["msg"],
            "remove the file and run `limbeck evaluate` again",
        )
