"""The register of terms: what each version of each provider's terms or licence says of training on outputs.

A row holds a short paraphrase, the clause, the day from which it holds, the day it was read, and how: `primary` (the
text itself), `transcription` (a third party's dated copy), or `unverified`, which decides nothing. The route is part of
the row, because the same weights carry different terms self-hosted, through their maker's API, and through a router.

Whatever could make a row stricter has to be written, even where there is nothing of it: a file that lost a line is no
row, and not a more permissive one.
"""

from __future__ import annotations

import datetime as dt
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from limbeck.errors import InputError, Problem
from limbeck.recipe import Use

OWN_MODEL = "own-model"
"""Terms id of a model that is one's own: nobody else's terms apply."""
UNKNOWN = "unknown"
"""Terms id of whoever did not say."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class When(_Part):
    """For which uses something holds: every key given must match; a key left out matches all."""

    distribution: tuple[Literal["internal", "hosted", "public-weights"], ...] | None = None
    purpose: tuple[Literal["general-assistant", "task-specific", "classifier", "research"], ...] | None = None
    commercial: bool | None = None

    def matches(self, use: Use) -> bool:
        """Whether `use` is one of these."""
        return (
            (self.distribution is None or use.distribution in self.distribution)
            and (self.purpose is None or use.purpose in self.purpose)
            and (self.commercial is None or use.commercial == self.commercial)
        )


class Only(_Part):
    """For which uses something is excepted: all keys are there, so that one left out cannot widen an exception."""

    distribution: tuple[Literal["internal", "hosted", "public-weights"], ...]
    purpose: tuple[Literal["general-assistant", "task-specific", "classifier", "research"], ...]
    commercial: tuple[bool, ...]

    def matches(self, use: Use) -> bool:
        """Whether `use` is one of these."""
        return (
            use.distribution in self.distribution and use.purpose in self.purpose and use.commercial in self.commercial
        )


class Clause(_Part):
    """A clause that refuses some uses although the terms as a whole do not."""

    when: When
    clause: str
    says: str


class Exemption(_Part):
    """A clause that allows some uses although the terms as a whole do not."""

    when: Only
    clause: str
    says: str


class Obligation(_Part):
    """What travels with the student."""

    kind: Literal[
        "name-prefix",
        "notice",
        "display",
        "use-limits",
        "share-alike",
        "non-commercial",
        "label",
        "attribution",
    ]
    value: str
    text: str = ""
    """What has to be put into a notice or shown, word for word, where the terms ask for certain words."""
    when: When = When()


class Terms(_Part):
    """One version of terms."""

    id: str
    holder: str
    covers: str
    route: Literal["self-hosted", "maker-api", "maker-app", "router", "dataset"]
    kind: Literal["service-contract", "weights-licence", "dataset-licence", "router"]
    effective: dt.date
    superseded: dt.date | None
    """From this day on another version holds."""
    retrieved: dt.date
    read: Literal["primary", "transcription", "unverified"]
    clause: str
    outputs: Literal["allow", "conditional", "forbid", "unknown"]
    """What the terms say of training other models on outputs; `conditional` allows it with the obligations."""
    scope: Literal["any-model", "competing", "general-purpose", "image-only"]
    """Which models a prohibition is about."""
    says: str
    forbidden: tuple[Clause, ...]
    """Uses that are refused although the rest is unknown."""
    exceptions: tuple[Exemption, ...] = ()
    """Uses that are allowed although the rest is forbidden."""
    obligations: tuple[Obligation, ...]
    address: str
    note: str = ""


@cache
def register() -> dict[str, Terms]:
    """All terms by id, sorted."""
    rows = [
        Terms.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in files("limbeck.terms").joinpath("register").iterdir()
        if path.name.endswith(".yaml")
    ]
    return {row.id: row for row in sorted(rows, key=lambda row: row.id)}


def find(terms_id: str) -> Terms:
    """The terms of that id.

    Raises:
        InputError: no such id; names the nearest ones.
    """
    rows = register()
    if terms_id not in rows:
        from difflib import get_close_matches

        near = get_close_matches(terms_id, rows, n=3, cutoff=0.4)
        raise InputError(
            "no such terms",
            [
                Problem(
                    "terms",
                    terms_id,
                    f"an id of the register; in a recipe also {OWN_MODEL}",
                    f"nearest: {', '.join(near)}" if near else "`limbeck terms list` shows all",
                ),
            ],
        )
    return rows[terms_id]
