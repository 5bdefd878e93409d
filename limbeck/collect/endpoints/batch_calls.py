"""Questions to a batch API, asked again as often as it takes; and the one request that must never be sent twice.

Creating a batch is what costs money. Where its answer is lost, nobody knows whether the provider took it: then its list
of batches is read until the batch is found, or so much time has passed that it cannot appear any more.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from limbeck.collect.endpoints.batch_apis import BatchApi, Job, read_job, read_list, read_result
from limbeck.collect.endpoints.batch_http import BadStatusError, BatchHttp
from limbeck.collect.endpoints.batch_log import BatchLog, row_number
from limbeck.collect.endpoints.fates import Fate, fate, message
from limbeck.collect.endpoints.keys import scrub
from limbeck.collect.endpoints.reasons import Reasons
from limbeck.collect.endpoints.transport import NoReplyError, Reply
from limbeck.collect.endpoints.waits import retry_after

_BACKOFF, _BACKOFF_MOST = 0.5, 60.0
_PATIENCE = 12
"""How often a question is asked that nobody bills, with minutes in all between the first and the last."""
_CREATIONS = 6
"""How often a batch is asked for that turned out not to be there."""
_UNREACHED = 60.0
"""Seconds after which a provider that no question ever reached is given up, if one is not out of attempts before."""
_SETTLE = 60.0
"""Seconds after which a batch that was asked for, and is not listed, is taken not to exist."""
_BEFORE, _AFTER = timedelta(minutes=10), timedelta(minutes=30)
"""How far the provider's clock may be behind ours, and how long after it was asked for a batch may be created: an
upload can be long."""
_LOOK = 1.0
"""Seconds between two looks for a batch."""


class UnknownBatchError(Exception):
    """The provider knows no batch of this name, or this key may not see it."""


class Calls:
    """Asks one provider, each question at most `attempts` times as long as none has reached it."""

    def __init__(
        self,
        http: BatchHttp,
        api: BatchApi,
        log: BatchLog,
        reasons: Reasons,
        key: str | None,
        poll: float,
        attempts: int,
    ):
        self._http, self._api, self._log, self._reasons, self._key = http, api, log, reasons, key
        self._poll, self._attempts = poll, attempts
        self._first_failed: float | None = None
        """When it was known of the first that it found nobody."""

    async def patiently(self, send: Callable[[], Awaitable[Reply]], *, unknown: bool = False) -> Reply:
        """An answer with status 200. Raises `EndpointError` where there never is one; with `unknown`,
        `UnknownBatchError` for a 404.
        """
        said = ""
        for attempt in range(_PATIENCE):
            wait = None
            try:
                reply = await send()
            except NoReplyError as error:
                self._no_reply(error, attempt)
                said = error.kind
            else:
                found = fate(reply.status, reply.body)
                if found is Fate.ANSWER:
                    return reply
                if reply.status == 404 and unknown:
                    raise UnknownBatchError
                if found not in (Fate.TOO_MANY, Fate.FAILED):
                    raise self.refused(reply)
                wait, said = retry_after(reply.headers), f"http {reply.status}"
            await asyncio.sleep(pause_before(attempt, wait))
        raise self._reasons.given_up(said)

    def _no_reply(self, error: NoReplyError, attempt: int) -> None:
        """Raises `EndpointError` where nothing came through in this command, and waiting longer helps no one."""
        if self._http.reached:
            return
        now = time.monotonic()
        self._first_failed = now if self._first_failed is None else self._first_failed
        next_one = now + min(_BACKOFF * 2**attempt, _BACKOFF_MOST)
        if attempt + 1 >= self._attempts or next_one - self._first_failed > _UNREACHED:
            raise self._reasons.unreachable(self._api.page(None).partition("?")[0], error.why)

    def refused(self, reply: Reply) -> Exception:
        """Why nothing goes on after this reply."""
        told = message(scrub(reply.body, self._key))
        if fate(reply.status, reply.body) is Fate.NO_QUOTA:
            return self._reasons.no_quota(told)
        return self._reasons.refuses(reply.status, told)

    async def job(self, name: str) -> Job:
        """How a batch is. Raises `EndpointError`, `UnknownBatchError`."""
        address = self._api.address(name)
        for attempt in range(_PATIENCE):
            job = read_job(self._api, (await self.patiently(lambda: self._http.get(address), unknown=True)).body)
            if job is not None:
                return job
            await asyncio.sleep(pause_before(attempt, None))
        raise self._reasons.given_up(f"what {address} answers is no batch")

    async def create(self, number: int, token: str, rows: int, path: Path) -> Job | None:
        """Have the provider begin a batch whose content is in a file. None where it never did, and will not: it is
        then known that nothing runs. Raises `EndpointError` where the provider refuses; that costs nothing.
        """
        uploaded = await self._upload(token, path)
        for attempt in range(_CREATIONS):
            asked, wait = self._log.asking(number), None
            try:
                with path.open("rb") as content:
                    reply = await self._api.create(self._http, content, token, uploaded)
            except NoReplyError as error:
                if not error.maybe_billed:
                    self._log.not_asked(number)  # first: nothing has to be looked for where this gives up
                self._no_reply(error, attempt)
                job = await self.find(token, rows, asked) if error.maybe_billed else None
            else:
                found = fate(reply.status, reply.body)
                if found is Fate.ANSWER:
                    job = read_job(self._api, reply.body) or await self.find(token, rows, asked)
                elif found is Fate.FAILED:
                    job = await self.find(token, rows, asked)
                elif found is Fate.TOO_MANY:
                    job, wait = None, retry_after(reply.headers)
                else:
                    self._log.not_asked(number)
                    raise self.refused(reply)
            if job is not None:
                self._log.named(number, job.name)
                return job
            self._log.not_asked(number)
            await asyncio.sleep(pause_before(attempt, wait))
        return None

    async def _upload(self, token: str, path: Path) -> Reply | None:
        async def send() -> Reply:
            with path.open("rb") as content:
                return await self._api.upload(self._http, content, token) or Reply(200, {}, b"")

        reply = await self.patiently(send)
        return reply if reply.body else None

    async def find(self, token: str, rows: int, asked: datetime) -> Job | None:
        """A batch that was asked for then, if the provider has it; returns None when it cannot come any more.

        Where the provider keeps no name of ours, each batch of the right size and time may be the one: it is waited for
        until its results tell.
        """
        strangers: set[str] = set()
        pause = min(_LOOK, _SETTLE / 4)
        began = time.monotonic()  # should the clock have been set back since, that is long enough too
        while True:
            known, maybe = self._log.names(), False
            for job in await self._listed_since(asked - _BEFORE):
                if self._api.keeps_token:
                    if job.token == token:
                        return job
                elif job.name not in known | strangers and job.total == rows and job.created <= asked + _AFTER:
                    if not job.ended:
                        maybe = True
                    elif await self._is_ours(job, token):
                        return job
                    else:
                        strangers.add(job.name)
            waited = max((datetime.now(UTC) - asked).total_seconds(), time.monotonic() - began)
            if not maybe and waited >= _SETTLE:
                return None
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, self._poll) if maybe else min(_LOOK, _SETTLE / 4)

    async def _listed_since(self, since: datetime) -> list[Job]:
        found: list[Job] = []
        after, url = None, self._api.page(None)
        while True:
            page = read_list(self._api, (await self.patiently(lambda: self._http.get(url))).body)  # noqa: B023 - awaited
            if page is None:
                raise self._reasons.given_up(f"what {url} answers is no list of batches")
            jobs, after = page
            found += [job for job in jobs if job.created >= since]
            if after is None or any(job.created < since for job in jobs):
                return found
            url = self._api.page(after)

    async def _is_ours(self, job: Job, token: str) -> bool:
        """Whether a batch that has ended has our custom ids."""
        for attempt in range(_PATIENCE):
            try:
                for url in job.results:
                    async with aclosing(self._http.lines(url)) as lines:
                        async for line in lines:
                            if (result := read_result(self._api, line)) is not None:
                                return row_number(token, result.custom_id) is not None
            except (NoReplyError, BadStatusError):
                await asyncio.sleep(pause_before(attempt, None))
            else:
                return False
        raise self._reasons.given_up("results of a batch that may be ours cannot be read")


def pause_before(attempt: int, wait: float | None) -> float:
    """Seconds before the next attempt: what the provider says, and then some."""
    return (wait or 0.0) + min(_BACKOFF * 2**attempt, _BACKOFF_MOST) * random.uniform(0.5, 1.0)
