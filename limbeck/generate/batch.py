"""The loop: rows are read, fed, drawn for, and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.errors import InputError, ModelError, Problem
from limbeck.generate.attention import sampling_mode
from limbeck.generate.cache import Columns, Slots, Store, accepts, has_slots, read_prefix
from limbeck.generate.draw import Sampling, next_tokens, uniforms


class Generated(NamedTuple):
    """One answer. `stop_token` ended it and is not among `tokens`; it is None where `max_tokens` did."""

    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    stop_token: int | None = None


def sample_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    seeds: Sequence[int],
    rows: int | None = None,
    on_done: Callable[[int, Generated], None] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Generated]:
    """One answer per prompt, in the order of `prompts`, which may differ in length and may repeat.

    `seeds` holds one seed per prompt, 0 to 2**128 - 1; equal prompts with equal seeds have equal answers.
    `rows` is how many prompts decode at the same time (None: all of them). Memory follows `rows`; prompts
    beyond it enter as others finish, so one call with many prompts is faster than many calls. `on_done` is
    told the index of a prompt and its answer as soon as that is complete, in any order; `on_tokens`, step by step, how
    many tokens were drawn, those that end answers among them.

    Raises `InputError` naming every prompt that is empty, has tokens outside the model's vocabulary, or
    exceeds the model's positions together with `max_tokens`, and seeds that are too few or out of range;
    `ModelError` where the model has no key-value cache, or its logits are no distribution. What `on_done` was
    told before an error stays true.
    """
    _check(model, prompts, sampling, seeds, rows)
    jobs = [_Job(index, tuple(prompt), seeds[index]) for index, prompt in enumerate(prompts)]
    results: dict[int, Generated] = {}

    def done(index: int, result: Generated) -> None:
        results[index] = result
        if on_done is not None:
            on_done(index, result)

    ends = _Drawing(sampling, frozenset(stop_ids), done, on_tokens)
    size = min(rows or len(jobs), len(jobs))
    with sampling_mode(model):
        if has_slots(model):
            prefix = read_prefix(model, [job.prompt for job in jobs])
            _Loop(Slots(model, size, prefix), size, ends).run(jobs)
        else:
            for start in range(0, len(jobs), max(size, 1)):
                part = jobs[start : start + size]
                _Loop(Columns(model), len(part), ends).run(part)
    return [results[job.index] for job in jobs]


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    rows: int | None,
) -> None:
    if not accepts(model, "past_key_values"):
        kind = type(model).__name__
        raise ModelError("this model cannot be sampled from", [Problem(kind, "no past_key_values", "a cache")])
    vocabulary = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    positions = getattr(model.config, "max_position_embeddings", None)
    problems = []
    if rows is not None and rows < 1:
        problems.append(Problem("rows", str(rows), "at least 1"))
    if len(seeds) != len(prompts):
        problems.append(Problem("seeds", f"{len(seeds)} seeds", f"{len(prompts)}, one per prompt"))
    for index, seed in enumerate(seeds):
        if not 0 <= seed < 2**128:
            problems.append(Problem(f"seeds[{index}]", str(seed), "0 to 2**128 - 1"))
    for index, prompt in enumerate(prompts):
        where, length = f"prompts[{index}]", len(prompt)
        if length == 0:
            problems.append(Problem(where, "no tokens", "at least one", "begin with the bos token"))
        elif min(prompt) < 0 or max(prompt) >= vocabulary:
            found = f"tokens from {min(prompt)} to {max(prompt)}"
            problems.append(Problem(where, found, f"0 to {vocabulary - 1}", "use the model's own tokenizer"))
        if positions is not None and length + sampling.max_tokens > positions:
            found = f"{length} tokens, and max_tokens {sampling.max_tokens}"
            problems.append(Problem(where, found, f"{positions} together", "shorten one of them"))
    if problems:
        raise InputError("these prompts cannot be continued", problems)


@dataclass(frozen=True, slots=True)
class _Job:
    index: int
    prompt: tuple[int, ...]
    seed: int


@dataclass(slots=True)
class _Row:
    """A place in the batch. While it is not `live` it is fed the same again, and its logits are ignored."""

    index: int
    draws: list[float]
    tokens: list[int]
    position: int
    slot: int
    live: bool
    fed: int = 0


class _Drawing(NamedTuple):
    """How tokens are drawn, what ends an answer, and who is told of either."""

    sampling: Sampling
    stop_ids: frozenset[int]
    done: Callable[[int, Generated], None]
    drawn: Callable[[int], None] | None


class _Loop:
    def __init__(self, store: Store, size: int, ends: _Drawing):
        self._store = store
        self._sampling, self._stop_ids, self._done, self._drawn = ends
        self._rows = [_Row(-1, [], [], 0, 0, live=False) for _ in range(size)]

    def run(self, jobs: Sequence[_Job]) -> None:
        """Rows enter, or are dropped, once an eighth of them is free: either costs about a step."""
        waiting = deque(jobs)
        while waiting or any(row.live for row in self._rows):
            free = [place for place, row in enumerate(self._rows) if not row.live]
            if len(free) * 8 < len(self._rows):
                self._step()
            elif waiting:
                self._admit(waiting, free)
            else:
                kept = [place for place, row in enumerate(self._rows) if row.live]
                self._store.keep(kept)
                self._rows = [self._rows[place] for place in kept]
                self._step()

    def _admit(self, waiting: deque[_Job], free: list[int]) -> None:
        jobs = [waiting.popleft()]
        width = len(jobs[0].prompt)
        while waiting and len(jobs) < len(free):
            width = max(width, len(waiting[0].prompt))
            if width * (len(jobs) + 1) > self._store.read_tokens:
                break
            jobs.append(waiting.popleft())
        new = self._store.admit(free[: len(jobs)], [job.prompt for job in jobs])
        rows = []
        for place, job in zip(free, jobs, strict=False):
            draws = uniforms(job.seed, self._sampling.max_tokens).tolist()
            rows.append(_Row(job.index, draws, [], len(job.prompt), new.mask_NS.shape[1], live=True))
            self._rows[place] = rows[-1]
        self._draw(rows, new.logits_NV)

    def _step(self) -> None:
        logits_BV = self._store.step(self._rows)
        for row in self._rows:
            if row.live:
                row.position += 1
                row.slot += 1
        self._draw(self._rows, logits_BV)

    def _draw(self, rows: Sequence[_Row], logits_NV: Tensor) -> None:
        draws = [row.draws[len(row.tokens)] if row.live else 0.5 for row in rows]
        live = sum(row.live for row in rows)
        uniforms_N = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)
        for row, token in zip(rows, next_tokens(logits_NV, uniforms_N, self._sampling).tolist(), strict=True):
            if not row.live:
                continue
            row.fed = token
            if token in self._stop_ids:
                self._finish(row, "stop", token)
                continue
            row.tokens.append(token)
            if len(row.tokens) == self._sampling.max_tokens:
                self._finish(row, "length", None)
        if self._drawn is not None:
            self._drawn(live)

    def _finish(self, row: _Row, reason: Literal["stop", "length"], stop_token: int | None) -> None:
        row.live = False
        self._done(row.index, Generated(tuple(row.tokens), reason, stop_token))
