"""Takes the results of a batch into the journal, line by line, and counts what they cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing
from typing import NamedTuple

import orjson

from limbeck.collect.endpoints.batch_apis import BatchApi, Job, Result, read_result
from limbeck.collect.endpoints.batch_calls import pause_before
from limbeck.collect.endpoints.batch_http import BadStatusError, BatchHttp
from limbeck.collect.endpoints.batch_log import BatchLog, Logged, Row, row_number
from limbeck.collect.endpoints.batch_raw import wrapped
from limbeck.collect.endpoints.batch_status import BatchStatus
from limbeck.collect.endpoints.budget import Budget
from limbeck.collect.endpoints.fates import Fate, fate, message, outcome
from limbeck.collect.endpoints.keys import scrub
from limbeck.collect.endpoints.prices import Prices
from limbeck.collect.endpoints.reasons import Reasons
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.endpoints.transport import NoReplyError
from limbeck.collect.journal import Ended
from limbeck.collect.teachers import Answer
from limbeck.errors import EndpointError, Problem
from limbeck.records import Digest

_GROUP = 256
"""Results that are journaled in one commit."""
_READS = 6
"""How often results are read that do not tell of every row, before the rest counts as lost."""
_LISTED = 20
_NO_ROOM = "token_limit_exceeded"
"""OpenAI's code for a batch that is refused because too much is waiting already."""


class _Line(NamedTuple):
    """A row, and what the results say of it."""

    number: int
    row: Row
    result: Result
    raw: bytes


