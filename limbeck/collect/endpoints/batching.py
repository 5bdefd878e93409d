"""Has a provider's batch API answer requests: plans batches, has them created, waits for them, keeps what they bring.

The way of a batch: its rows are chosen, as many as the provider, the recipe and the cap allow, and the worst case of
each is set aside; that is journaled (`BatchLog`); it is created (`Calls`); it is looked at, ever less often, until it
has ended; each line of its results is journaled as it came. A run that ends, however it ends, leaves its batches at the
provider, and the next one takes them up from the journal.

What a provider did not work on (expired rows, rows that failed there) was not billed, and is asked again when all
batches of a round have ended. What was answered or refused is data.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from limbeck import recipe
from limbeck.collect.endpoints.batch_apis import BatchApi, Job
from limbeck.collect.endpoints.batch_calls import Calls, UnknownBatchError
from limbeck.collect.endpoints.batch_log import BatchLog, Logged, Planned, custom_id
from limbeck.collect.endpoints.batch_results import Results
from limbeck.collect.endpoints.batch_status import BatchStatus
from limbeck.collect.endpoints.budget import Budget, CapReachedError
from limbeck.collect.endpoints.prices import Prices
from limbeck.collect.endpoints.reasons import Reasons
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.teachers import Request
from limbeck.errors import EndpointError, Problem
from limbeck.records import Digest

_FIRST_LOOK, _LATER = 2.0, 1.5
"""Seconds to the first look at a batch, and the factor by which they grow."""
_KEPT = timedelta(days=30)
"""Both providers keep a batch's results for about so long."""

Stretches = Callable[[], Iterator[Sequence[Request]]]
"""All that the journal lacks, stretch by stretch; each call begins anew."""


class _Wanted(NamedTuple):
    """A request that is to go into a batch."""

    request: Request
    wire: bytes
    worst: int


