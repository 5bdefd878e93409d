"""Has one endpoint's provider answer requests in batches: opens what is needed for it, and says what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from limbeck import recipe
from limbeck.collect.endpoints.asking import Asked, Purpose, run_loop
from limbeck.collect.endpoints.batch_apis import make_api
from limbeck.collect.endpoints.batch_calls import Calls
from limbeck.collect.endpoints.batch_http import BatchHttp
from limbeck.collect.endpoints.batch_log import BatchLog
from limbeck.collect.endpoints.batch_results import Results
from limbeck.collect.endpoints.batch_status import BatchStatus
from limbeck.collect.endpoints.batching import Batching, asked_of
from limbeck.collect.endpoints.keys import read_key
from limbeck.collect.endpoints.prices import batch_prices_of
from limbeck.collect.endpoints.reasons import Fatal, Reasons
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.teachers import Request
from limbeck.progress import Line, Progress

Stretches = Callable[[Line], Iterator[Sequence[Request]]]
"""All that the journal lacks, stretch by stretch; each call begins anew, and shows on a line what was there already."""


def ask_in_batches(
    teacher: Endpoint, stretches: Stretches | None, settings: recipe.Batch, purpose: Purpose, line: Line
) -> Asked:
    """Send requests in batches until all are answered or something says to stop. Without stretches, only await the
    batches that earlier runs left at the provider. Ctrl-C leaves them there.

    Raises what the journal raises, and `InputError` where the key cannot be read.
    """
    with BatchLog(purpose.journal) as log:
        if not log.open_batches(asked_of(teacher)):
            if stretches is None:
                return Asked(0, 0, None)
            with Progress.silent().line("", None, "") as silent:
                if next(stretches(silent), None) is None:  # neither a key nor a connection is needed
                    for _ in stretches(line):
                        pass
                    return Asked(0, 0, None)
    return run_loop(_ask(teacher, stretches, settings, purpose, line, read_key(teacher.settings)))


async def _ask(
    teacher: Endpoint,
    stretches: Stretches | None,
    settings: recipe.Batch,
    purpose: Purpose,
    line: Line,
    key: str | None,
) -> Asked:
    prices, api = batch_prices_of(teacher.settings, settings.price_share), make_api(teacher)
    status = BatchStatus(line, purpose.budget.cap, prices is not None)
    reasons = Reasons(teacher.identity.name, purpose.journal)
    http = BatchHttp(teacher.dialect.headers(key), teacher.settings.timeout)
    with BatchLog(purpose.journal) as log, tempfile.TemporaryDirectory(prefix="limbeck-batch-") as place:
        budget, held = purpose.budget, log.held_in_batches(purpose.account)
        budget.spent, budget.held = budget.spent - held, budget.held + held
        async with http:
            results = Results(
                teacher, log, api, http, budget=budget, prices=prices, account=purpose.account, key=key,
                reasons=reasons, status=status, known_good=purpose.known_good,
            )  # fmt: skip
            calls = Calls(http, api, log, reasons, key, settings.poll, teacher.settings.attempts)
            batching = Batching(
                teacher, log, api, calls, results, settings=settings, budget=budget, prices=prices,
                account=purpose.account, reasons=reasons, status=status, place=Path(place),
            )  # fmt: skip
            stopped = await batching.run(_rounds(stretches, line) if stretches is not None else None)
    return Asked(status.answers, status.tokens, stopped, isinstance(stopped, Fatal))


def _rounds(stretches: Stretches, line: Line) -> Callable[[], Iterator[Sequence[Request]]]:
    """The stretches of one round after the other; what is there already is shown by the first one alone."""
    shown = [line]

    def next_round() -> Iterator[Sequence[Request]]:
        if shown:
            return stretches(shown.pop())
        return silently(stretches)

    return next_round


def silently(stretches: Stretches) -> Iterator[Sequence[Request]]:
    """What is lacking now, without a word about what was there already."""
    with Progress.silent().line("", None, "") as line:
        yield from stretches(line)
