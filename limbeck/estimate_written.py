"""What having prompts written will take: the most, and with a pilot what is to be expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from limbeck.collect.completing import behind_endpoint
from limbeck.collect.endpoints.prices import Prices, dollars
from limbeck.collect.teachers import make_teacher
from limbeck.collect.written.pilot import Most, Tried, most, try_out
from limbeck.evaluate.statistics import LEVEL, RESAMPLES, expanded_tail
from limbeck.progress import Progress
from limbeck.recipe import NO_ENDPOINT, Recipe
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.seeds import derive_seed


class Figure(NamedTuple):
    """One thing that collecting, or having prompts written, takes for all requests of the recipe."""

    name: str
    unit: str
    value: float | None
    """Figure from the pilot; None without one."""
    low: float | None
    high: float | None
    """The 95 % interval over prompts."""
    at_most: float | None
    """What it cannot exceed; None where nothing bounds it."""


def written_figures(
    recipe: Recipe, priced: dict[str, Prices | None], *, pilot: int, journal: Path | None, progress: Progress | None
) -> Iterator[Figure]:
    """Requests, tokens and money of every source that a teacher behind an endpoint writes. A pilot sends the first
    requests of each, as many as of the prompts of files; where prompts are asked for in batches it sends none.

    Raises `RefusedError` and `EndpointError` where a pilot came upon the cap, or upon an endpoint that does not answer.
    """
    for source in recipe.prompts:
        if not isinstance(source, WrittenPrompts):
            continue
        (settings,) = [t for t in recipe.teachers if t.name == (source.by or recipe.teachers[0].name)]
        if settings.kind in NO_ENDPOINT:  # what it would load is not needed here
            continue
        told = {"max_tokens": source.max_tokens, "temperature": source.temperature, "top_p": source.top_p}
        teacher = make_teacher(settings, recipe.collect.model_copy(update=told), recipe.seed)
        if not behind_endpoint(teacher):
            continue
        tried = []
        if pilot and journal is not None and recipe.collect.batched is None:
            alone = recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"ray": None})})
            tried = try_out(alone, source, pilot, journal, progress or Progress.silent())
        yield from _figures(source, most(recipe, source, teacher), tried, priced[settings.name], recipe)


def _figures(
    source: WrittenPrompts, bound: Most, tried: Sequence[Tried], prices: Prices | None, recipe: Recipe
) -> Iterator[Figure]:
    seed, cap = recipe.seed, recipe.collect.budget.money

    def figure(name: str, unit: str, of: Callable[[Tried], float], at_most: float | None) -> Figure:
        took_P = np.asarray([of(one) for one in tried], np.float64)
        kept_P = np.asarray([one.kept for one in tried], np.float64)
        if not kept_P.sum():  # nothing can be said of what was never kept
            return Figure(f"{source.kind}: {name}", unit, None, None, None, at_most)
        top = np.inf if at_most is None else at_most
        found = np.minimum(_interval(took_P * source.count, kept_P, derive_seed(seed, "estimate", name) >> 10), top)
        value, low, high = (None if np.isinf(one) else float(one) for one in found)
        return Figure(f"{source.kind}: {name}", unit, value, low, high, at_most)

    yield figure("requests", "requests", lambda one: one.spent.requests, bound.requests)
    yield figure("prompt tokens", "tokens", lambda one: one.spent.prompt, bound.prompt)
    yield figure("answer tokens", "tokens", lambda one: one.spent.completion, bound.completion)
    if prices is not None:
        worst = None if bound.prompt is None else dollars(prices.cost(bound.prompt, bound.completion))
        whole = min((one for one in (worst, cap) if one is not None), default=None)
        yield figure(
            "money", "US dollars", lambda one: dollars(prices.cost(one.spent.prompt, one.spent.completion)), whole
        )


def _interval(took_P: NDArray[np.float64], kept_P: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`sum(took_P) / sum(kept_P)` with its bounds, by drawing requests anew; infinite where nothing was kept of those
    drawn.
    """
    value = took_P.sum() / kept_P.sum()
    drawn = np.random.default_rng(seed).integers(0, len(took_P), size=(RESAMPLES, len(took_P)))
    took, kept = took_P[drawn].sum(axis=1), kept_P[drawn].sum(axis=1)
    ratios = np.divide(took, kept, out=np.full(len(took), np.inf), where=kept > 0)
    tail = expanded_tail(len(took_P), LEVEL)
    low, high = np.quantile(ratios, [tail, 1 - tail], method="nearest")
    return np.asarray([value, min(low, value), max(high, value)])
