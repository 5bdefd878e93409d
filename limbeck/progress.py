"""One line a stage: what it does, how far it is, at what rate, how long it will take. Silent unless a command asks.

The library never prints. The command line hands a `Progress` made by `Progress.terminal()` to the run: bars where
standard error is a terminal, else a plain line after half a minute and then one a minute.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

_NOTED = 0.2
"""Seconds between two notes of what comes faster than anybody reads."""


class Line(Protocol):
    """The line of one stage."""

    def advance(self, units: float = 1) -> None:
        """So many units more are done."""
        ...

    def note(self, text: str) -> None:
        """A word beside the bar: the loss, the number of tokens."""
        ...


class _SilentLine:
    def advance(self, units: float = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _RichLine:
    def __init__(self, bars: RichProgress, task):
        self._bars, self._task = bars, task

    def advance(self, units: float = 1) -> None:
        self._bars.advance(self._task, units)

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)


class TokenCount:
    """Notes beside a line how many tokens were written so far: a batch of answers takes minutes to end."""

    def __init__(self, line: Line, clock: Callable[[], float] = time.monotonic):
        self._line, self._clock, self._began, self._noted, self._tokens = line, clock, clock(), -math.inf, 0

    def __call__(self, tokens: int) -> None:
        """So many tokens more were written."""
        self._tokens += tokens
        now = self._clock()
        if now > self._began and now - self._noted >= _NOTED:
            self._noted = now
            self._line.note(f"{self._tokens:,} tokens, {self._tokens / (now - self._began):,.0f} a second")


class PlainLine:
    """The line of one stage where nobody watches: written now and then, as a line of a log. The first comes after half
    the time of the others. Several threads may use it.
    """

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str,
        *,
        write: Callable[[str], None],
        every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._name, self._total, self._unit = name, total, unit
        self._write, self._every, self._clock = write, every, clock
        self._began = clock()
        self._due = self._began + every / 2
        self._done, self._note = 0.0, ""
        self._lock = threading.Lock()

    def advance(self, units: float = 1) -> None:
        """See `Line.advance`."""
        with self._lock:
            self._done += units
            self._maybe()

    def note(self, text: str) -> None:
        """See `Line.note`."""
        with self._lock:
            self._note = text
            self._maybe()

    @contextmanager
    def ticking(self) -> Iterator[PlainLine]:
        """Within the block its lines are written when they are due, also while the work between them says nothing."""
        over = threading.Event()
        thread = threading.Thread(target=self._tick, args=(over,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(min(1.0, self._every / 10)):
            with self._lock, suppress(OSError):  # still due: the work meets the error itself
                self._maybe()

    def _maybe(self) -> None:
        now = self._clock()
        if now < self._due:
            return
        took = now - self._began
        whole = f"/{self._total:,.0f}" if self._total is not None else ""
        parts = [f"{self._name}: {self._done:,.0f}{whole} {self._unit}"]
        if self._done:
            rate = self._done / took
            parts.append(f"{rate:,.3g} a second")
            if self._total is not None:
                parts.append(f"{max(0.0, self._total - self._done) / rate / 60:,.0f} minutes left")
        else:
            parts.append(f"{took:,.0f} s so far")
        self._write(", ".join([*parts, *([self._note] if self._note else [])]))
        self._due = now + self._every


def _to_stderr(text: str) -> None:
    print("".join(c if c.isprintable() else " " for c in text), file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    """Units a second, or seconds a unit where that says more."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        if not speed:
            return Text("")
        return Text(
            f"{speed:,.0f} {unit}/s"
            if speed >= 10
            else f"{speed:.1f} {unit}/s"
            if speed >= 1
            else f"{1 / speed:.1f} s each"
        )


class Progress:
    """Gives each stage its line."""

    def __init__(self, console: Console | None, write: Callable[[str], None] | None = None):
        self._console, self._plain = console, write

    @classmethod
    def silent(cls) -> Progress:
        """Shows nothing."""
        return cls(None)

    @classmethod
    def terminal(cls) -> Progress:
        """Shows bars on standard error if that is a terminal, else writes a line now and then there."""
        console = Console(stderr=True)
        return cls(console) if console.is_terminal else cls(None, _to_stderr)

    @contextmanager
    def line(self, name: str, total: float | None, unit: str) -> Iterator[Line]:
        """The line for one stage; `total` in `unit`s, None where it is not known beforehand."""
        if self._console is None:
            if self._plain is None:
                yield _SilentLine()
                return
            with PlainLine(name, total, unit, write=self._plain).ticking() as line:
                yield line
            return
        whole, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description:<8}", table_column=whole),
            BarColumn(12),
            MofNCompleteColumn(table_column=whole),
            _Rate(table_column=whole),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
            TextColumn("{task.fields[note]}", markup=False, table_column=rest),
        )
        with RichProgress(*columns, console=self._console, expand=True) as bars:
            yield _RichLine(bars, bars.add_task(name, total=total, unit=unit, note=""))

    def begin(self, text: str) -> None:
        """What begins now, as a line of the log; a terminal shows its bar at once and needs none."""
        if self._plain is not None:
            self._plain(text)

    def say(self, text: str) -> None:
        """A line of plain text on the terminal, if there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False)
