"""What a journal holds, seen from outside: nothing is written, and who collects is not in the way."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from limbeck.collect.journal import KILLED, OUTCOMES, journal_path
from limbeck.collect.journal_sums import Outcomes
from limbeck.recipe import NO_ENDPOINT, Recipe
from limbeck.records import Digest
from limbeck.rundir import RunDir

_MAYBE_BILLED = ("http 408", "http 504")
"""Statuses of requests that came to nothing, and may have been worked on."""


class Glance(NamedTuple):
    """A journal at one moment."""

    answers: int
    """In the journal, whoever asked for them."""
    outcomes: dict[str, Outcomes]
    """Of requests sent for one account; those under way are among the killed, at the most that they can cost."""

    @property
    def cost(self) -> int:
        """Picodollars that the requests of this account cost, or may have cost at most."""
        return sum(one.cost for one in self.outcomes.values())


def collected(run: RunDir, recipe: Recipe) -> str:
    """What was collected by the recipe that lies in RUN, or may have been billed or be under way, in words; empty where
    nothing was. Requests that came nowhere or were refused count for nothing.
    """
    path = journal_path(recipe, run)
    if not path.exists():
        return ""
    if (seen := glance(path, recipe.account)) is None:
        return f"what was collected, {path} does not tell"
    came = {
        outcome: one.requests
        for outcome, one in seen.outcomes.items()
        if outcome not in ("connect", "not sent") and (not outcome.startswith("http ") or outcome in _MAYBE_BILLED)
    }
    told = [f"requests {outcome}: {count:,}" for outcome, count in sorted(came.items())]
    here = any(teacher.kind in NO_ENDPOINT for teacher in recipe.teachers)
    if here and seen.answers and path == run / "journal.db":  # such answers are no requests that were sent
        told.append(f"answers: {seen.answers:,}")
    return f"what it collected is in {path} ({', '.join(told)})" if told else ""


def glance(path: str | os.PathLike[str], account: Digest) -> Glance | None:
    """Look into a journal. None where there is none, or one that cannot be read as it lies."""
    journal = Path(path)
    if not journal.is_file():
        return None
    # Without a log beside it the file rests; told so, SQLite makes none.
    log = journal.with_name(journal.name + "-wal")
    mode = "ro" if log.exists() else "ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"{journal.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)) as db:
            (answers,) = db.execute("SELECT count(*) FROM answers").fetchone()
            rows = db.execute(OUTCOMES, (KILLED, account)).fetchall()
    except sqlite3.DatabaseError:
        return None
    return Glance(answers, {outcome: Outcomes(requests, cost) for outcome, requests, cost in rows})
