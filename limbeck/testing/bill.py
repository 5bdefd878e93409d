"""The bill: what the server charged, request by request.

A request is billed when its answer has been made, whether or not the answer reaches anybody. That is what a
provider does, and what a collector must be checked against: billed = journaled + in flight when it was killed.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import NamedTuple

from pydantic import JsonValue

_MILLION = Decimal(1_000_000)


class Charge(NamedTuple):
    """One billed request, or one billed row of a batch."""

    time: float
    """Seconds since the epoch."""
    request_id: str
    """As in the answer's `x-request-id` or `request-id` header."""
    answer_id: str
    """The `id` in the answer's body."""
    idempotency_key: str | None
    digest: str
    """SHA-256 of the request body as JSON with sorted keys, in hexadecimal (`limbeck.testing.body_digest`)."""
    endpoint: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    """Reasoning included."""
    dollars: Decimal
    batch: str | None
    """Id of the batch that the row belongs to, and its `custom_id`."""
    custom_id: str | None

    def as_json(self) -> dict[str, JsonValue]:
        """As GET /bill gives it; dollars as text, so that no cent is rounded."""
        return {**self._asdict(), "dollars": str(self.dollars)}


class Bill:
    """All charges, and counts of what was received and answered.

    `requests`, `tokens` and `money` are totals of what was charged.
    """

    def __init__(self):
        self.charges: list[Charge] = []
        self.received = 0
        """Requests to answering endpoints, billed or not."""
        self.in_flight = 0
        """Requests received and not yet answered, refused or cut."""
        self.outcomes: Counter[str] = Counter()
        """How requests ended: by HTTP status, or `cut` (the connection was cut on purpose), `gone` (the client had
        left when the answer was ready), `replayed` (answered by its idempotency key)."""
        self.faults: Counter[str] = Counter()
        """Faults sent, by kind."""
        self.counts: Counter[str] = Counter()
        """By body digest, how often that body was billed."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.money = Decimal(0)
        """US dollars."""

    @property
    def requests(self) -> int:
        """Requests billed."""
        return len(self.charges)

    @property
    def tokens(self) -> int:
        """Tokens billed, prompt and completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def doubled(self) -> dict[str, int]:
        """Body digests that were billed more than once, and how often."""
        return {digest: count for digest, count in self.counts.items() if count > 1}

    def add(self, charge: Charge) -> None:
        """Charge it."""
        self.charges.append(charge)
        self.counts[charge.digest] += 1
        self.prompt_tokens += charge.prompt_tokens
        self.completion_tokens += charge.completion_tokens
        self.money += charge.dollars

    def as_json(self, since: int = 0) -> dict[str, JsonValue]:
        """Totals, and the charges from number `since` on."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "dollars": str(self.money),
            "received": self.received,
            "in_flight": self.in_flight,
            "outcomes": dict(self.outcomes),
            "faults": dict(self.faults),
            "doubled": dict(self.doubled),
            "charges": [charge.as_json() for charge in self.charges[since:]],
        }


def price(tokens: int, per_million: Decimal) -> Decimal:
    """US dollars for tokens, exactly."""
    return tokens * per_million / _MILLION
