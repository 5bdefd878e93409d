"""What the stage `collect` does with teachers behind endpoints.

Imported only where a recipe has one: it needs the extra `collect`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from limbeck.collect.endpoints.account import Account
from limbeck.collect.endpoints.asking import Asked, Purpose, ask
from limbeck.collect.endpoints.budget import Budget
from limbeck.collect.endpoints.prices import picodollars, prices_of
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Request
from limbeck.errors import EndpointError, Problem
from limbeck.progress import Line
from limbeck.recipe import Recipe
from limbeck.records import Digest


def ask_endpoint(
    teacher: Endpoint,
    stretches: Iterator[Sequence[Request]],
    recipe: Recipe,
    journal: Journal,
    line: Line,
    *,
    account: Digest,
    offline: bool,
) -> Asked:
    """Have an endpoint answer what the journal lacks; offline, only say how much that is."""
    if offline:
        lacking = sum(len(stretch) for stretch in stretches)
        return Asked(0, 0, _offline(teacher, journal, lacking) if lacking else None)
    first = next(stretches, None)
    if first is None:  # neither a key nor a connection is needed
        return Asked(0, 0, None)
    cap = recipe.collect.budget.money
    spent = sum(one.cost for one in journal.outcomes(account).values())
    purpose = Purpose(
        journal=journal.path,
        account=account,
        number=journal.next_number,
        budget=Budget(None if cap is None else picodollars(cap), spent),
        concurrency=recipe.collect.concurrency,
        known_good=len(journal) > 0,
    )
    return ask(teacher, chain([first], stretches), purpose, line)


def open_account(teachers: Sequence[Endpoint]) -> Account:
    """An account of what these teachers charge."""
    return Account({teacher.identity.name: prices_of(teacher.settings) for teacher in teachers})


def _offline(teacher: Endpoint, journal: Journal, lacking: int) -> EndpointError:
    found = f"{lacking} requests to {teacher.identity.name} without an answer"
    problem = Problem(str(journal.path), found, "every answer, as nothing is sent", "run it without --offline")
    return EndpointError("the journal does not hold every answer", [problem])
