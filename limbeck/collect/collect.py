"""The stage `collect`: every prompt, teacher and sample to completions.parquet.

What the journal has is not asked again. Answers go into the journal first, group by group, and are then made into
completions (`limbeck.collect.completing`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue

from limbeck.collect.completing import Ahead, Asked, Completing, asked_by, behind_endpoint, completions_file
from limbeck.collect.journal import Journal, held, journal_path
from limbeck.collect.shards import merge_shards
from limbeck.collect.teachers import Request, Teacher, Writing, make_teacher
from limbeck.errors import PromptError
from limbeck.progress import Line, TokenCount
from limbeck.recipe import EndpointTeacher, Recipe
from limbeck.records import Digest, Prompt
from limbeck.rundir import RunDir, atomic
from limbeck.tables import count_records, read_records
from limbeck.terms.stage import refuse_before

if TYPE_CHECKING:
    from limbeck.collect.endpoints.account import Account
    from limbeck.collect.endpoints.teacher import Endpoint

_STRETCH = 4096
"""Requests looked up, and for a teacher that answers in batches sorted, together."""

_STRETCH_SENT = 256
"""The same where requests are sent one by one: while they are made ready nothing else happens."""

_COLLECTED = 200_000
"""Objects more than before, from which on the garbage collector looks."""

_LISTED = 20
"""Prompts that cannot be asked, of one stretch, that an error lists."""


class _Spent(NamedTuple):
    """What this call itself had written."""

    answers: int
    tokens: int
    stopped: Exception | None = None
    """Why not everything was answered."""
    fatal: bool = False


def collect(recipe: Recipe, run: RunDir, *, account: Digest | None = None) -> dict[str, JsonValue]:
    """Ask what the journal lacks, and write completions.parquet in the order of prompts, teachers,
    samples.

    Raises `PromptError` for prompts that a teacher cannot be asked: those of one stretch together, before any of
    that stretch is asked; `RefusedError` where the terms of what is still to be asked refuse the recipe's use, as of
    today, before any of it is, or where the money cap leaves prompts without an answer, and `EndpointError`
    where an endpoint does. What was answered is journaled then. Money is counted for `account`, or for the recipe's
    own.
    """
    started = time.monotonic()
    teachers = [make_teacher(settings, recipe.collect, recipe.seed) for settings in recipe.teachers]
    total = count_records(run / "prompts.parquet") * len(teachers) * recipe.collect.samples
    path, account = journal_path(recipe, run), account or recipe.account
    with held(path), Journal(path) as journal, _rarely_collected():
        journal.close_open()
        merge_shards(journal)
        with atomic(run / "completions.parquet") as half, completions_file(half) as file:
            completing = Completing(file, recipe, _account(teachers, recipe))
            ahead = Ahead(completing, journal)
            run.progress.begin(_beginning(recipe, total))
            with run.progress.line("collect", total, "answers") as line:
                spent = _ask_all(teachers, recipe, run, journal, line, account, ahead)
            ahead.make()
            completing.add_all(asked_by(teachers, recipe, run, ahead.passed), journal)
        _keep_here(teachers, recipe, run, journal)
        refused, outcomes = journal.refused, journal.outcomes(account)
        if (costs := completing.totals.account) is not None and costs.unsaid:
            costs.told(journal.costs(costs.unsaid))
    generated, count, totals = sum(part.answers for part in spent), file.rows, completing.totals
    return {
        "answers": count,
        "unanswered": total - count,
        "generated": generated,
        "from_journal": count - generated,
        "second_answers_set_aside": refused,
        **totals.facts(),
        **(totals.account.facts(outcomes, recipe.collect.budget.money) if totals.account else {}),
        "tokens_generated": sum(part.tokens for part in spent),
        "seconds": round(time.monotonic() - started, 3),
    }


def _beginning(recipe: Recipe, total: int) -> str:
    """What is asked of whom, in a line."""
    asked = ", ".join(
        f"{t.name} at {t.base_url}" if isinstance(t, EndpointTeacher) else t.name for t in recipe.teachers
    )
    from limbeck.collect.endpoints.prices import cap_words

    cap = recipe.collect.budget.money
    return f"collect: {total:,} answers of {asked}{'' if cap is None else f', for at most the cap of {cap_words(cap)}'}"


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """Look for cyclic garbage once in so many allocations: requests under way are many objects and leave none, and
    looking at all of them again and again takes a sixth of the processor's time.
    """
    before = gc.get_threshold()
    if before[0]:  # 0: never
        gc.set_threshold(max(before[0], _COLLECTED), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _ask_all(
    teachers: Sequence[Writing | Endpoint],
    recipe: Recipe,
    run: RunDir,
    journal: Journal,
    line: Line,
    account: Digest,
    ahead: Ahead,
) -> list[_Spent]:
    """Ask every teacher. Raises why not everything was answered, where the recipe does not go on without."""
    spent: list[_Spent] = []
    for teacher in teachers:
        if behind_endpoint(teacher):
            alone = len(teachers) == 1 and recipe.collect.batched is None and recipe.collect.ray is None
            part = _ask_endpoint(teacher, recipe, run, journal, line, account, ahead if alone else None)
        else:
            part = _ask(teacher, recipe, run, journal, line)
        if part.stopped is not None and (part.fatal or recipe.collect.unanswered == "stop"):
            raise part.stopped
        spent.append(part)
    if len(journal) == 0 and (stopped := next((part.stopped for part in spent if part.stopped), None)):
        raise stopped
    return spent


def _keep_here(teachers: Sequence[Writing | Endpoint], recipe: Recipe, run: RunDir, journal: Journal) -> None:
    """Copy what this run used out of a shared journal: RUN holds its own evidence."""
    if journal.path == run / "journal.db":
        return
    with Journal(run / "journal.db") as own:
        journal.copy_to(own, (asked.request.key for asked in asked_by(teachers, recipe, run)))


def _prompts(run: RunDir) -> Iterator[Prompt]:
    return read_records(run / "prompts.parquet", Prompt)


def _ask_endpoint(
    teacher: Endpoint,
    recipe: Recipe,
    run: RunDir,
    journal: Journal,
    line: Line,
    account: Digest,
    ahead: Ahead | None,
) -> _Spent:
    from limbeck.collect.endpoints.stage import ask_endpoint

    def stretches(shown: Line) -> Iterator[list[Request]]:
        return _open_stretches(teacher, recipe, run, journal, shown, _STRETCH_SENT, ahead)

    asked = ask_endpoint(
        teacher, stretches, recipe, journal, line, account=account, offline=run.offline, workers=recipe.collect.ray,
        told=None if ahead is None else ahead.told,
    )  # fmt: skip
    return _Spent(*asked)


def _account(teachers: Sequence[Writing | Endpoint], recipe: Recipe) -> Account | None:
    """What the endpoints charge; None where there are none."""
    if not (endpoints := [teacher for teacher in teachers if behind_endpoint(teacher)]):
        return None
    from limbeck.collect.endpoints.stage import open_account

    return open_account(endpoints, recipe)


def _ask(teacher: Writing, recipe: Recipe, run: RunDir, journal: Journal, line: Line) -> _Spent:
    """Have one teacher answer what the journal lacks; each group is on disk before it is looked at."""
    answers = tokens = 0
    for group in teacher.answer(_open_stretches(teacher, recipe, run, journal, line), TokenCount(line)):
        journal.put_group(group)
        answers += len(group)
        tokens += sum(teacher.parse(request, raw).completion_tokens for request, raw in group)
        line.advance(len(group))
    return _Spent(answers, tokens)


def _open_stretches(
    teacher: Writing | Endpoint,
    recipe: Recipe,
    run: RunDir,
    journal: Journal,
    line: Line,
    size: int = _STRETCH,
    ahead: Ahead | None = None,
) -> Iterator[list[Request]]:
    """What the journal lacks of each stretch; `ahead` hears of all. Stretches are cut from all requests, so they stay
    the same as the journal fills.
    """
    asked = False
    pairs = ((prompt, sample) for prompt in _prompts(run) for sample in range(recipe.collect.samples))
    while stretch := list(islice(pairs, size)):
        requests = _requests(teacher, stretch)
        lacking = set(journal.missing(request.key for request in requests))
        if ahead is not None:
            whole = zip(requests, stretch, strict=True)
            ahead.expect([Asked(request, *pair, teacher) for request, pair in whole], lacking)
        line.advance(len(requests) - len(lacking))
        if lacking and not asked:
            refuse_before(recipe)
            asked = True
        if lacking:
            yield [request for request in requests if request.key in lacking]


def _requests(teacher: Teacher, stretch: Sequence[tuple[Prompt, int]]) -> list[Request]:
    requests, refused = [], []
    for prompt, sample in stretch:
        try:
            requests.append(teacher.request(prompt, sample))
        except PromptError as error:
            refused.append(error)
    if refused:
        problems = [problem for error in refused[:_LISTED] for problem in error.problems]
        listed = f" ({len(refused)} times, the first {_LISTED} listed)" if len(refused) > _LISTED else ""
        raise PromptError(f"{refused[0].summary}{listed}", problems)
    return requests
