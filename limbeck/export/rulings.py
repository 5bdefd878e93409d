"""What is to be told of the terms of each teacher's outputs: what the gate ruled, as it lies in the run. Only where no
gate ruled is the register of terms asked.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from limbeck.recipe import Use
from limbeck.terms.gate import Ruling, rule_route, strictest
from limbeck.terms.rulings import Rulings
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Terms, register


def gate_said(rulings: Rulings | None, teacher: str) -> Ruling | None:
    """The gate's strictest ruling on a teacher, with the obligations of all and the waivers in its reason; None where
    the gate was not asked, or where nothing of that teacher's is learnt from.
    """
    found = rulings.strictest_of(teacher) if rulings else None
    return found.ruling if found else None


def register_says(terms_id: str, use: Use, days: Iterable[dt.date | None], route: str) -> Ruling:
    """The strictest ruling over the days on which outputs were generated, None for one that nobody said. An id that the
    register no longer has is ruled on as unknown.
    """
    known = terms_id if terms_id in (OWN_MODEL, UNKNOWN) or terms_id in register() else UNKNOWN
    return strictest(rule_route(known, use, day, route) for day in days)._replace(terms=terms_id)


def row_of(terms_id: str) -> Terms | None:
    """The register's row, or None for a model of one's own and for terms nobody knows."""
    return register().get(terms_id)
