"""Has one endpoint answer requests: opens what is needed for it, sends, and says what came of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from limbeck.collect.endpoints.budget import Budget, Purse
from limbeck.collect.endpoints.keys import read_key
from limbeck.collect.endpoints.pacing import Pacer
from limbeck.collect.endpoints.prices import Prices, prices_of
from limbeck.collect.endpoints.reasons import Fatal
from limbeck.collect.endpoints.sending import Sender, Told
from limbeck.collect.endpoints.status import Status
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.endpoints.transport import Transport
from limbeck.collect.teachers import Request
from limbeck.collect.writer import Writer
from limbeck.progress import Line
from limbeck.records import Digest

T = TypeVar("T")

_TICK = 1.0
"""Seconds."""
_SPARE, _SPARE_SHARE = 32, 4
"""Requests that are made ready while as many as may be are under way: so many, or one in so many of those where that is
more. While they wait for the disk, others are answered."""
_SWITCH = 0.0005
"""Seconds after which Python lets the journal's thread run beside the event loop. With its own 5 ms, each of the few
statements of a commit waits so long on a busy loop, and requests wait for the commit."""


class Asked(NamedTuple):
    """What came of asking."""

    answers: int
    """Journaled."""
    tokens: int
    """Written by the teacher, as the provider counts them."""
    stopped: Exception | None
    """Why not everything was answered."""
    fatal: bool = False
    """Whether nobody should go on with the answers there are."""


class Purpose(NamedTuple):
    """For whom it is asked, and within what bounds."""

    journal: Path
    account: Digest
    number: int
    """The journal's next free number of a request."""
    budget: Budget
    concurrency: int
    known_good: bool
    """Whether this teacher has answered before."""


def ask(
    teacher: Endpoint,
    stretches: Iterator[Sequence[Request]],
    purpose: Purpose,
    line: Line,
    told: Told | None = None,
) -> Asked:
    """Send requests until all are answered or something says to stop; `told` hears of each answer. Ctrl-C awaits what
    is under way, and a second one does not.

    Raises what the journal raises, and `InputError` where the key cannot be read.
    """
    key, prices = read_key(teacher.settings), prices_of(teacher.settings)
    return run_loop(_ask(teacher, stretches, purpose, line, key, prices, told))


async def _ask(
    teacher: Endpoint,
    stretches: Iterator[Sequence[Request]],
    purpose: Purpose,
    line: Line,
    key: str | None,
    prices: Prices | None,
    told: Told | None,
) -> Asked:
    settings = teacher.settings
    status = Status(line, purpose.budget.cap, prices is not None)
    connections = Transport(teacher.address, teacher.dialect.headers(key), purpose.concurrency, settings.timeout)
    async with connections as transport, Writer(purpose.journal) as writer:
        sender = Sender(
            teacher,
            stretches,
            writer,
            transport,
            Purse(purpose.budget),
            pacer=Pacer(purpose.concurrency, settings.requests_per_minute, settings.tokens_per_minute),
            prices=prices,
            key=key,
            account=purpose.account,
            number=purpose.number,
            status=status,
            known_good=purpose.known_good,
            told=told,
        )
        ticking = asyncio.create_task(_tick(status))
        spare = min(purpose.concurrency, max(_SPARE, purpose.concurrency // _SPARE_SHARE))
        try:
            with _quick_to_switch():
                stopped = await sender.run(purpose.concurrency + spare)
        finally:
            ticking.cancel()
    return Asked(status.answers, status.tokens, stopped, isinstance(stopped, Fatal))


async def _tick(status: Status) -> None:
    """Say where things stand also while nothing comes back."""
    while True:
        await asyncio.sleep(_TICK)
        status.tell()


@contextmanager
def _quick_to_switch() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_loop(work: Coroutine[object, object, T]) -> T:
    """Run it to its end, also where an event loop already runs in this thread (a notebook): then in another."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    results: list[T] = []
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            results.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere, name="limbeck-collect")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
