"""Signals of a teacher that a server runs: every training example's token ids go there, log-probabilities come back.

Answers are journaled as they come, before they are parsed; what was answered is never sent again. An answer that
cannot be used ends the stage, with what is in flight journaled first; the next run asks for that one anew, under the
next number of `attempt`. A request's key covers what the server says of its model, so another model under the same
name is asked everything.

Shards are written in their order while later examples are already asked for. Few examples are held: those of the
shard that is being filled, and those in flight.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cache
from itertools import count, islice

import torch
from pydantic import JsonValue
from transformers import PreTrainedTokenizerFast

from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.errors import EndpointError, LimbeckError, ModelError, Problem
from limbeck.ledger.canonical import canonical
from limbeck.recipe import SignalServer
from limbeck.records import Example
from limbeck.rundir import RunDir
from limbeck.signal.answers import Answered, Words, read_answer
from limbeck.signal.endpoint import Endpoint
from limbeck.signal.manifest import SignalKey
from limbeck.signal.store import Planned, SignalWriter
from limbeck.signal.stored import codec_of
from limbeck.signal.top_k import TopKArrays

_AHEAD = 2
"""Examples asked for or waiting to be used, as a multiple of those in flight: a slow answer holds up fewer others."""


def write_served(
    settings: SignalServer,
    run: RunDir,
    key: SignalKey,
    plan: Sequence[Sequence[Example]],
    tokenizer: PreTrainedTokenizerFast,
) -> int:
    """Write the shards that are not written yet; returns how many.

    Raises `EndpointError` for a server that refuses or does not answer, and for answers that cannot be used, and
    `ModelError` for a server whose model has another vocabulary.
    """

    @cache
    def words(token: int) -> str:
        return str(tokenizer.decode([token]))

    async def work(journal: Journal) -> int:
        async with Endpoint(settings) as endpoint:
            return await _Asking(settings, endpoint, journal, key, words).write(run, plan)

    with Journal(run / "journal.db") as journal:
        return asyncio.run(work(journal))


class _Asking:
    """One attempt to have every example annotated."""

    def __init__(self, settings: SignalServer, endpoint: Endpoint, journal: Journal, key: SignalKey, words: Words):
        assert key.k is not None
        assert key.server
        self._settings, self._endpoint, self._journal, self._words = settings, endpoint, journal, words
        self._key, self._k, self._server = key, key.k, key.server
        self._free = asyncio.Semaphore(settings.concurrency)
        self._stopping = False
        self._arrived: list[Answer] = []

    async def write(self, run: RunDir, plan: Sequence[Sequence[Example]]) -> int:
        self._server = self._server.model_copy(update={"said": await self._endpoint.identity()})
        if plan:
            first = await self._ask(plan[0][0])
            self._server = self._server.model_copy(update={"answered": first.model})
        key = self._key.model_copy(update={"server": self._server})
        writer = SignalWriter(run / "signals", key, [[Planned(e.id, e.supervised) for e in s] for s in plan])
        todo, codec, stream = writer.unwritten(), codec_of(key), torch.Generator()
        positions = sum(e.supervised for number in todo for e in plan[number])
        with run.progress.line("annotate", positions, "positions") as line:
            answers = self._in_order(e for number in todo for e in plan[number])
            for number in todo:
                arrays: list[TopKArrays] = []
                for example in plan[number]:
                    arrays.append(codec.encode([(await anext(answers)).signal], stream))
                    line.advance(example.supervised)
                writer.write(number, arrays)
        writer.finish()
        return len(todo)

    async def _in_order(self, examples: Iterator[Example]) -> AsyncIterator[Answered]:
        """The answers in the order of the examples. When one fails, those in flight are journaled before all that
        failed is told.
        """
        room = _AHEAD * self._settings.concurrency
        open_ = deque(asyncio.create_task(self._ask(e)) for e in islice(examples, room))
        try:
            while open_:
                answered = await open_[0]
                open_.popleft()
                open_.extend(asyncio.create_task(self._ask(e)) for e in islice(examples, 1))
                yield answered
        except LimbeckError:
            self._stopping = True
            ended = await asyncio.gather(*open_, return_exceptions=True)
            raise _together([error for error in ended if isinstance(error, LimbeckError)]) from None
        finally:
            for task in open_:
                task.cancel()

    async def _ask(self, example: Example) -> Answered:
        """The answer for an example: the journal's, or else the server's. One that cannot be used is asked for anew,
        not twice in one run.
        """
        for attempt in count():
            request = self._request(example, attempt)
            known = not self._journal.missing([request.key])
            if not known:
                await self._send(request, example)
            raw = self._journal.get(request.key).raw
            try:
                return self._read(raw, example)
            except (EndpointError, ModelError):
                if not known:
                    raise
        raise AssertionError("never here")

    async def _send(self, request: Request, example: Example) -> None:
        async with self._free:
            if self._stopping:
                raise asyncio.CancelledError
            raw = await self._endpoint.complete(canonical(self._body(example)), f"example {example.id}")
            # Still counted as in flight: a kill costs no more answers than may be in flight.
            await self._journaled(Answer(request, raw))

    async def _journaled(self, answer: Answer) -> None:
        """Answers that arrive together are one commit."""
        self._arrived.append(answer)
        await asyncio.sleep(0)
        if self._arrived:
            self._journal.put_group(self._arrived)
            self._arrived = []

    def _body(self, example: Example) -> dict[str, JsonValue]:
        asked: dict[str, JsonValue] = (
            {"prompt_logprobs": self._k, "return_token_ids": True}
            if self._settings.ask == "prompt_logprobs"
            else {"echo": True, "logprobs": self._k, "return_tokens_as_token_ids": True}
        )
        # At temperature 1 processed log-probabilities are the raw ones. Servers want at least one token written.
        prompt: list[JsonValue] = [int(token) for token in example.tokens_T]
        return {"model": self._settings.model, "prompt": prompt, "max_tokens": 1, "temperature": 1} | asked

    def _request(self, example: Example, attempt: int) -> Request:
        server = self._server.model_dump(mode="json", exclude={"answered"})
        return Request.of({"form": "served/1", "server": server, "attempt": attempt, "body": self._body(example)})

    def _read(self, raw: bytes, example: Example) -> Answered:
        answered = read_answer(
            raw,
            example,
            ask=self._settings.ask,
            k=self._k,
            vocab_size=self._key.vocab_size,
            words=self._words,
        )
        if self._server.answered not in (None, answered.model):
            where = f"the server's answer for example {example.id}: model"
            remedy = "let one model answer, then run again: only this is asked anew"
            problem = Problem(where, answered.model, f"{self._server.answered}, as in its first answer", remedy)
            raise EndpointError("two models answered", [problem])
        return answered


def _together(errors: Sequence[LimbeckError]) -> LimbeckError:
    summary = "; ".join(dict.fromkeys(error.summary for error in errors))
    return type(errors[0])(summary, [problem for error in errors for problem in error.problems])
