"""What the gate said of a set of examples, as it lies in RUN/gate: for every source of tokens the verdict, the clause
that decided it, and what travels with the student.

    RUN/gate/rulings.json   `Rulings`
    RUN/gate/rows.parquet   an example a row: its digest, its verdict, and the rulings that it comes from
    RUN/gate/token.json     the signed token (`limbeck.terms.token`)
"""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from limbeck.errors import Problem
from limbeck.recipe import Recipe, Use
from limbeck.records import Digest
from limbeck.terms.gate import STRICTNESS, Outcome, Ruling, rule_route, strictest
from limbeck.terms.sources import Role, Source, days_ahead, told_otherwise
from limbeck.terms.terms import OWN_MODEL, Obligation
from limbeck.terms.waivers import Waiver, apply_waivers, read_waivers

GATE = "gate"
RULINGS, ROWS, TOKEN = "rulings.json", "rows.parquet", "token.json"
"""Files of RUN/gate."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ruled(_Record):
    """The ruling on what one source generated on one day."""

    role: Role
    name: str
    terms: str
    route: str
    day: dt.date | None
    verdict: Outcome
    clause: str
    reason: str
    obligations: tuple[Obligation, ...]
    waiver: Digest | None = None
    """Of the envelope of the waiver that lets it through."""
    rows: int = 0
    """Examples that it counts for, of both splits."""
    tokens: int = 0
    """Supervised tokens of those that are trained on."""

    @property
    def ruling(self) -> Ruling:
        """Without its source."""
        return Ruling(self.terms, self.verdict, self.clause, self.reason, self.obligations)


class WaiverSeen(_Record):
    """A waiver that let something through."""

    digest: Digest
    terms: str
    by: str
    reason: str
    expires: dt.date

    @property
    def words(self) -> str:
        """Who let what through, until when, and why."""
        return f"{self.by} let {self.terms} through until {self.expires}, against what the terms say: {self.reason}"


class Rulings(_Record):
    """All rulings on a set of examples."""

    version: Literal[1] = 1
    use: Use
    day: dt.date
    """When the gate ruled, UTC."""
    verdict: Outcome
    """The strictest of all."""
    clause: str
    reason: str
    obligations: tuple[Obligation, ...]
    rows: int
    rulings: tuple[Ruled, ...]
    waivers: tuple[WaiverSeen, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether a student for this use may be trained on the set."""
        return self.whole.passes

    @property
    def whole(self) -> Ruling:
        """The ruling on the whole set."""
        return strictest(one.ruling for one in self.rulings)

    def of_teacher(self, name: str) -> tuple[Ruled, ...]:
        """All rulings on one teacher, in every role and for every day."""
        return tuple(one for one in self.rulings if one.name == name)

    def strictest_of(self, name: str) -> Ruled | None:
        """The strictest ruling on a teacher, with the obligations of all and the rows and tokens of its answers; None
        for one that nobody ruled on.
        """
        if not (own := self.of_teacher(name)):
            return None
        worst = max(own, key=lambda one: STRICTNESS[one.verdict])
        answers = [one for one in own if one.role == "answer"]
        return worst.model_copy(
            update={
                "obligations": tuple(dict.fromkeys(o for one in own for o in one.obligations)),
                "rows": sum(one.rows for one in answers),
                "tokens": sum(one.tokens for one in answers),
            }
        )


class Judged(_Record):
    """Rulings, with what is wrong with waivers that could have helped."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    ruled: tuple[Ruled, ...]
    waivers: tuple[Waiver, ...]
    """Those that let something through."""
    unfit: tuple[Problem, ...]


def judge(recipe: Recipe, sources: Sequence[Source], day: dt.date, *, counts: Counter[Source] | None = None,
          tokens: Counter[Source] | None = None) -> Judged:  # fmt: skip
    """The ruling on each source, for the recipe's use and with its waivers as of `day`.

    Raises:
        InputError: no such terms, or a file of the recipe's that holds no waiver.
    """
    ahead = days_ahead(recipe, day)
    plain = [rule_route(s.terms, recipe.use, s.day, s.route) for s in sources]
    plain = [_not_yet(one, ahead[s], day) if s in ahead else one for s, one in zip(sources, plain, strict=True)]
    plain = [_contradicted(one, told_otherwise(recipe, s)) for s, one in zip(sources, plain, strict=True)]
    after = apply_waivers(plain, recipe.use, read_waivers(recipe), day)
    ruled = tuple(
        Ruled(
            role=source.role,
            name=source.name,
            terms=source.terms,
            route=source.route,
            day=source.day,
            verdict=ruling.verdict,
            clause=ruling.clause,
            reason=ruling.reason,
            obligations=ruling.obligations,
            waiver=waiver.digest if waiver else None,
            rows=counts[source] if counts else 0,
            tokens=tokens[source] if tokens else 0,
        )
        for source, ruling, waiver in zip(sources, after.rulings, after.used, strict=True)
    )
    used = {waiver.digest: waiver for waiver in after.used if waiver}
    return Judged(ruled=ruled, waivers=tuple(used.values()), unfit=tuple(after.unfit))


def _contradicted(ruling: Ruling, told: str | None) -> Ruling:
    """What is said of terms or route does not count against a host that is known; which terms hold is unknown then."""
    if told is None or not ruling.passes:
        return ruling
    return ruling._replace(verdict=Outcome.UNKNOWN, reason=told, obligations=())


def _not_yet(ruling: Ruling, said: dt.date, day: dt.date) -> Ruling:
    """Nothing that is there already was generated on a day that is still to come, so that day decides nothing."""
    if ruling.terms == OWN_MODEL or not ruling.passes:
        return ruling
    told = f"said to be generated on {said}, and today is {day}"
    return ruling._replace(verdict=Outcome.UNKNOWN, reason=told, obligations=())


def rulings_of(run: str | os.PathLike[str]) -> Rulings | None:
    """What the gate said of a run; None where it was not asked. Raises `ValueError` for a file that was changed into
    something else.
    """
    path = Path(run) / GATE / RULINGS
    return Rulings.model_validate_json(path.read_bytes()) if path.is_file() else None
