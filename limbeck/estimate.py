"""What collecting will take: requests, tokens, money, time and disk, before it is paid for.

Without a pilot, what can be said for certain: how many requests there are, and the most that they can cost. With one, a
few prompts are asked, drawn by a digest of their content, and the rest is projected from them: the mean of a prompt
times the number of prompts, with a 95 % interval over prompts. The pilot's answers lie in the journal, so the run does
not ask for them again.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from limbeck.collect.collect import collect
from limbeck.collect.completing import behind_endpoint
from limbeck.collect.digests import DigestSet
from limbeck.collect.endpoints.prices import Prices, batch_prices_of, dollars, picodollars, prices_of
from limbeck.collect.files import iter_file_prompts
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import make_teacher
from limbeck.curate.tools import refuse_tools
from limbeck.errors import InputError, Problem
from limbeck.estimate_written import Figure, written_figures
from limbeck.evaluate.statistics import ratio_interval
from limbeck.progress import Progress
from limbeck.recipe import NO_ENDPOINT, DatasetPrompts, FilePrompts, Recipe
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.records import Completion, Prompt, Split
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed
from limbeck.tables import read_records, write_records
from limbeck.terms.stage import refuse_before

if TYPE_CHECKING:
    from limbeck.collect.endpoints.teacher import Endpoint


@dataclass(frozen=True)
class Estimate:
    """What collecting will take."""

    prompts: int
    written: int
    """Of them, prompts that a teacher writes. Only `prompts` and `requests` count them: what writing and answering them
    takes is not known beforehand."""
    here: int
    """Answers of teachers that run here: nothing is paid for them."""
    requests: int
    """To endpoints."""
    journaled: int
    """Of them, answered already."""
    pilot: int
    """Prompts asked for the projection."""
    batches: bool
    """Whether they go in batches, at a batch's prices."""
    prices: dict[str, str]
    """Who says what each endpoint charges."""
    figures: tuple[Figure, ...]

    def to_json(self) -> str:
        """All of it as JSON text."""
        values = asdict(self) | {"figures": [figure._asdict() for figure in self.figures]}
        return json.dumps(values, ensure_ascii=False, indent=2)


def estimate(
    recipe: Recipe, *, pilot: int = 0, journal: Path | None = None, progress: Progress | None = None
) -> Estimate:
    """What it takes to collect as the recipe says. A pilot asks so many prompts, and journals the answers in `journal`,
    or where the recipe's `collect.journal` says.

    Raises:
        InputError: wrong prompts; or a pilot without a place for its answers, or larger than the prompts, or whose
            answers with tools no template could say.
        RefusedError, EndpointError: the pilot came upon the cap, or upon an endpoint that does not answer.
    """
    chosen_teachers = [t for t in recipe.teachers if t.kind not in NO_ENDPOINT]  # others load what is not needed here
    made = (make_teacher(t, recipe.collect, recipe.seed) for t in chosen_teachers)
    teachers = [teacher for teacher in made if behind_endpoint(teacher)]
    batch = recipe.collect.batched
    priced = {
        t.identity.name: batch_prices_of(t.settings, batch.price_share) if batch else prices_of(t.settings)
        for t in teachers
    }
    path = Path(recipe.collect.journal) if recipe.collect.journal is not None else journal
    chosen = _chosen(recipe, pilot)
    if pilot:
        refuse_before(recipe)
        _refuse_pilot(recipe, pilot, len(chosen), path)
        if recipe.collect.tools or any(_calls_for_tools(prompt) for prompt in _prompts(recipe)):
            refuse_tools(recipe)
    count = sum(1 for _ in _prompts(recipe))
    own = sum(source.count for source in recipe.prompts if not isinstance(source, FilePrompts | DatasetPrompts))
    measured = {}
    if chosen and path is not None:
        measured = _pilot(recipe, chosen, priced, path, progress or Progress.silent())
    bounds = _bounds(recipe, teachers, priced, path)
    return Estimate(
        prompts=count + own,
        written=own,
        here=(count + own) * sum(t.kind == "local" for t in recipe.teachers) * recipe.collect.samples,
        requests=(count + own) * len(teachers) * recipe.collect.samples,
        journaled=bounds.journaled,
        pilot=len(chosen),
        batches=batch is not None and bool(teachers),
        prices={name: one.source if one else "unknown" for name, one in priced.items()},
        figures=(
            *(_figures(recipe, count, own, bounds, measured, all(priced.values())) if teachers else ()),
            *written_figures(recipe, priced, pilot=pilot, journal=path, progress=progress),
        ),
    )


