"""Answers to the rows of completions.parquet: in the order of prompts, teachers, samples, whatever came first.

Where one teacher behind an endpoint is asked request by request, rows are made while others are under way (`Ahead`),
from what is in memory anyway. What is left then, and everything else, is made from the journal. A row does not show in
which of the two ways it was made.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, NamedTuple

from pydantic import JsonValue, TypeAdapter
from typing_extensions import TypeIs

from limbeck.collect.contents import Wanted, mismatch
from limbeck.collect.journal import Journal, Kept
from limbeck.collect.teachers import Parsed, Request, Writing
from limbeck.recipe import NO_ENDPOINT, Recipe
from limbeck.records import Completion, Digest, Message, Prompt
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


_NOTHING = Wanted()


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
        self._own = bool(recipe.collect.tools) or recipe.collect.json_schema is not None
        """Whether the recipe has tools or a schema."""

    def add(self, asked: Asked, parsed: Parsed, kept: Kept, batch: str | None) -> None:
        """Append the completion that this answer makes."""
        wanted = self._wanted(asked)
        schema = wanted.json_schema
        differs = mismatch(parsed.text, schema) if schema is not None and parsed.finish_reason == "stop" else None
        self.totals.count(asked, parsed, batch, differs)
        self._file.add_values(_values(asked, parsed, kept, batch, wanted, differs))

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
        prompt = asked.prompt
        own = self._own or prompt.tools is not None or prompt.json_schema is not None
        if not own or not behind_endpoint(asked.teacher):
            return _NOTHING
        from limbeck.collect.endpoints.teacher import wanted

        return wanted(prompt, self._settings)


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


def completions_file(path: str | os.PathLike[str]) -> RecordFile[Completion]:
    """A file of completions, for `Completing`."""
    return RecordFile(path, Completion, {"messages": _chat_text})


def _values(
    asked: Asked, parsed: Parsed, kept: Kept, batch: str | None, wanted: Wanted, differs: str | None
) -> list[object]:
    """The fields of `Completion`, in their order. No record is made of them: what is written here was checked where it
    came from, and checking it again took two fifths of a row's time.
    """
    prompt, who = asked.prompt, asked.teacher.identity
    return [
        prompt.id,
        asked.sample,
        prompt.messages,
        parsed.text,
        parsed.reasoning,
        parsed.finish_reason,
        parsed.model,
        who.name,
        who.provider,
        who.route,
        who.weights,
        who.terms,
        parsed.prompt_tokens,
        parsed.completion_tokens,
        kept.created,
        asked.request.key,
        kept.response,
        prompt.split,
        batch,
        wanted.tools,
        parsed.tool_calls or None,
        wanted.json_schema,
        differs,
        parsed.answer_id,
        parsed.fingerprint,
    ]


_dump_chat = TypeAdapter(tuple[Message, ...]).dump_python


def _chat_text(messages: tuple[Message, ...]) -> str:
    """The JSON text of messages, as `limbeck.tables` writes it."""
    if any(m.parts is not None or m.tool_calls is not None or m.tool_call_id is not None for m in messages):
        return json.dumps(_dump_chat(messages), ensure_ascii=False)
    said = [f'{{"role": "{m.role}", "content": {encode_basestring(m.content)}}}' for m in messages]
    return f"[{', '.join(said)}]"


@dataclass
class Totals:
    """Counts over the completions as they are written."""

    account: Account | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    by_teacher: Counter[str] = field(default_factory=Counter)

    def count(self, asked: Asked, parsed: Parsed, batch: str | None, differs: str | None) -> None:
        """Count one; `differs` says how it is not what its schema asks for."""
        teacher = asked.teacher.identity.name
        tokens = parsed.prompt_tokens, parsed.completion_tokens
        self.prompt_tokens += tokens[0]
        self.completion_tokens += tokens[1]
        self.finish_reasons[parsed.finish_reason] += 1
        self.by_teacher[teacher] += tokens[1]
        if self.account is not None:
            fate = parsed.finish_reason if differs is None else "schema"
            self.account.add(teacher, fate, *tokens, batch, asked.request.key)

    def facts(self) -> dict[str, JsonValue]:
        """For the ledger."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_by_teacher": dict(sorted(self.by_teacher.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
        }
