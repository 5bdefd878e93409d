"""Laws of scores and their intervals: t quantiles, the normal limit, coverage, and what is no score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluate.compare import Sums
from limbeck.evaluate.figures import Row, scores_of
from limbeck.evaluate.statistics import LEVEL, Interval, expanded_tail, ratio_interval, student_t
from limbeck.records import Score


def the(scores: list[Score], name: str) -> Score:
    return next(score for score in scores if score.name == name)


def bounds(found: Interval | Score) -> tuple[float, float, float]:
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.low, found.value, found.high


@pytest.mark.parametrize(
    ("degrees", "closed"),
    [
        (1, lambda p: math.tan(math.pi * (p - 0.5))),
        (2, lambda p: (2 * p - 1) / math.sqrt(2 * p * (1 - p))),
    ],
)
def test_t_quantiles_equal_their_closed_forms(degrees, closed):
    for p in (0.6, 0.9, 0.975, 0.999):
        assert student_t(p, degrees) == pytest.approx(closed(p), rel=1e-9)


@pytest.mark.parametrize("degrees", [3, 4, 9, 30, 31, 250])
def test_t_quantiles_bound_the_right_area_of_the_density(degrees):
    """Simpson's rule over the density from 0 to the quantile."""
    end, steps = student_t(0.975, degrees), 4000
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    x = np.linspace(0, end, steps + 1)
    y = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
    area = end / steps / 3 * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
    assert area == pytest.approx(0.475, abs=1e-9)


def test_the_expanded_tail_becomes_the_plain_one():
    assert expanded_tail(5) < expanded_tail(50) < 0.025
    assert expanded_tail(1_000_000) == pytest.approx(0.025, rel=1e-3)


def test_the_interval_of_many_prompts_is_the_normal_one_of_the_ratio():
    """Half width against 1.96 standard errors of the linearised ratio (Cochran, eq. 6.13)."""
    rng = np.random.default_rng(1)
    counts = rng.integers(20, 200, size=400).astype(float)
    sums = counts * rng.normal(1.5, 0.4, size=400)
    found = ratio_interval(sums, counts, seed=3)
    residuals = sums - found.value * counts
    error = math.sqrt((residuals**2).sum() / 399 / 400) / counts.mean()
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    low, _, high = bounds(found)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)


@pytest.mark.parametrize("prompts", [12, 32])
def test_intervals_cover_what_they_promise(prompts):
    """400 sets of prompts with a true mean of 1: 95 % of the intervals hold it, within the noise of 400
    trials."""
    rng, covered = np.random.default_rng(7), 0
    for trial in range(400):
        found = ratio_interval(rng.normal(1, 1, size=prompts), np.ones(prompts), seed=trial, resamples=500)
        low, _, high = bounds(found)
        covered += low <= 1 <= high
    assert abs(covered / 400 - LEVEL) < 3.3 * math.sqrt(LEVEL * (1 - LEVEL) / 400)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 500)), min_size=2, max_size=12),
    st.integers(0, 2**53 - 1),
)
def test_an_interval_holds_its_value_and_is_the_same_again(prompts, seed):
    sums, counts = (np.array(column, dtype=float) for column in zip(*prompts, strict=True))
    found = ratio_interval(sums, counts, seed=seed, resamples=200)
    low, value, high = bounds(found)
    assert low <= value <= high
    assert found == ratio_interval(sums, counts, seed=seed, resamples=200)


def test_resamples_drawn_in_pieces_are_those_drawn_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=50), np.ones(50)
    at_once = ratio_interval(sums, counts, seed=1)
    monkeypatch.setattr("limbeck.evaluate.statistics._CELLS", 50 * 7)
    assert ratio_interval(sums, counts, seed=1) == at_once


def test_nothing_to_average_is_an_error():
    for sums, counts in (([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="ratio_interval"):
            ratio_interval(np.array(sums), np.array(counts), seed=0)


def row(prompt: str, *, agree=1.0, kl=0.5, nll=2.0, positions=4) -> Row:
    return Row(prompt, Sums(agree, kl, nll, positions, 0.1, 9))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_a_score(bad):
    scores = scores_of("student", [row("a", kl=bad), row("b")], seed=0, no_teacher=None)
    kl = the(scores, "kl_forward")
    assert kl.value is None
    assert "1 of 2 prompts" in (kl.unscored or "")
    assert the(scores, "agreement_top1").value == 2 / 8


def test_a_perplexity_too_large_for_a_number_is_not_a_score():
    scores = scores_of("before", [row("a", nll=4000.0), row("b", nll=4000.0)], seed=0, no_teacher=None)
    assert "exp of 1000" in (the(scores, "perplexity_on_teacher").unscored or "")


def test_no_rows_is_unscored_never_zero():
    for score in scores_of("student", [], seed=0, no_teacher=None):
        assert score.value is None
        assert score.unscored


def test_a_perplexity_interval_is_the_exponential_of_the_interval_in_nats():
    rows = [row(str(i), nll=float(i)) for i in range(6)]
    score = the(scores_of("student", rows, seed=5, no_teacher=None), "perplexity_on_teacher")
    nats = ratio_interval(np.arange(6.0), np.full(6, 4.0), seed=5)
    assert bounds(score) == pytest.approx([math.exp(end) for end in bounds(nats)])
