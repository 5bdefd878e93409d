"""The stage `collect`: every prompt, teacher and sample to completions.parquet.

What the journal has is not asked again. Answers go into the journal first, group by group; completions are
made from the journal when all are there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Request, Teacher, make_teacher
from limbeck.errors import PromptError
from limbeck.progress import Line
from limbeck.recipe import Recipe
from limbeck.records import Completion, Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records

_STRETCH = 4096
"""Requests looked up, and for a teacher that answers in batches sorted, together."""

_LISTED = 20
"""Prompts that cannot be asked, of one stretch, that an error lists."""


class _Spent(NamedTuple):
    """What this call itself had written."""

    answers: int
    tokens: int


def collect(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Ask what the journal lacks, then write completions.parquet in the order of prompts, teachers,
    samples.

    Raises `PromptError` for prompts that a teacher's chat template refuses: those of one stretch together,
    before any of that stretch is asked.
    """
    started = time.monotonic()
    teachers = [make_teacher(settings, recipe.collect, recipe.seed) for settings in recipe.teachers]
    total = sum(1 for _ in _prompts(run)) * len(teachers) * recipe.collect.samples
    totals = _Totals()
    with Journal(run / "journal.db") as journal:
        with run.progress.line("collect", total, "answers") as line:
            spent = [_ask(teacher, recipe, run, journal, line) for teacher in teachers]
        completions = totals.counting(_completions(teachers, recipe, run, journal))
        count = write_records(run / "completions.parquet", completions, Completion)
        refused = journal.refused
    generated = sum(part.answers for part in spent)
    return {
        "answers": count,
        "generated": generated,
        "from_journal": count - generated,
        "second_answers_set_aside": refused,
        **totals.facts(),
        "tokens_generated": sum(part.tokens for part in spent),
        "seconds": round(time.monotonic() - started, 3),
    }


def _prompts(run: RunDir) -> Iterator[Prompt]:
    return read_records(run / "prompts.parquet", Prompt)


def _ask(teacher: Teacher, recipe: Recipe, run: RunDir, journal: Journal, line: Line) -> _Spent:
    """Have one teacher answer what the journal lacks; each group is on disk before it is looked at."""
    started, answers, tokens = time.monotonic(), 0, 0
    for group in teacher.answer(_open_stretches(teacher, recipe, run, journal, line)):
        journal.put_group(group)
        answers += len(group)
        tokens += sum(teacher.parse(request, raw).completion_tokens for request, raw in group)
        line.advance(len(group))
        line.note(f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
    return _Spent(answers, tokens)


def _open_stretches(
    teacher: Teacher, recipe: Recipe, run: RunDir, journal: Journal, line: Line
) -> Iterator[list[Request]]:
    """What the journal lacks of each stretch. Stretches are cut from all requests, so they stay the same
    as the journal fills.
    """
    pairs = ((prompt, sample) for prompt in _prompts(run) for sample in range(recipe.collect.samples))
    while stretch := list(islice(pairs, _STRETCH)):
        requests = _requests(teacher, stretch)
        lacking = set(journal.missing(request.key for request in requests))
        line.advance(len(requests) - len(lacking))
        if lacking:
            yield [request for request in requests if request.key in lacking]


def _requests(teacher: Teacher, stretch: Sequence[tuple[Prompt, int]]) -> list[Request]:
    requests, refused = [], []
    for prompt, sample in stretch:
        try:
            requests.append(teacher.request(prompt, sample))
        except PromptError as error:
            refused.append(error)
    if refused:
        problems = [problem for error in refused[:_LISTED] for problem in error.problems]
        listed = f" ({len(refused)} times, the first {_LISTED} listed)" if len(refused) > _LISTED else ""
        raise PromptError(f"{refused[0].summary}{listed}", problems)
    return requests


def _completions(teachers: Sequence[Teacher], recipe: Recipe, run: RunDir, journal: Journal) -> Iterator[Completion]:
    for prompt in _prompts(run):
        for teacher in teachers:
            for sample in range(recipe.collect.samples):
                yield _completion(prompt, sample, teacher, journal)


def _completion(prompt: Prompt, sample: int, teacher: Teacher, journal: Journal) -> Completion:
    request = teacher.request(prompt, sample)
    found = journal.get(request.key)
    parsed, who = teacher.parse(request, found.raw), teacher.identity
    return Completion(
        prompt_id=prompt.id,
        sample=sample,
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
        created=found.created,
        request_id=request.key,
        response=found.response,
        split=prompt.split,
    )


@dataclass
class _Totals:
    """Counts over the completions as they are written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    by_teacher: Counter[str] = field(default_factory=Counter)

    def counting(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        for completion in completions:
            self.prompt_tokens += completion.prompt_tokens
            self.completion_tokens += completion.completion_tokens
            self.finish_reasons[completion.finish_reason] += 1
            self.by_teacher[completion.teacher] += completion.completion_tokens
            yield completion

    def facts(self) -> dict[str, JsonValue]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_by_teacher": dict(sorted(self.by_teacher.items())),
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
        }
