"""Batches, as both providers' batch APIs see them: rows that are worked off over time, billed one by one.

A row is billed, at `Settings.batch_price` of its price, when it has been answered. A batch that expires or is
cancelled keeps the answers it has. Rows come back in an order of their own, as the providers warn.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from limbeck.testing.answers import Json, Twist, body_digest, content_seed
from limbeck.testing.calls import Call, Desk, Reply
from limbeck.testing.errors import Provider, Refused
from limbeck.testing.faults import BadBatch

State = Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]

_STEPS = 20
"""In how many steps a batch is worked off."""


class Row(NamedTuple):
    """One request of a batch."""

    custom_id: str
    path: str
    body: Json


class Result(NamedTuple):
    """What became of a row."""

    custom_id: str
    kind: Literal["succeeded", "errored", "canceled", "expired"]
    request_id: str
    body: Json
    """The answer; empty where there is none."""
    refused: Refused | None
    """Why it was refused, where it was."""


class Fault(NamedTuple):
    """Something wrong with a row as it was sent in: `line` counts from 1."""

    code: str
    message: str
    line: int | None
    param: str | None = None


@dataclass
class Batch:
    """A batch on its way."""

    id: str
    provider: Provider
    rows: Sequence[Row]
    faults: Sequence[Fault]
    fate: BadBatch | None
    endpoint: str = ""
    input_file: str = ""
    metadata: Json | None = None
    state: State = "validating"
    results: list[Result] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    """When it entered each state, in seconds since the epoch; `created` too."""
    output_file: str | None = None
    error_file: str | None = None

    def enter(self, state: State) -> None:
        """Go on to another state."""
        self.state = state
        self.times[state] = time.time()

    def count(self, *kinds: str) -> int:
        """Rows that ended in one of these ways."""
        return sum(result.kind in kinds for result in self.results)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("failed", "completed", "expired", "cancelled")


class Biller(NamedTuple):
    """What working off a row needs of the server."""

    desk: Desk
    endpoint: Callable[[str], Callable[[Desk, Call], Reply] | None]
    """Who answers a path."""
    serial: Callable[[], str]
    twist: Callable[[Row], Twist | None]
    """What a fault changes in the answer to a row."""
    charge: Callable[[Reply, Row, str, str, str], None]
    """Bill a reply to a row, by its digest, request id and batch id."""


class Batches:
    """All batches of a server, newest last."""

    def __init__(self, biller: Biller):
        self._biller = biller
        self._all: dict[str, Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, batch: Batch, ended: Callable[[Batch], None]) -> None:
        """Take a batch and begin to work on it; `ended` is called when it has ended."""
        batch.times["created"] = time.time()
        self._all[batch.id] = batch
        task = asyncio.get_running_loop().create_task(self._work(batch, ended))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def get(self, name: str, provider: Provider) -> Batch:
        """A batch by its id. Raises `Refused` where there is none."""
        batch = self._all.get(name)
        if batch is None or batch.provider != provider:
            raise Refused("not_found", f"No batch found with id '{name}'.")
        return batch

    def listed(self, provider: Provider) -> list[Batch]:
        """All of one provider's batches, the newest first."""
        return [batch for batch in reversed(self._all.values()) if batch.provider == provider]

    def cancel(self, batch: Batch) -> None:
        """Ask for its end; what is done stays."""
        if not batch.ended and batch.state != "cancelling":
            batch.enter("cancelling")

    def remove(self, batch: Batch) -> None:
        """Forget it."""
        del self._all[batch.id]

    async def close(self) -> None:
        """Stop all work."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, batch: Batch, ended: Callable[[Batch], None]) -> None:
        failed = batch.faults or (batch.fate is not None and batch.fate.kind == "batch_failed")
        pause = self._biller.desk.settings.batch_seconds / (_STEPS + 1)
        await asyncio.sleep(pause)
        if failed and batch.state == "validating":
            batch.enter("failed")
            ended(batch)
            return
        if batch.state == "validating":
            batch.enter("in_progress")
        expires = batch.fate is not None and batch.fate.kind == "batch_expired"
        last = math.floor(len(batch.rows) * batch.fate.share) if expires and batch.fate else len(batch.rows)
        step, done = max(1, math.ceil(len(batch.rows) / _STEPS)), 0
        while done < last and batch.state != "cancelling":
            await asyncio.sleep(pause)
            upto = min(last, done + step)
            for row in batch.rows[done:upto]:
                batch.results.append(self._answer(batch, row))
            done = upto
        if batch.state == "cancelling":
            await asyncio.sleep(pause)
        self._leave(batch, done, "canceled" if batch.state == "cancelling" else "expired")
        batch.results.sort(key=lambda result: hashlib.sha256(result.custom_id.encode()).digest())
        batch.enter("cancelled" if batch.state == "cancelling" else "expired" if expires else "completed")
        ended(batch)

    def _leave(self, batch: Batch, done: int, kind: Literal["canceled", "expired"]) -> None:
        """The rows that are never answered."""
        batch.results += [Result(row.custom_id, kind, "", {}, None) for row in batch.rows[done:]]

    def _answer(self, batch: Batch, row: Row) -> Result:
        serial = self._biller.serial()
        request_id = f"req_{serial}"
        try:
            if self._fails(batch, row):
                raise Refused("500")
            endpoint = self._biller.endpoint(row.path)
            if endpoint is None:
                raise Refused("not_found", f"Invalid URL (POST {row.path})")
            call = Call(row.path, row.body, content_seed(row.body), serial, time.time(), self._biller.twist(row))
            reply = endpoint(self._biller.desk, call)
        except Refused as refused:
            return Result(row.custom_id, "errored", request_id, {}, refused)
        self._biller.charge(reply, row, body_digest(row.body), request_id, batch.id)
        return Result(row.custom_id, "succeeded", request_id, reply.body, None)

    def _fails(self, batch: Batch, row: Row) -> bool:
        """Whether a `batch_rows` fault meets this row; depends on its custom_id alone."""
        if batch.fate is None or batch.fate.kind != "batch_rows":
            return False
        drawn = hashlib.blake2b(row.custom_id.encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "big") / 2**64 < batch.fate.share
