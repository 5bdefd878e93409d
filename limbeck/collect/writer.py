"""The journal's one writer while requests are under way: a thread that commits whatever has come together.

While one group goes through fsync the next one gathers, so a commit costs the event loop nothing and a busy run few
commits.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
from typing import NamedTuple

from limbeck.collect.journal import Ended, Journal, Sent
from limbeck.collect.teachers import Answer
from limbeck.errors import InputError

_GROUP = 512
"""Entries of a commit at most."""


class _Entry(NamedTuple):
    sent: Sent | None
    answer: Answer | None
    ended: Ended | None
    done: asyncio.Future[None] | None


class Writer:
    """Writes from its own thread through its own connection. An async context manager.

    Laws: entries are committed in the order in which they came; what `begin` awaited is on the disk; leaving the
    context returns after everything was committed. A failure of the journal (a full disk) is raised by every later
    `begin` and on leaving.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path, self._loop = path, asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="limbeck-journal", daemon=True)
        self._failed: Exception | None = None

    async def __aenter__(self) -> Writer:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._failed is not None:
            raise self._failed

    async def begin(self, sent: Sent) -> None:
        """Returns when it is on the disk that this request is about to leave."""
        if self._failed is not None:
            raise self._failed
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Entry(sent, None, None, done))
        await done

    def end(self, ended: Ended, answer: Answer | None) -> asyncio.Future[None]:
        """Note what became of a request; the future is done when it is on the disk."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Entry(None, answer, ended, done))
        return done

    def _work(self) -> None:
        error: Exception | None = RuntimeError("the journal's writer ended early")
        try:
            with Journal(self._path) as journal:
                self._write(journal)
            error = None
        except (sqlite3.Error, OSError, InputError) as found:
            error = found
        finally:
            if error is not None:
                self._fail(error)

    def _write(self, journal: Journal) -> None:
        last = False
        while not last:
            group = self._gather()
            last = group[-1] is None
            entries = [entry for entry in group if entry is not None]
            try:
                journal.put_traffic(
                    [e.sent for e in entries if e.sent],
                    [e.answer for e in entries if e.answer],
                    [e.ended for e in entries if e.ended],
                )
            except (sqlite3.Error, OSError, InputError) as error:
                self._tell(entries, error)
                if last:
                    self._queue.put(None)
                raise
            self._tell(entries, None)

    def _gather(self) -> list[_Entry | None]:
        """What is there, at least one entry; None, the last, says that no more will come."""
        group = [self._queue.get()]
        while len(group) < _GROUP and group[-1] is not None:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group

    def _fail(self, error: Exception) -> None:
        """Answer everything that is, and will be, waiting with this error."""
        self._failed = error
        while True:
            entry = self._queue.get()
            if entry is None:
                return
            self._tell([entry], error)

    def _tell(self, entries: list[_Entry], error: Exception | None) -> None:
        waiting = [entry.done for entry in entries if entry.done is not None]
        self._loop.call_soon_threadsafe(_resolve, waiting, error)


def _resolve(waiting: list[asyncio.Future[None]], error: Exception | None) -> None:
    for done in waiting:
        if done.done():
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
