"""Answers to the rows of completions.parquet: in the order of prompts, teachers, samples, whatever came first.

Where one teacher behind an endpoint is asked request by request, rows are made while others are under way (`Ahead`),
from what is in memory anyway. What is left then, and everything else, is made from the journal. A row does not show in
which of the two ways it was made.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue
from typing_extensions import TypeIs

from limbeck.collect.contents import Wanted, mismatch
from limbeck.collect.journal import Journal, Kept
from limbeck.collect.teachers import Parsed, Request, Writing
from limbeck.recipe import NO_ENDPOINT, Recipe
from limbeck.records import Completion, Digest, Prompt
from limbeck.rundir import RunDir
from limbeck.tables import RecordFile, count_records, read_records

if TYPE_CHECKING:
    from limbeck.collect.endpoints.account import Account
    from limbeck.collect.endpoints.teacher import Endpoint

_READ = 128
"""Answers that are read from the journal together."""
_HELD, _HELD_BYTES = 8192, 32 * 2**20
"""Rows that wait, for one before them or for time to spare, at the most: so many, or of so many bytes of requests and
answers."""
_MADE = 512
"""Rows that are made in one go while requests are under way, about 40 ms: the event loop stands still meanwhile."""
_BUSY = 0.9
"""Seconds of the processor in a second, from which on requests need all of its time: one core's, since Python's threads
take turns."""


class Asked(NamedTuple):
    """One request of the recipe, and what it is for."""

    request: Request
    prompt: Prompt
    sample: int
    teacher: Writing | Endpoint


def asked_by(teachers: Sequence[Writing | Endpoint], recipe: Recipe, run: RunDir, first: int = 0) -> Iterator[Asked]:
    """Every request of the recipe from the `first` on, in the order of the completions."""
    prompts = run / "prompts.parquet"
    each = [(teacher, sample) for teacher in teachers for sample in range(recipe.collect.samples)]
    skipped, begun = divmod(first, len(each))
    if skipped == count_records(prompts):
        return
    for number, prompt in enumerate(read_records(prompts, Prompt)):
        if number >= skipped:
            for teacher, sample in each[begun if number == skipped else 0 :]:
                yield Asked(teacher.request(prompt, sample), prompt, sample, teacher)


def behind_endpoint(teacher: Writing | Endpoint) -> TypeIs[Endpoint]:
    """Told by its kind: what endpoints need may not be installed."""
    return teacher.identity.kind not in NO_ENDPOINT


class Completing:
    """Writes completions to a file, and counts."""

    def __init__(self, file: RecordFile[Completion], recipe: Recipe, account: Account | None):
        self._file, self._settings, self.totals = file, recipe.collect, Totals(account)

    def add(self, asked: Asked, parsed: Parsed, kept: Kept, batch: str | None) -> None:
        """Append the completion that this answer makes."""
        completion = _completion(asked, parsed, kept, batch, self._wanted(asked))
        self.totals.count(completion)
        self._file.add(completion)

    def add_journaled(self, group: Sequence[Asked], journal: Journal) -> Iterator[Asked]:
        """Append those of a few hundred requests that were answered; gives them in turn."""
        found = journal.get_all([asked.request.key for asked in group])
        for asked in group:
            if (journaled := found.get(asked.request.key)) is not None:
                teacher, raw = asked.teacher, journaled.raw
                batch = teacher.batch(raw) if behind_endpoint(teacher) else None
                kept = Kept(journaled.response, journaled.created)
                self.add(asked, teacher.parse(asked.request, raw), kept, batch)
                yield asked

    def add_all(self, asked: Iterator[Asked], journal: Journal) -> None:
        """Append all that were answered."""
        while group := list(islice(asked, _READ)):
            for _ in self.add_journaled(group, journal):
                pass

    def _wanted(self, asked: Asked) -> Wanted:
        if not behind_endpoint(asked.teacher):
            return Wanted()
        from limbeck.collect.endpoints.teacher import wanted

        return wanted(asked.prompt, self._settings)


class Ahead:
    """Makes completions of one teacher while it is asked.

    Laws: `passed` requests, from the first on, have their rows in the file, or have none; the others are for who comes
    after. Rows are made while the processor waits for answers; where it never does, requests come first, and rows are
    made when enough wait for them. Memory is bounded: who would have to wait with too many others is left to the end.
    """

    def __init__(self, completing: Completing, journal: Journal):
        self._completing, self._journal = completing, journal
        self._waiting: deque[Asked] = deque()
        """From the first request without a row on, in order."""
        self._lacking: dict[Digest, tuple[Parsed, Kept] | None] = {}
        """Those of them that the journal lacked, with what was answered."""
        self._bytes = 0
        self._full = False
        self._spare = _Spare()
        self.passed = 0

    def expect(self, stretch: Sequence[Asked], lacking: Collection[Digest]) -> None:
        """The next requests, and which of them the journal lacks. Makes what rows can be made, if there is time for it;
        raises what the journal and the file raise.
        """
        if self._spare() or self._too_many(stretch):
            self.make(_MADE)
        self._full = self._full or self._too_many(stretch)
        if not self._full:
            self._waiting.extend(stretch)
            self._bytes += sum(len(asked.request.body) for asked in stretch)
            self._lacking.update(dict.fromkeys(lacking))

    def _too_many(self, stretch: Sequence[Asked]) -> bool:
        return len(self._waiting) + len(stretch) > _HELD or self._bytes > _HELD_BYTES

    def told(self, request: Request, parsed: Parsed, kept: Kept | None) -> None:
        """An answer is on the disk; a second one counts for nothing, and the first is in the journal."""
        if request.key not in self._lacking:
            return
        if kept is None:
            del self._lacking[request.key]
        else:
            self._lacking[request.key] = parsed, kept
            self._bytes += len(parsed.text) + len(parsed.reasoning or "")

    def make(self, most: int | None = None) -> None:
        """Make the rows of all before the first that has no answer yet, or about so many at the most."""
        last = None if most is None else self.passed + most
        while self._waiting and (last is None or self.passed < last):
            key = self._waiting[0].request.key
            if key not in self._lacking:
                if not self._make_journaled():
                    return
            elif (answer := self._lacking[key]) is not None:
                asked = self._waiting[0]
                self._completing.add(asked, *answer, None)
                self._gone(asked)
            else:
                return

    def _make_journaled(self) -> bool:
        """Make the next rows from the journal; says whether there were any."""
        group = []
        for asked in islice(self._waiting, _READ):
            if asked.request.key in self._lacking:
                break
            group.append(asked)
        before = self.passed
        for asked in self._completing.add_journaled(group, self._journal):
            if asked is not self._waiting[0]:
                raise AssertionError("an answer that was in the journal is not there any more")
            self._gone(asked)
        return self.passed > before

    def _gone(self, asked: Asked) -> None:
        self._waiting.popleft()
        answer = self._lacking.pop(asked.request.key, None)
        self._bytes -= len(asked.request.body)
        if answer is not None:
            self._bytes -= len(answer[0].text) + len(answer[0].reasoning or "")
        self.passed += 1


class _Spare:
    """Says whether this process left some of the processor's time unused since it was last asked."""

    def __init__(self) -> None:
        self._wall, self._used = time.perf_counter(), time.process_time()

    def __call__(self) -> bool:
        wall, used = time.perf_counter(), time.process_time()
        spare = used - self._used < _BUSY * (wall - self._wall)
        self._wall, self._used = wall, used
        return spare


