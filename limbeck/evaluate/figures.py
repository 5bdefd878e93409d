"""From sums over examples to scores with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from limbeck.evaluate.compare import Sums
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.records import Score

Subject = Literal["student", "before", "teacher"]


class Row(NamedTuple):
    """One subject on one example."""

    prompt_id: str
    sums: Sums


class _Figure(NamedTuple):
    name: str
    unit: str
    of: Callable[[Sums], float]
    needs_teacher: bool
    shown: Callable[[float], float] = float
    """From the mean over tokens to the figure; rising, so an interval's ends may be taken through it."""


_FIGURES = (
    _Figure("agreement_top1", "share", lambda s: s.agree, needs_teacher=True),
    _Figure("kl_forward", "nats a token", lambda s: s.kl, needs_teacher=True),
    _Figure("perplexity_on_teacher", "perplexity", lambda s: s.nll, needs_teacher=False, shown=math.exp),
)


def scores_of(subject: Subject, rows: Sequence[Row], *, seed: int, no_teacher: str | None) -> list[Score]:
    """The three figures of one subject, weighted by tokens, with 95 % intervals over prompts.

    `no_teacher` says why some of the examples' teachers could not be asked; then what needs them is
    unscored. So is a figure that is not a finite number. With a single prompt there is a value and no
    interval.
    """
    scores = []
    for figure in _FIGURES:
        why = no_teacher if figure.needs_teacher or subject == "teacher" else None
        measured = _measure(figure, rows, seed) if why is None else why
        unscored = measured if isinstance(measured, str) else None
        value, low, high = (None, None, None) if isinstance(measured, str) else measured
        n = 0 if unscored else len({row.prompt_id for row in rows})
        scores.append(
            Score(
                name=figure.name,
                subject=subject,
                value=value,
                low=low,
                high=high,
                n=n,
                unit=figure.unit,
                seed=seed,
                unscored=unscored,
            )
        )
    return scores


def reading_interval(rows: Sequence[Row], seed: int) -> Interval:
    """Milliseconds a token to read prompts with their answers, one at a time, with its interval."""
    sums_P, counts_P = by_prompt(rows, lambda s: s.seconds, lambda s: s.tokens)
    return ratio_interval(1000 * sums_P, counts_P, seed=seed)


def by_prompt(
    rows: Sequence[Row], figure: Callable[[Sums], float], count: Callable[[Sums], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of a figure and of what it is divided by, over the examples of each prompt, float64 [P]."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt_id for row in rows))}
    sums_P, counts_P = np.zeros(len(place)), np.zeros(len(place))
    for row in rows:
        sums_P[place[row.prompt_id]] += figure(row.sums)
        counts_P[place[row.prompt_id]] += count(row.sums)
    return sums_P, counts_P


def _measure(figure: _Figure, rows: Sequence[Row], seed: int) -> Interval | str:
    """The figure, or why there is none."""
    if not rows:
        return "no answer to a held-out prompt was kept"
    sums_P, counts_P = by_prompt(rows, figure.of, lambda s: s.positions)
    if broken := int((~np.isfinite(sums_P)).sum()):
        return f"not a finite number on {broken} of {len(sums_P)} prompts: NaN or infinity in the logits"
    found = ratio_interval(sums_P, counts_P, seed=seed)
    try:
        return Interval(*(None if end is None else figure.shown(end) for end in found))  # type: ignore[arg-type]
    except OverflowError:
        return f"beyond the largest number: exp of {found.value:.6g} nats a token"