class Batching:
    """The batches of one teacher. `run` once."""

    def __init__(
        self,
        teacher: Endpoint,
        log: BatchLog,
        api: BatchApi,
        calls: Calls,
        results: Results,
        *,
        settings: recipe.Batch,
        budget: Budget,
        prices: Prices | None,
        account: Digest,
        reasons: Reasons,
        status: BatchStatus,
        place: Path,
    ):
        self._teacher, self._log, self._api, self._calls, self._results = teacher, log, api, calls, results
        self._settings, self._budget, self._prices = settings, budget, prices
        self._account, self._reasons, self._status, self._place = account, reasons, status, place
        self._most_rows = min(api.most_rows, settings.rows or api.most_rows)
        self._most_bytes = min(api.most_bytes, int((settings.megabytes or 1e9) * 1e6))
        self._requests: Iterator[_Wanted] = iter(())
        self._ahead: _Wanted | None = None
        self._skipped = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def run(self, stretches: Stretches | None) -> Exception | None:
        """Take up the batches of earlier runs, and ask all requests; gives why it stopped early, or None. Without
        stretches, only what is under way already is awaited.
        """
        try:
            for batch in self._log.open_batches(asked_of(self._teacher)):
                self._carry(batch, resumed=True)
            for attempt in range(self._teacher.settings.attempts):
                before = self._results.answers
                if stretches is not None:
                    await self._submit_all(stretches())
                await asyncio.gather(*self._tasks)
                self._tasks.clear()
                self._status.advance(self._skipped)
                self._skipped = 0
                if stretches is None or self._reasons.stop is not None or not self._results.again:
                    break
                if attempt == self._teacher.settings.attempts - 1:
                    for outcome, count in self._results.again.items():
                        self._reasons.unanswered(outcome, count)
                elif self._results.answers == before:  # nothing went through: not at once again
                    await asyncio.sleep(min(self._settings.poll, _FIRST_LOOK * 2**attempt))
                self._results.again.clear()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return self._results.all_refused() or self._reasons.result()

    # Planning and creating

    def _made(self, stretches: Iterator[Sequence[Request]]) -> Iterator[_Wanted]:
        """What is to be asked and is not in a batch already."""
        for stretch in stretches:
            under_way = self._log.under_way([request.key for request in stretch])
            self._skipped += len(under_way)
            for request in stretch:
                if request.key not in under_way:
                    wire = self._teacher.wire(request)
                    worst = self._prices.cost(*self._teacher.bound(wire)) if self._prices else 0
                    yield _Wanted(request, wire, worst)

    def _peek(self) -> _Wanted | None:
        if self._ahead is None:
            self._ahead = next(self._requests, None)
        return self._ahead

    async def _submit_all(self, stretches: Iterator[Sequence[Request]]) -> None:
        self._requests, self._ahead = self._made(stretches), None
        try:
            while self._reasons.stop is None and (first := self._peek()) is not None and await self._room(first.worst):
                await self._submit()
        except CapReachedError:
            self._reasons.note(self._reasons.cap_reached(self._budget))
        except EndpointError as error:
            self._reasons.note(error)

    async def _room(self, worst: int) -> bool:
        """Returns when so much can be set aside; False where something else stops. Raises `CapReachedError` where it
        never can.
        """
        while (held := self._budget.hold(worst)) is None:
            if self._reasons.stop is not None:
                return False
            if not self._budget.held or all(task.done() for task in self._tasks):  # nobody will give any back
                raise CapReachedError
            self._changed.clear()
            await self._changed.wait()
        self._budget.settle(held, 0)
        return True

    async def _submit(self) -> None:
        """Plan one batch and have it created."""
        token = f"limbeck-{secrets.token_hex(16)}"
        path = self._place / token
        try:
            batch, held = self._plan(token, path)
            self._status.looked(token, "to be sent", 0, batch.rows)
            try:
                job = await self._calls.create(batch.number, token, batch.rows, path)
            except EndpointError:
                if not self._log.was_asked(batch.number):  # else it may be there, and is looked for by the next run
                    self._drop(batch, held)
                raise
        finally:
            path.unlink(missing_ok=True)
        if job is None:
            self._drop(batch, held)
            raise self._reasons.given_up("a batch that was asked for several times is not there")
        self._carry(batch._replace(name=job.name), resumed=False)

    def _plan(self, token: str, path: Path) -> tuple[Logged, int]:
        """Write a batch's content to a file, and journal that it is intended; what is held for it."""
        api, total = self._api, 0
        with path.open("wb") as content, self._log.intending(token, asked_of(self._teacher), self._account) as intent:
            size = content.write(api.head) + len(api.tail)
            while intent.rows < self._most_rows and (job := self._peek()) is not None:
                line = (api.between if intent.rows else b"") + api.row(custom_id(token, intent.next), job.wire)
                if intent.rows and size + len(line) > self._most_bytes:
                    break
                if (held := self._budget.hold(job.worst)) is None:
                    break
                intent.add(Planned(job.request, held))
                size += content.write(line)
                total += held
                self._ahead = None
            content.write(api.tail)
        return Logged(intent.batch, token, intent.rows, datetime.now(UTC), None, None), total

    def _drop(self, batch: Logged, held: int) -> None:
        self._log.unsent(batch.number)
        self._budget.settle(held, 0)
        self._status.over(batch.token)

    # Waiting for what was created

    def _carry(self, batch: Logged, *, resumed: bool) -> None:
        task = asyncio.create_task(self._carried(batch, resumed=resumed))
        self._tasks.add(task)

    async def _carried(self, batch: Logged, *, resumed: bool) -> None:
        try:
            name = batch.name or await self._found(batch)
            if name is None:
                rows = self._log.open_rows(batch.number)
                self._drop(batch, sum(row.held for row in rows.values() if row.account == self._account))
                self._results.again["not sent"] += len(rows)
                return
            try:
                job = await self._ended(batch, name)
            except UnknownBatchError as error:
                if datetime.now(UTC) - batch.intended < _KEPT:
                    raise self._unknown(name) from error
                self._results.lost(batch)
                return
            await self._results.take(batch, job, shown=not resumed, changed=self._changed)
            self._status.over(batch.token)
        except EndpointError as error:
            self._reasons.note(error)
        finally:
            self._changed.set()

    def _unknown(self, name: str) -> EndpointError:
        found = f"batch {name} is not known at {self._teacher.settings.host}"
        remedy = "use the key of the project or workspace it was made in, where the recipe's key is another's; "
        remedy += f"{_KEPT.days} days after it was made it counts as lost, and its rows are asked again"
        problem = Problem(f"teacher {self._teacher.identity.name}", found, "the batch that an earlier run made", remedy)
        return EndpointError("a batch cannot be found", [problem])

    async def _found(self, batch: Logged) -> str | None:
        """The provider's id of a batch of an earlier run, if there is one."""
        if batch.asked is None:
            return None
        job = await self._calls.find(batch.token, batch.rows, batch.asked)
        if job is not None:
            self._log.named(batch.number, job.name)
        return job.name if job is not None else None

    async def _ended(self, batch: Logged, name: str) -> Job:
        pause = min(_FIRST_LOOK, self._settings.poll)
        while not (job := await self._calls.job(name)).ended:
            self._status.spent = self._budget.spent
            self._status.looked(batch.token, job.state, job.done, batch.rows)
            await asyncio.sleep(pause)
            pause = min(pause * _LATER, self._settings.poll)
        return job


def asked_of(teacher: Endpoint) -> str:
    """What tells batches apart that this teacher may read: address and model."""
    return f"{teacher.address} {teacher.settings.model}"
