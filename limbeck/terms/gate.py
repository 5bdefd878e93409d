"""The gate's ruling: may a student for this use be trained on outputs generated under these terms on that day?

Three values: allowed, refused, unknown; unknown refuses too. What is not said is taken in its strictest sense, so
leaving something out never relaxes a verdict, and the verdict over several teachers is the strictest of theirs.
"Competing" is defined in no contract that was read: a general assistant is taken to compete, and whether anything else
does is unknown. A waiver (`limbeck.terms.waivers`) turns what is refused or unknown into `waived`, and never into
`allowed`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from limbeck.recipe import Use
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Obligation, Terms, find


class Outcome(StrEnum):
    """What the gate says, from the most to the least permissive."""

    ALLOWED = "allowed"
    WAIVED = "waived"
    UNKNOWN = "unknown"
    REFUSED = "refused"


STRICTNESS = {outcome: place for place, outcome in enumerate(Outcome)}
OTHER_ROUTE = "the outputs came by the route"
"""How the reason begins where the terms are about another route."""
PASSING = frozenset({Outcome.ALLOWED, Outcome.WAIVED})


class Ruling(NamedTuple):
    """A verdict with the clause that decided it and what travels with the student."""

    terms: str
    verdict: Outcome
    clause: str
    reason: str
    obligations: tuple[Obligation, ...]

    @property
    def passes(self) -> bool:
        """Whether training may go on: only what is allowed passes, or what a waiver lets through."""
        return self.verdict in PASSING


def rule_route(terms_id: str, use: Use, day: dt.date | None, route: str) -> Ruling:
    """As `rule`, for outputs that came by `route`, which has to be the one the terms are about: the same weights carry
    other terms self-hosted, through their maker's API and through a router. A day that nobody said decides nothing.

    Raises:
        InputError: no such terms.
    """
    if terms_id == UNKNOWN:
        return rule(terms_id, use, dt.date.min)
    due = "self-hosted" if terms_id == OWN_MODEL else find(terms_id).route
    if route != due:
        told = f"{OTHER_ROUTE} {route}, and these terms are about {due}"
        return Ruling(terms_id, Outcome.UNKNOWN, "" if terms_id == OWN_MODEL else find(terms_id).clause, told, ())
    if day is None and terms_id != OWN_MODEL:
        told = "nobody said on which day the outputs were generated"
        return Ruling(terms_id, Outcome.UNKNOWN, find(terms_id).clause, told, ())
    return rule(terms_id, use, day or dt.date.min)


def rule(terms_id: str, use: Use, day: dt.date) -> Ruling:
    """The ruling for outputs generated under `terms_id` on `day`, for a student meant for `use`.

    Raises:
        InputError: no such terms.
    """
    if terms_id == OWN_MODEL:
        return Ruling(terms_id, Outcome.ALLOWED, "", "the teacher is declared to be one's own model", ())
    if terms_id == UNKNOWN:
        return Ruling(terms_id, Outcome.UNKNOWN, "", "nobody said which terms the outputs are under", ())
    return _rule(find(terms_id), use, day)


def _rule(terms: Terms, use: Use, day: dt.date) -> Ruling:
    verdict, clause, reason = _decide(terms, use, day)
    obligations = tuple(o for o in terms.obligations if o.when.matches(use))
    if verdict is Outcome.ALLOWED and use.commercial and any(o.kind == "non-commercial" for o in obligations):
        verdict, reason = Outcome.REFUSED, "the terms are non-commercial and the declared use is commercial"
    if verdict is Outcome.REFUSED:
        reason = f"refused under our reading of {clause}, version {terms.id}: {reason}"
    return Ruling(terms.id, verdict, clause, reason, obligations)


def _decide(terms: Terms, use: Use, day: dt.date) -> tuple[Outcome, str, str]:
    if terms.read == "unverified":
        return Outcome.UNKNOWN, terms.clause, "the terms were not verified"
    if day < terms.effective:
        return Outcome.UNKNOWN, terms.clause, f"generated on {day}, before the terms held ({terms.effective})"
    if terms.superseded is not None and day >= terms.superseded:
        return (
            Outcome.UNKNOWN,
            terms.clause,
            f"generated on {day}, when another version held (from {terms.superseded})",
        )
    for clause in terms.forbidden:
        if clause.when.matches(use):
            return Outcome.REFUSED, clause.clause, clause.says
    if terms.outputs in ("allow", "conditional"):
        return Outcome.ALLOWED, terms.clause, terms.says
    if terms.outputs == "unknown":
        return Outcome.UNKNOWN, terms.clause, terms.says
    for clause in terms.exceptions:
        if clause.when.matches(use):
            return Outcome.ALLOWED, clause.clause, clause.says
    if terms.scope == "any-model" or use.purpose == "general-assistant":
        return Outcome.REFUSED, terms.clause, terms.says
    return Outcome.UNKNOWN, terms.clause, f"whether this use competes is defined nowhere. {terms.says}"


def strictest(rulings: Iterable[Ruling]) -> Ruling:
    """The ruling over several: the strictest verdict, with the obligations of all."""
    all_of_them = list(rulings)
    if not all_of_them:
        return Ruling(UNKNOWN, Outcome.UNKNOWN, "", "there is nothing to rule on", ())
    worst = max(all_of_them, key=lambda ruling: STRICTNESS[ruling.verdict])
    obligations = tuple(dict.fromkeys(o for ruling in all_of_them for o in ruling.obligations))
    return worst._replace(obligations=obligations)
