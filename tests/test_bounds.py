"""The bound of a spot-check: against exact binomial sums, and by simulation with rows of very different sizes."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import accumulate
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.ledger.proofs.bounds import upper_limit
from limbeck.ledger.proofs.spot_check import picks


def exact(wrong: int, draws: int, chance: Fraction) -> Fraction:
    return sum(comb(draws, k) * chance**k * (1 - chance) ** (draws - k) for k in range(wrong + 1))


@settings(max_examples=50, deadline=None)
@given(draws=st.integers(1, 80), data=st.data())
def test_the_limit_is_clopper_and_pearsons(draws, data):
    """At the limit, so few wrong draws or fewer have probability 5 %, by exact arithmetic."""
    wrong = data.draw(st.integers(0, draws - 1))
    limit = Fraction(upper_limit(draws, wrong)).limit_denominator(10**9)
    assert float(exact(wrong, draws, limit)) == pytest.approx(0.05, rel=1e-4)


def test_limits_are_those_of_the_tables():
    """No failure among n, 95 %: 3/n by the rule of three; 60, 300 and 3,000 give 4.9, 1.0 and 0.1 %."""
    assert [round(100 * upper_limit(n), 1) for n in (60, 300, 3000)] == [4.9, 1.0, 0.1]
    assert upper_limit(5, 5) == 1
    for bad in ((0, 0), (5, 6), (5, -1)):
        with pytest.raises(ValueError, match="draws"):
            upper_limit(*bad)


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, 50), min_size=1, max_size=30), seed=st.text(max_size=5))
def test_a_row_without_tokens_is_never_picked_and_the_picks_are_the_seeds(tokens, seed):
    running = list(accumulate(tokens))
    if not running[-1]:
        return
    found = picks(b"r" * 32, seed, 40, running)
    assert all(tokens[row] for row in found)
    assert found == picks(b"r" * 32, seed, 60, running)[:40]
    if len(set(tokens)) > 5:
        assert found != picks(b"s" * 32, seed, 40, running)


def test_rows_are_picked_in_proportion_to_their_tokens():
    """A chi-square test: 20 rows, 20,000 draws; 43.8 is exceeded with probability 0.1 % at 19 degrees of freedom."""
    tokens = [1 + 7 * i for i in range(20)]
    running, draws = list(accumulate(tokens)), 20_000
    found = picks(b"r" * 32, "seed", draws, running)
    due = [draws * t / running[-1] for t in tokens]
    assert sum((found.count(i) - d) ** 2 / d for i, d in enumerate(due)) < 43.8


@pytest.mark.parametrize("liar", ["few long rows", "many short rows"])
def test_more_than_the_bound_is_seldom_missed(liar):
    """An owner mislabels rows until just more than the bound of 60 draws is misstated. However the rows are chosen, a
    spot-check misses it in 5 % of seeds at most: 2,000 seeds, with three standard errors of room.
    """
    rng = random.Random(0)
    tokens = [rng.choice((3, 30, 300)) for _ in range(400)]
    order = sorted(range(400), key=lambda i: tokens[i] * (-1 if liar == "few long rows" else 1))
    wrong, misstated = set(), 0
    while misstated <= upper_limit(60) * sum(tokens):
        wrong.add(order[len(wrong)])
        misstated = sum(tokens[i] for i in wrong)
    running = list(accumulate(tokens))
    missed = sum(not wrong & set(picks(b"r" * 32, str(seed), 60, running)) for seed in range(2000))
    assert missed / 2000 < 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5
    if liar == "many short rows":  # sizes are small, so the bound is all but reached: it is no looser than it says
        assert missed / 2000 > 0.05 - 4 * (0.05 * 0.95 / 2000) ** 0.5
