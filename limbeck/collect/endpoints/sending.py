"""Sends requests until all are answered, or something says to stop; every answer is journaled before it is used.

The way of a request: its worst case is set aside (`Purse`), that it is about to leave is journaled, it waits until it
may leave (`Gate`), it is sent, and what came back is journaled as it came. What has to be sent again gives its place
and its money back while it waits. After a reason to stop nothing more leaves, but what is under way is awaited: it is
paid for.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from limbeck.collect.endpoints.budget import CapReachedError, Purse
from limbeck.collect.endpoints.fates import Fate, fate, message, outcome
from limbeck.collect.endpoints.gate import Gate
from limbeck.collect.endpoints.keys import scrub
from limbeck.collect.endpoints.pacing import Pacer
from limbeck.collect.endpoints.prices import Prices
from limbeck.collect.endpoints.reasons import Reasons
from limbeck.collect.endpoints.status import Status
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.endpoints.transport import NoReplyError, Reply, Transport
from limbeck.collect.endpoints.waits import low_quotas, retry_after
from limbeck.collect.journal import Ended, Kept, Sent
from limbeck.collect.teachers import Answer, Parsed, Request
from limbeck.collect.writer import Writer
from limbeck.records import Digest

_BACKOFF, _BACKOFF_MOST = 0.5, 60.0
"""Seconds before the second attempt, doubled with each, and their most; how long exactly is drawn from half to all of
it, so that those who failed together do not come back together."""
_PATIENCE = 10
"""How many refusals for being too many count as one attempt: they cost nothing, and end when the endpoint has room."""
_TOO_LONG = 3600.0
"""Seconds beyond which a `Retry-After` is a quota that is used up."""
_LAG = 2048
"""Outcomes that may be on their way to the disk; memory grows no further."""
_UNREACHED = 60.0
"""Seconds after which an endpoint that no request ever reached is given up, if one is not out of attempts before."""
_ALL_REFUSED = 8
"""Prompts refused before any was answered, from which on it is the settings that are wrong."""


Told = Callable[[Request, Parsed, Kept | None], None]
"""Who wants to know of each answer once it is on the disk; without `Kept`, another answer to the same request was there
before it, and counts."""


class Job(NamedTuple):
    """A request that is to be answered."""

    request: Request
    wire: bytes
    worst: int
    """Picodollars, at most; 0 without prices."""
    tokens: int
    """What it counts for against a limit of tokens a minute."""
    attempts: float = 0
    """Already made."""


class Sender:
    """Sends the requests of one teacher. `run` once."""

    def __init__(
        self,
        teacher: Endpoint,
        stretches: Iterator[Sequence[Request]],
        writer: Writer,
        transport: Transport,
        purse: Purse,
        *,
        pacer: Pacer,
        prices: Prices | None,
        key: str | None,
        account: Digest,
        number: int,
        status: Status,
        known_good: bool,
        told: Told | None = None,
    ):
        self._teacher, self._writer, self._transport, self._purse = teacher, writer, transport, purse
        self._prices, self._key, self._account = prices, key, account
        self._told = told
        self._gate, self._pacer, self.status = Gate(pacer), pacer, status
        self._jobs = self._made(stretches)
        self._more = True
        self._again: list[tuple[float, int, Job]] = []
        self._busy = self._lag = 0
        self._changed, self._room = asyncio.Event(), asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._flying: set[asyncio.Task[None]] = set()
        self._good = known_good
        self._reached = self._hopeless = False
        """Whether a request has come to the endpoint; if not, whether to give it up when nothing is under way."""
        self._first_failed: float | None = None
        """When the first request left that found nobody."""
        self._aside: list[tuple[Job, bytes, int]] = []
        """Refused prompts, as long as it is not known whether anything is answered at all."""
        self.reasons = Reasons(teacher.identity.name, writer.path)
        self.number = number

    async def run(self, workers: int) -> Exception | None:
        """Send all; gives why it stopped early, or None. Interrupted, it awaits what is under way first."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(workers)]
        try:
            await asyncio.wait(self._workers)
        except asyncio.CancelledError:
            self.stop(self.reasons.interrupted())
            await asyncio.wait(self._workers)
            raise
        for worker in self._workers:
            if not worker.cancelled() and (error := worker.exception()) is not None:
                raise error
        if self._aside and not self._good and self.reasons.stop is None:
            self.stop(self.reasons.all_refused(len(self._aside), self._aside[-1][1]))
        return self.reasons.result()

    def stop(self, why: Exception) -> None:
        """Let nothing more leave. The first reason counts."""
        self.reasons.note(why)
        for worker in self._workers:
            if worker not in self._flying and worker is not asyncio.current_task():
                worker.cancel()

    # Taking requests

    def _made(self, stretches: Iterator[Sequence[Request]]) -> Iterator[Job]:
        for stretch in stretches:
            for request in stretch:
                wire = self._teacher.wire(request)
                bound = self._teacher.bound(wire)
                worst = self._prices.cost(*bound) if self._prices else 0
                yield Job(request, wire, worst, len(wire) // 4 + bound.completion)

    async def _work(self) -> None:
        try:
            while (job := await self._next()) is not None:
                try:
                    await self._one(job)
                finally:
                    self._busy -= 1
                    self._wake()
        except CapReachedError:
            self.stop(self.reasons.cap_reached(self._purse.budget))

    async def _next(self) -> Job | None:
        """The next request: one that is due again, or a new one; None when there are no more."""
        loop = asyncio.get_running_loop()
        while self.reasons.stop is None:
            now = loop.time()
            if self._again and self._again[0][0] <= now:
                self._busy += 1
                return heapq.heappop(self._again)[2]
            if self._more:
                job = next(self._jobs, None)
                if job is not None:
                    self._busy += 1
                    return job
                self._more = False
            if not self._busy and not self._again:
                self._wake()
                return None
            await self._change(self._again[0][0] - now if self._again else None)
        return None

    async def _change(self, seconds: float | None) -> None:
        """Wait until something has changed, at most so long."""
        changed = self._changed
        try:
            await asyncio.wait_for(changed.wait(), seconds)
        except TimeoutError:
            return

    def _wake(self) -> None:
        """Tell those who have nothing to do. While there is something, nobody waits."""
        if not self._more:
            self._changed.set()
            self._changed = asyncio.Event()

    # Sending

    async def _one(self, job: Job) -> None:
        """Send a request once, and do with what comes back what is to be done."""
        held = await self._purse.hold(job.worst)
        number, self.number = self.number, self.number + 1
        try:
            # Before it has a place: the disk's time is not the endpoint's.
            await self._writer.begin(Sent(number, job.request.key, self._account, held))
            started = await self._gate.leave(job.tokens)
        except BaseException:
            self._not_sent(number, held)
            raise
        task = asyncio.current_task()
        assert task is not None
        self._flying.add(task)
        try:
            if self.reasons.stop is not None:
                self._not_sent(number, held)
                self._pacer.cancelled()
                return
            self.status.active = self._pacer.active
            try:
                reply = await self._transport.post(job.wire, job.request.key)
            except NoReplyError as error:
                self._no_reply(job, number, held, started, error)
            else:
                await self._reply(job, number, held, started, reply)
        finally:
            self._flying.discard(task)
            self._gate.turn()

    def _not_sent(self, number: int, held: int) -> None:
        """A request that was about to leave did not."""
        self._purse.settle(held, 0)
        self._writer.note(Ended(number, "not sent", 0), None, _looked_at)

    def _no_reply(self, job: Job, number: int, held: int, started: float, error: NoReplyError) -> None:
        cost = held if error.maybe_billed else 0
        self._pacer.failed(self._now, started)
        self._over(number, held, cost, error.kind)
        self._retry(job, error.kind, None)
        if error.kind != "connect":
            self._reached = True
        elif not self._reached:
            self._nobody_there(job, started, error)

    def _nobody_there(self, job: Job, started: float, error: NoReplyError) -> None:
        """No request came through yet. Where nobody listens, waiting long for it to get better helps no one."""
        self._first_failed = started if self._first_failed is None else min(started, self._first_failed)
        next_one = self._now + self._pacer.paused_for(self._now)
        out_of_attempts = job.attempts + 1 >= self._teacher.settings.attempts
        self._hopeless |= out_of_attempts or next_one - self._first_failed > _UNREACHED
        if self._hopeless and not self._pacer.active:  # another one may have come through
            self.stop(self.reasons.unreachable(self._teacher.address, error.why))

    async def _reply(self, job: Job, number: int, held: int, started: float, reply: Reply) -> None:
        self._reached = True
        body, found = scrub(reply.body, self._key), fate(reply.status, reply.body)
        kept = found is Fate.ANSWER or found is Fate.ABOUT_PROMPT
        wait = None if kept else retry_after(reply.headers)
        too_long = found is Fate.TOO_MANY and wait is not None and wait > _TOO_LONG
        said = outcome(reply.status, Fate.NO_QUOTA if too_long else found)
        if kept:
            await self._data(job, number, held, body, found, said)
            self._mind(reply, job)
        elif found is Fate.TOO_MANY:
            self._pacer.refused(self._now, started, wait)
            self._over(number, held, 0, said)
            if too_long:
                self.stop(self.reasons.no_quota(f"{message(body)} (Retry-After: {wait:,.0f} s)"))
            self._retry(job, said, wait, part=1 / _PATIENCE)
        elif found is Fate.FAILED:
            # A gateway that ran out of time says nothing of what runs behind it.
            self._pacer.failed(self._now, started, wait)
            self._over(number, held, held if reply.status in (408, 504) else 0, said)
            self._retry(job, said, wait)
        else:
            self._pacer.cancelled()
            self._over(number, held, 0, said)
            told = message(body)
            no_quota = found is Fate.NO_QUOTA
            self.stop(self.reasons.no_quota(told) if no_quota else self.reasons.refuses(reply.status, told))
        if self._pacer.given_up:
            self.stop(self.reasons.given_up(said))

    async def _data(self, job: Job, number: int, held: int, body: bytes, found: Fate, said: str) -> None:
        """Keep what came back, whatever it says; it costs what the provider counted, or at worst what was held."""
        if found is Fate.ABOUT_PROMPT:
            self._pacer.succeeded(job.tokens)
            self._over(number, held, 0, said)
            self._aside.append((job, body, number))
            if not self._good and len(self._aside) >= _ALL_REFUSED:
                self.stop(self.reasons.all_refused(len(self._aside), body))
            if self._good:
                await self._keep_refused()
            return
        parsed, usage = self._teacher.read(body)
        cost = (self._prices.cost(*usage) if usage else held) if self._prices else 0
        self._pacer.succeeded(max(0, job.tokens - sum(usage)) if usage else 0)
        self._purse.settle(held, cost)
        self.status.tokens += usage.completion if usage else 0
        self._good = True
        await self._keep(Ended(number, found.value, cost), Answer(job.request, body), parsed)
        if self._aside:
            await self._keep_refused()

    async def _keep_refused(self) -> None:
        for job, body, number in self._aside:
            parsed = self._teacher.read(body).parsed
            await self._keep(Ended(number, "refused", 0), Answer(job.request, body), parsed)
        self._aside.clear()

    async def _keep(self, ended: Ended, answer: Answer, parsed: Parsed) -> None:
        """Journal an answer. Nobody waits for the disk unless too much is on its way there."""
        self._lag += 1
        self._writer.note(ended, answer, partial(self._kept, answer.request, parsed))
        if self._lag > _LAG:
            self._room.clear()
            await self._room.wait()

    def _kept(self, request: Request, parsed: Parsed, error: Exception | None, kept: Kept | None) -> None:
        self._lag -= 1
        if self._lag <= _LAG:
            self._room.set()
        if error is not None:
            self.stop(self.reasons.journal(error))
        else:
            self.status.answered(self._purse.budget.spent)
            if self._told is not None:
                self._told(request, parsed, kept)

    def _over(self, number: int, held: int, cost: int, outcome: str) -> None:
        """A request came to nothing; what it may have cost is spent."""
        self._purse.settle(held, cost)
        self.status.failed(outcome)
        self._writer.note(Ended(number, outcome, cost), None, _looked_at)

    def _mind(self, reply: Reply, job: Job) -> None:
        """Go no faster than a quota fills that is nearly used up."""
        for quota in low_quotas(reply.headers):
            self._pacer.told(self._now, quota.rate if quota.counts == "requests" else quota.rate / job.tokens)

    def _retry(self, job: Job, said: str, wait: float | None, part: float = 1.0) -> None:
        attempts = job.attempts + part
        if attempts > self._teacher.settings.attempts - part:
            self.reasons.unanswered(said)
            return
        pause = min(_BACKOFF * 2**job.attempts, _BACKOFF_MOST)
        due = self._now + (wait or 0.0) + pause * random.uniform(0.5, 1.0)
        heapq.heappush(self._again, (due, self.number, job._replace(attempts=attempts)))
        self.number += 1

    @property
    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _looked_at(_: Exception | None, __: Kept | None) -> None:
    """A journal that fails says so to whoever sends next."""
