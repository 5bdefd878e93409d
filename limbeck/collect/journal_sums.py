"""What a journal says of many requests, or of what one took."""

from __future__ import annotations

from typing import NamedTuple

NO_QUOTA = " (no quota)"
"""What the outcome of a request ends with where the money is gone; OpenAI's status is that of too many requests."""


class Outcomes(NamedTuple):
    """All requests of one account that ended alike."""

    requests: int
    cost: int
    """Picodollars."""


class Took(NamedTuple):
    """What an answer took."""

    seconds: float
    """From the moment its request was about to leave; 0 where that was not written down."""
    bytes: int
    """In the journal, packed."""