class Results:
    """Takes results of one teacher's batches."""

    def __init__(
        self,
        teacher: Endpoint,
        log: BatchLog,
        api: BatchApi,
        http: BatchHttp,
        *,
        budget: Budget,
        prices: Prices | None,
        account: Digest,
        key: str | None,
        reasons: Reasons,
        status: BatchStatus,
        known_good: bool,
    ):
        self._teacher, self._log, self._api, self._http = teacher, log, api, http
        self._budget, self._prices, self._account, self._key = budget, prices, account, key
        self._reasons, self._status, self._good = reasons, status, known_good
        self.answers = 0
        self.again: Counter[str] = Counter()
        """Rows that are to be asked again, by what they came to."""
        self._refused: tuple[int, bytes] | None = None

    async def take(self, batch: Logged, job: Job, *, shown: bool, changed: asyncio.Event) -> None:
        """Everything that a batch which has ended brought; then it is over, with an outcome for every row. `changed` is
        set whenever money has come free.
        """
        rows = self._log.open_rows(batch.number)
        if job.failed:
            self._failed(batch, job, rows)
            return
        aside: list[_Line] = []
        for attempt in range(_READS):
            try:
                for url in job.results:
                    await self._read(batch, job, url, rows, aside, shown=shown, changed=changed)
            except NoReplyError as error:
                if attempt == _READS - 1:
                    raise self._reasons.given_up(f"results of batch {job.name}: {error.kind}") from None
            else:
                if not rows or not job.results:
                    break
            await asyncio.sleep(pause_before(attempt, None))
        self._rest(batch, job, rows, aside, shown=shown)
        changed.set()

    async def _read(
        self, batch: Logged, job: Job, url: str, rows: dict[int, Row], aside: list[_Line], *, shown: bool,
        changed: asyncio.Event,
    ) -> None:  # fmt: skip
        """Read one document of results; the rows that it tells of are journaled, and leave `rows`. Raises
        `NoReplyError` where it breaks off.
        """
        group: list[_Line] = []
        try:
            async with aclosing(self._http.lines(url)) as lines:
                async for raw in lines:
                    if (line := self._line(batch, rows, raw)) is not None:
                        group.append(line)
                    if len(group) == _GROUP:
                        self._keep(job, group, aside, shown=shown)
                        group.clear()
                        changed.set()
        except BadStatusError as error:
            if fate(error.reply.status, error.reply.body) in (Fate.TOO_MANY, Fate.FAILED):
                raise NoReplyError(f"http {error.reply.status}") from None
            told = message(scrub(error.reply.body, self._key))
            raise self._reasons.refuses(error.reply.status, f"{told} (results of batch {job.name})") from None
        finally:
            self._keep(job, group, aside, shown=shown)

    def _line(self, batch: Logged, rows: dict[int, Row], raw: bytes) -> _Line | None:
        """A row that has no outcome yet; None for a line of which nobody can say whose it is, or that came before."""
        result = read_result(self._api, raw)
        number = row_number(batch.token, result.custom_id) if result is not None else None
        if result is None or number is None or (row := rows.pop(number, None)) is None:
            return None
        return _Line(number, row, result, raw)

    def _keep(self, job: Job, group: list[_Line], aside: list[_Line], *, shown: bool) -> None:
        """Journal some rows. What was refused is set aside as long as nothing was ever answered: then it may be the
        settings that are wrong, and not the prompts.
        """
        fates = [_fate_of(line.result) for line in group]
        self._good |= Fate.ANSWER in fates
        kept = list(zip(group, fates, strict=True))
        if self._good:
            kept += [(line, Fate.ABOUT_PROMPT) for line in aside]
            aside.clear()
        else:
            aside += [line for line, found in kept if found is Fate.ABOUT_PROMPT]
            kept = [(line, found) for line, found in kept if found is not Fate.ABOUT_PROMPT]
        data = [line for line, found in kept if found in (Fate.ANSWER, Fate.ABOUT_PROMPT)]
        requests = self._log.requests([(line.number, line.row.key) for line in data])
        raws = [scrub(wrapped(job.name, line.raw), self._key) for line in data]
        ended, usages = [], []
        for line, found in kept:
            usage = self._teacher.usage(wrapped(job.name, line.raw)) if found is Fate.ANSWER else None
            cost = 0
            if found is Fate.ANSWER and self._prices:
                cost = self._prices.cost(*usage) if usage else line.row.held
            ended.append(Ended(line.number, _outcome(line.result, found), cost))
            usages.append(usage.completion if usage else 0)
        self._log.keep([Answer(*pair) for pair in zip(requests, raws, strict=True)], ended)
        for (line, found), end, tokens in zip(kept, ended, usages, strict=True):
            self._settle(line.row, end.cost)
            if found in (Fate.ANSWER, Fate.ABOUT_PROMPT):
                ours = line.row.account == self._account
                self.answers += ours
                self._status.answered(tokens, ours=ours, shown=shown)
            else:
                self._lacks(end.outcome)
                self._stop(line, found, job)
        self._status.spent = self._budget.spent

    def _stop(self, line: _Line, found: Fate, job: Job) -> None:
        """Note what a row says about all others."""
        if found is Fate.STOP:
            told = message(scrub(orjson.dumps(line.result.body), self._key))
            self._reasons.note(self._reasons.refuses(line.result.status or 0, f"{told} (a row of batch {job.name})"))
        elif found is Fate.NO_QUOTA:
            self._reasons.note(self._reasons.no_quota(message(scrub(orjson.dumps(line.result.body), self._key))))

    def _settle(self, row: Row, cost: int) -> None:
        if row.account == self._account:
            self._budget.settle(row.held, cost)

    def _lacks(self, outcome: str, rows: int = 1) -> None:
        self.again[outcome] += rows
        self._status.errors[outcome] += rows

    def _rest(self, batch: Logged, job: Job, rows: dict[int, Row], aside: list[_Line], *, shown: bool) -> None:
        """Give an outcome to the rows that have none: those set aside, and those of which the results say nothing. The
        latter count as lost, and as billed, unless the batch ended before they were worked on.
        """
        if self._good:
            self._keep(job, [], aside, shown=shown)
        ended = [Ended(line.number, f"http {line.result.status}", 0) for line in aside]
        if aside:
            before = self._refused[0] if self._refused else 0
            self._refused = (before + len(aside), orjson.dumps(aside[-1].result.body))
        unworked = job.state if job.state in ("expired", "cancelled") else None
        ended += [Ended(number, unworked or "lost", 0 if unworked else row.held) for number, row in rows.items()]
        self._log.ended(batch.number, job.state, ended)
        for line in aside:
            self._settle(line.row, 0)
        for row in rows.values():
            self._settle(row, 0 if unworked else row.held)
        if rows:
            self._lacks(unworked or "lost", len(rows))
        if self.again["cancelled"]:
            self._reasons.note(self._cancelled(job))

    def lost(self, batch: Logged) -> None:
        """Nobody knows of a batch any more: its rows count as billed, and are asked again."""
        rows = self._log.open_rows(batch.number)
        self._log.ended(batch.number, "lost", [Ended(number, "lost", row.held) for number, row in rows.items()])
        for row in rows.values():
            self._settle(row, row.held)
        self._lacks("lost", len(rows))

    def _failed(self, batch: Logged, job: Job, rows: dict[int, Row]) -> None:
        """The provider refused the batch as a whole: it costs nothing."""
        self._log.ended(batch.number, job.state, [Ended(number, "batch failed", 0) for number in rows])
        for row in rows.values():
            self._settle(row, 0)
        self._lacks("batch failed", len(rows))
        if not any(fault.startswith(_NO_ROOM) for fault in job.faults):
            told = "; ".join(job.faults[:_LISTED]) or "it does not say why"
            remedy = "correct what it complains of; keys that this model refuses can be left out with teacher.omit"
            self._reasons.note(self._error("the provider refuses a batch", f"batch {job.name} failed: {told}", remedy))

    def _cancelled(self, job: Job) -> EndpointError:
        found = f"batch {job.name}, or another, with {self.again['cancelled']} rows that were not answered"
        remedy = "run the same command again to ask them; what was answered before is kept"
        return self._error("a batch was cancelled at the provider", found, remedy)

    def _error(self, summary: str, found: str, remedy: str) -> EndpointError:
        who = f"teacher {self._teacher.identity.name}"
        return EndpointError(summary, [Problem(who, found, "a batch that is worked on", remedy)])

    def all_refused(self) -> Exception | None:
        """Why nobody should go on, where every row was refused and none answered."""
        if self._refused is None or self._good:
            return None
        count, body = self._refused
        return self._reasons.all_refused(count, scrub(body, self._key))


def _fate_of(result: Result) -> Fate:
    """What is done with a row; one that was never worked on is to be asked again."""
    if result.status is None:
        return Fate.FAILED
    return fate(result.status, b"" if result.status == 200 else orjson.dumps(result.body))


def _outcome(result: Result, found: Fate) -> str:
    """What the journal calls it."""
    if result.status is None:
        return result.left
    return found.value if found in (Fate.ANSWER, Fate.ABOUT_PROMPT) else outcome(result.status, found)
