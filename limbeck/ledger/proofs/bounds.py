"""How much can be misstated when so many drawn rows were found right.

Rows are drawn with replacement, each draw with probability proportional to its stated tokens: monetary-unit sampling of
audits (T. W. Anderson and R. Teitlebaum, Dollar-unit sampling, CA Magazine 1973, pp. 30-39). If a part m of the stated
tokens stands in rows that are wrong, each draw meets one with probability exactly m, whatever the sizes of rows, so the
number of wrong draws is binomial. The upper limit is Clopper and Pearson's (Biometrika 26, 1934, pp. 404-413): the m at
which so few wrong draws or fewer have probability 1 - confidence. With none wrong it is 1 - (1 - confidence)^(1/n).

Every teacher's share of the stated tokens differs from what it would be with the right labels by at most m.
"""

from __future__ import annotations

from math import comb

CONFIDENCE = 0.95


def upper_limit(draws: int, wrong: int = 0, confidence: float = CONFIDENCE) -> float:
    """The largest part of the tokens that can be misstated, at this confidence."""
    if not 0 <= wrong <= draws or draws < 1:
        raise ValueError(f"{wrong} wrong of {draws} draws")
    if wrong == draws:
        return 1.0
    if wrong == 0:
        return 1 - (1 - confidence) ** (1 / draws)
    low, high = wrong / draws, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(wrong, draws, middle) > 1 - confidence else (low, middle)
    return high


def at_most(wrong: int, draws: int, chance: float) -> float:
    """The probability of so many wrong draws or fewer."""
    return sum(comb(draws, k) * chance**k * (1 - chance) ** (draws - k) for k in range(wrong + 1))
