"""What the register of terms says of each teacher's outputs: the one place where exports ask it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from limbeck.recipe import Use
from limbeck.terms.gate import Ruling, rule, strictest
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Terms, register


def ruling_of(terms_id: str, use: Use, days: Iterable[dt.date]) -> Ruling:
    """The strictest ruling over the days on which outputs were generated. An id that the register no longer has is
    ruled on as unknown.
    """
    known = terms_id if terms_id in (OWN_MODEL, UNKNOWN) or terms_id in register() else UNKNOWN
    return strictest(rule(known, use, day) for day in days)._replace(terms=terms_id)


def row_of(terms_id: str) -> Terms | None:
    """The register's row, or None for a model of one's own and for terms nobody knows."""
    return register().get(terms_id)