class _Bounds(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    money: int
    journaled: int


def _prompts(recipe: Recipe) -> Iterator[Prompt]:
    """The different prompts of all files."""
    seen = DigestSet()
    for source in (one for one in recipe.prompts if isinstance(one, FilePrompts | DatasetPrompts)):
        for row in iter_file_prompts(source):
            if row.id in seen:
                continue
            seen.add(row.id)
            where = {"source": source.name, "licence": source.licence}
            yield Prompt(id=row.id, messages=row.messages, split=Split.TRAIN, **where, **row.wanted._asdict())


def _calls_for_tools(prompt: Prompt) -> bool:
    return bool(prompt.tools) or any(message.tool_calls for message in prompt.messages)


def _chosen(recipe: Recipe, pilot: int) -> list[Prompt]:
    """Prompts for the pilot, by a digest of what they say: a sample that does not hang on their order."""
    return heapq.nsmallest(
        pilot, _prompts(recipe), key=lambda p: hashlib.sha256(f"limbeck-pilot-1 {p.id}".encode()).digest()
    )


def _refuse_pilot(recipe: Recipe, pilot: int, there: int, path: Path | None) -> None:
    problems = []
    if all(teacher.kind in NO_ENDPOINT for teacher in recipe.teachers):
        remedy = "leave --pilot out: nothing is paid for the answers of this recipe's teachers"
        problem = Problem("--pilot", "no teacher behind an endpoint", "one that is paid for", remedy)
        raise InputError("no pilot can be made", [problem])
    written = any(isinstance(source, WrittenPrompts) for source in recipe.prompts)
    if there < 2 and not written:
        found, expected = f"{there} prompts in files and data sets", "at least 2: a pilot is drawn from them"
        problems.append(Problem("--pilot", found, expected, "leave --pilot out"))
    elif pilot < 2 or (pilot > there and not written):
        remedy = "give a number in between; 30 is a good start"
        problems.append(Problem("--pilot", str(pilot), f"2 to {there}, the number of different prompts", remedy))
    if path is None:
        expected = "a journal, so that its answers are not paid for again"
        problems.append(Problem("--pilot", "no place for answers", expected, "give --out RUN, or set collect.journal"))
    if problems:
        raise InputError("no pilot can be made", problems)


def _bounds(
    recipe: Recipe, teachers: Sequence[Endpoint], priced: dict[str, Prices | None], path: Path | None
) -> _Bounds:
    """The most that the requests can take; and how many of them are answered already."""
    prompt_tokens = completion_tokens = money = journaled = 0
    there = path is not None and path.exists()
    with Journal(path if there and path is not None else ":memory:") as journal:
        for prompt in _prompts(recipe):
            for teacher in teachers:
                requests = [teacher.request(prompt, sample) for sample in range(recipe.collect.samples)]
                bound, prices = teacher.bound(teacher.wire(requests[0])), priced[teacher.identity.name]
                prompt_tokens += bound.prompt * len(requests)
                completion_tokens += bound.completion * len(requests)
                money += prices.cost(*bound) * len(requests) if prices else 0
                journaled += len(requests) - len(journal.missing(request.key for request in requests)) if there else 0
    return _Bounds(prompt_tokens, completion_tokens, money, journaled)


def _pilot(
    recipe: Recipe, chosen: Sequence[Prompt], priced: dict[str, Prices | None], path: Path, progress: Progress
) -> dict[str, list[float]]:
    """Ask the prompts, and measure: by quantity, its sum over the requests of each prompt. Nobody waits a day for a
    pilot: it is asked request by request, by this process, also where the rest goes in batches or to workers.
    """
    shared = recipe.collect.model_copy(update={"journal": str(path), "unanswered": "stop", "batch": False, "ray": None})
    endpoints = tuple(teacher for teacher in recipe.teachers if teacher.kind not in NO_ENDPOINT)
    piloting = recipe.model_copy(update={"collect": shared, "teacher": endpoints})
    with tempfile.TemporaryDirectory() as place:
        run = RunDir(place, progress)
        write_records(run / "prompts.parquet", chosen, Prompt)
        collect(piloting, run, account=recipe.account)
        rows = list(read_records(run / "completions.parquet", Completion))
    sums = {prompt.id: dict.fromkeys(("prompt", "completion", "money", "seconds", "bytes"), 0.0) for prompt in chosen}
    with Journal(path) as journal:
        for row in rows:
            prices, took = priced[row.teacher], journal.took(row.request_id)
            own = sums[row.prompt_id]
            own["prompt"] += row.prompt_tokens
            own["completion"] += row.completion_tokens
            own["money"] += prices.cost(row.prompt_tokens, row.completion_tokens) if prices else 0
            own["seconds"] += took.seconds
            own["bytes"] += took.bytes
    return {
        name: [own[name] for own in sums.values()] for name in ("prompt", "completion", "money", "seconds", "bytes")
    }


def _figures(
    recipe: Recipe, prompts: int, written: int, bounds: _Bounds, measured: dict[str, list[float]], priced: bool
) -> Iterator[Figure]:
    """Of teachers behind endpoints. Where prompts are still to be written, nothing bounds what there is to read and to
    answer, nor how many candidates it takes until enough are kept: only the cap holds.
    """

    def figure(name: str, unit: str, key: str, scale: float, at_most: float | None) -> Figure:
        if key not in measured:
            return Figure(name, unit, None, None, None, at_most)
        sums_P = np.asarray(measured[key], np.float64) * scale * prompts
        found = ratio_interval(sums_P, np.ones(len(sums_P)), seed=derive_seed(recipe.seed, "estimate", key) >> 10)
        return Figure(name, unit, *found, at_most)

    yield figure("prompt tokens", "tokens", "prompt", 1, None if written else bounds.prompt_tokens)
    yield figure("answer tokens", "tokens", "completion", 1, None if written else bounds.completion_tokens)
    cap = recipe.collect.budget.money
    if priced:
        worst = None if written else bounds.money
        if cap is not None:
            worst = picodollars(cap) if worst is None else min(worst, picodollars(cap))
        yield figure("money", "US dollars", "money", dollars(1), None if worst is None else dollars(worst))
    endpoints = sum(teacher.kind not in NO_ENDPOINT for teacher in recipe.teachers)
    requests = prompts * endpoints * recipe.collect.samples
    if recipe.collect.batched is None:
        yield figure("time", "seconds", "seconds", 1 / max(1, min(recipe.collect.concurrency, requests)), None)
    yield figure("journal", "bytes", "bytes", 1, None)


def as_text(found: Estimate) -> str:
    """For a person at a terminal."""
    share = "all" if found.written == found.prompts else f"{found.written:,}"
    lines = [f"{found.prompts:,} prompts" + (f", {share} of them yet to be written" if found.written else "")]
    if found.here:
        lines.append(f"{found.here:,} answers of teachers that run here: nothing to pay, time as this machine takes")
    if not found.prices:
        return "\n".join(lines if found.here else [*lines, "no requests to endpoints: nothing to pay"])
    lines += [
        f"{found.requests:,} requests to endpoints, {found.journaled:,} answered already",
        *(f"prices of {name}: {_source(source)}" for name, source in found.prices.items()),
    ]
    width = max([14, *(len(one.name) for one in found.figures)])
    for one in found.figures:
        told = []
        if one.value is not None:
            told.append(_number(one, one.value))
        if one.low is not None and one.high is not None:
            told.append(f"({_number(one, one.low)} to {_number(one, one.high)})")
        if one.at_most is not None:
            told.append(f"at most {_number(one, one.at_most)}")
        lines.append(f"{one.name:<{width}} {' '.join(told) or _unknown(found)} {one.unit if told else ''}".rstrip())
    return "\n".join([*lines, *_remarks(found)])


def _source(source: str) -> str:
    return "unknown; give the teacher a price to have money counted" if source == "unknown" else source


def _unknown(found: Estimate) -> str:
    return "not known beforehand" if found.pilot or found.written == found.prompts else "not known without a pilot"


def _remarks(found: Estimate) -> Iterator[str]:
    """What has to be known to read the figures."""
    if found.journaled:
        yield "figures are of all requests; what is answered already is not paid for again"
    if found.written:
        yield "answers to prompts that are yet to be written are in none of the figures; a cap covers them"
    if found.batches:
        yield "in batches: a provider answers a batch within 24 hours; what it did not come to is asked again"
    if found.pilot:
        alone = "; they were asked alone, at full price" if found.batches else ""
        told = "whose answers lie in the journal; in brackets 95 % intervals"
        yield f"projected from {found.pilot} prompts, {told}{alone}"
    elif (there := found.prompts - found.written) >= 2:
        some = min(30, there)
        yield f"projected from nothing yet: --pilot {some} --out RUN asks {some} of the prompts"


def _number(figure: Figure, value: float) -> str:
    if figure.unit == "US dollars":
        return f"{value:,.4f}"
    return f"{value:,.1f}" if figure.unit == "seconds" and value < 100 else f"{value:,.0f}"
