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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from limbeck.collect.journal import Ended, Journal, Kept, Sent
from limbeck.collect.teachers import Answer
from limbeck.errors import InputError

_GROUP = 512
"""Entries from which on a commit waits for no more."""

Done = Callable[[Exception | None, Kept | None], None]
"""Called in the event loop when something is on the disk, with how its answer was kept there (None without an answer,
and where the answer was a second one); or with why it is not."""


class _Entry(NamedTuple):
    sent: Sent | None
    answer: Answer | None
    ended: Ended | None
    done: Done


class Writer:
    """Writes from its own thread through its own connection. An async context manager.

    Laws: entries are committed in the order in which they came; what `begin` gives is done when it is on the disk;
    leaving the context returns after everything was committed. A failure of the journal (a full disk) is raised by
    every later `begin`, when it is awaited, and on leaving.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self._loop = Path(path), asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Entry] | None] = queue.SimpleQueue()
        self._new: list[_Entry] = []
        """What came in this turn of the event loop: handed over together, for each waking of the thread costs both."""
        self._thread = threading.Thread(target=self._work, name="limbeck-journal", daemon=True)
        self._failed: Exception | None = None

    async def __aenter__(self) -> Writer:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._failed is not None:
            raise self._failed

    def begin(self, sent: Sent) -> asyncio.Future[None]:
        """Done when it is on the disk that this request is about to leave."""
        done: asyncio.Future[None] = self._loop.create_future()
        if self._failed is not None:
            done.set_exception(self._failed)
            return done
        self._put(_Entry(sent, None, None, partial(_resolve, done)))
        return done

    def end(self, ended: Ended, answer: Answer | None) -> asyncio.Future[None]:
        """Note what became of a request; the future is done when it is on the disk."""
        done: asyncio.Future[None] = self._loop.create_future()
        self.note(ended, answer, partial(_resolve, done))
        return done

    def note(self, ended: Ended, answer: Answer | None, done: Done) -> None:
        """The same as `end`; `done` is called when it is on the disk, or with the error for which it is not."""
        self._put(_Entry(None, answer, ended, done))

    def _put(self, entry: _Entry) -> None:
        if not self._new:
            self._loop.call_soon(self._hand_over)
        self._new.append(entry)

    def _hand_over(self) -> None:
        if self._new:
            self._queue.put(self._new)
            self._new = []

    def _work(self) -> None:
        error: Exception | None = RuntimeError("the journal's writer ended early")
        try:
            with Journal(self.path) as journal:
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
            entries, last = self._gather()
            try:
                kept = journal.put_traffic(
                    [e.sent for e in entries if e.sent],
                    [e.answer for e in entries if e.answer],
                    [e.ended for e in entries if e.ended],
                )
            except (sqlite3.Error, OSError, InputError) as error:
                self._tell(entries, error)
                if last:
                    self._queue.put(None)
                raise
            self._tell(entries, None, kept)

    def _gather(self) -> tuple[list[_Entry], bool]:
        """What is there, at least something, and whether it is the last."""
        group: list[_Entry] = []
        try:
            more = self._queue.get()
            while more is not None:
                group += more
                if len(group) >= _GROUP:
                    return group, False
                more = self._queue.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _fail(self, error: Exception) -> None:
        """Answer everything that is, and will be, waiting with this error."""
        self._failed = error
        while (entries := self._queue.get()) is not None:
            self._tell(entries, error)

    def _tell(self, entries: list[_Entry], error: Exception | None, kept: Sequence[Kept | None] = ()) -> None:
        if entries:
            self._loop.call_soon_threadsafe(_tell_all, entries, error, kept)


def _tell_all(entries: list[_Entry], error: Exception | None, kept: Sequence[Kept | None]) -> None:
    answers = iter(kept)
    for entry in entries:
        entry.done(error, None if entry.answer is None else next(answers, None))


def _resolve(done: asyncio.Future[None], error: Exception | None, _: Kept | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
