"""What the stage `collect` does with teachers behind endpoints.

Imported only where a recipe has one: it needs the extra `collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from limbeck.collect.endpoints.account import Account
from limbeck.collect.endpoints.asking import Asked, Purpose, ask
from limbeck.collect.endpoints.batch_asking import Stretches, ask_in_batches, silently
from limbeck.collect.endpoints.budget import Budget
from limbeck.collect.endpoints.prices import batch_prices_of, picodollars, prices_of
from limbeck.collect.endpoints.sending import Told
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import Journal
from limbeck.errors import EndpointError, Problem, RefusedError
from limbeck.progress import Line
from limbeck.recipe import Batch, RayWorkers, Recipe
from limbeck.records import Digest


def ask_endpoint(
    teacher: Endpoint,
    all_stretches: Stretches,
    recipe: Recipe,
    journal: Journal,
    line: Line,
    *,
    account: Digest,
    offline: bool,
    workers: RayWorkers | None = None,
    told: Told | None = None,
) -> Asked:
    """Have an endpoint answer what the journal lacks; offline, only say how much that is. `told` hears of each answer
    that came neither in a batch nor to a worker.

    `all_stretches` gives what is lacking then, anew with each call. Batches of earlier runs are taken up first, so that
    nothing is asked for a second time while a provider works on it. With `workers` they ask first, and what their
    shares of the money did not suffice for is asked here.
    """
    if offline:
        lacking = sum(len(stretch) for stretch in all_stretches(line))
        return Asked(0, 0, _offline(teacher, journal, lacking) if lacking else None)
    cap = recipe.collect.budget.money
    settings = recipe.collect.batched

    def purpose() -> Purpose:
        spent = sum(one.cost for one in journal.outcomes(account).values())
        budget = Budget(None if cap is None else picodollars(cap), spent)
        good = len(journal) > 0
        return Purpose(journal.path, account, journal.next_number, budget, recipe.collect.concurrency, good)

    if settings is not None:
        return ask_in_batches(teacher, all_stretches, settings, purpose(), line)
    before = ask_in_batches(teacher, None, Batch(), purpose(), line)
    if before.stopped is not None:
        return before
    if workers is not None:
        from limbeck.collect.endpoints.ray_workers import ask_with_ray

        shared = ask_with_ray(teacher, all_stretches(line), workers, recipe, purpose(), journal, line)
        before = shared._replace(answers=shared.answers + before.answers, tokens=shared.tokens + before.tokens)
        if not isinstance(before.stopped, RefusedError):
            return before
    stretches = all_stretches(line) if workers is None else silently(all_stretches)  # shown already
    first = next(stretches, None)
    if first is None:  # neither a key nor a connection is needed
        return before._replace(stopped=None)
    asked = ask(teacher, chain([first], stretches), purpose(), line, told)
    return asked._replace(answers=asked.answers + before.answers, tokens=asked.tokens + before.tokens)


def open_account(teachers: Sequence[Endpoint], recipe: Recipe) -> Account:
    """An account of what these teachers charge, for requests and for rows of batches."""
    share = (recipe.collect.batched or Batch()).price_share
    return Account(
        {teacher.identity.name: prices_of(teacher.settings) for teacher in teachers},
        {teacher.identity.name: batch_prices_of(teacher.settings, share) for teacher in teachers},
        keeps_cut_off=recipe.curate.cut_off == "keep",
    )


def _offline(teacher: Endpoint, journal: Journal, lacking: int) -> EndpointError:
    found = f"{lacking} requests to {teacher.identity.name} without an answer"
    problem = Problem(str(journal.path), found, "every answer, as nothing is sent", "run it without --offline")
    return EndpointError("the journal does not hold every answer", [problem])