def _completion(asked: Asked, parsed: Parsed, kept: Kept, batch: str | None, wanted: Wanted) -> Completion:
    prompt, who, schema = asked.prompt, asked.teacher.identity, wanted.json_schema
    whole = parsed.finish_reason == "stop"
    return Completion(
        prompt_id=prompt.id,
        sample=asked.sample,
        messages=prompt.messages,
        text=parsed.text,
        reasoning=parsed.reasoning,
        finish_reason=parsed.finish_reason,
        model=parsed.model,
        teacher=who.name,
        provider=who.provider,
        route=who.route,
        weights=who.weights,
        terms=who.terms,
        prompt_tokens=parsed.prompt_tokens,
        completion_tokens=parsed.completion_tokens,
        created=kept.created,
        request_id=asked.request.key,
        response=kept.response,
        split=prompt.split,
        batch=batch,
        tools=wanted.tools,
        tool_calls=parsed.tool_calls or None,
        json_schema=schema,
        mismatch=mismatch(parsed.text, schema) if schema is not None and whole else None,
    )


@dataclass
class Totals:
    """Counts over the completions as they are written."""

    account: Account | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    by_teacher: Counter[str] = field(default_factory=Counter)

    def count(self, completion: Completion) -> None:
        """Count one."""
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        self.finish_reasons[completion.finish_reason] += 1
        self.by_teacher[completion.teacher] += completion.completion_tokens
        tokens = completion.prompt_tokens, completion.completion_tokens
        if self.account is not None:
            fate = completion.finish_reason if completion.mismatch is None else "schema"
            self.account.add(completion.teacher, fate, *tokens, completion.batch, completion.request_id)

    def facts(self) -> dict[str, JsonValue]:
        """For the ledger."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_by_teacher": dict(sorted(self.by_teacher.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
        }
