"""When an endpoint says to come back, and how fast its quotas fill: `Retry-After`, and what is left.

Seconds, fractions of them, HTTP dates (RFC 9110, section 10.2.3), `retry-after-ms`, durations such as `6m0s` or
`120ms` (OpenAI) and RFC 3339 times (Anthropic).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|h|m|s|d)")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

_QUOTAS = tuple(
    (
        kind,
        *((f"{name}-{word}-{kind}" if openai else f"{name}-{kind}-{word}") for word in ("remaining", "limit", "reset")),
    )
    for name, openai, kinds in (
        ("x-ratelimit", True, ("requests", "tokens")),
        ("anthropic-ratelimit", False, ("requests", "tokens", "input-tokens", "output-tokens")),
    )
    for kind in kinds
)
"""What is counted, and the headers that say how much is left, of how much, and when it is full again."""

_LOW = 0.1
"""Share of a quota that is left when it begins to be minded."""


class Quota(NamedTuple):
    """A quota that is nearly used up."""

    counts: Literal["requests", "tokens"]
    rate: float
    """A second: what flows back."""


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds to wait before the same request is sent again; None where nothing legible is said."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    return _seconds(headers.get("retry-after"), now)


def low_quotas(headers: Mapping[str, str], now: datetime | None = None) -> list[Quota]:
    """The quotas of which little is left, with the rate at which they fill: `reset` says when they are full again."""
    found = []
    for kind, left, most, full in _QUOTAS:
        if (said := headers.get(left)) is None:
            continue
        remaining, limit = _number(said), _number(headers.get(most))
        if limit and remaining is not None and remaining <= _LOW * limit:
            reset = _seconds(headers.get(full), now)
            if reset:
                found.append(Quota("requests" if kind == "requests" else "tokens", (limit - remaining) / reset))
    return found


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < 1e9 else None


def _seconds(value: str | None, now: datetime | None) -> float | None:
    """A number of seconds, a duration, or a time, whichever it is."""
    if value is None:
        return None
    value = value.strip()
    if (number := _number(value)) is not None:
        return number
    parts = _DURATION.findall(value)
    if parts and "".join(n + unit for n, unit in parts) == value:
        return sum(float(n) * _SECONDS[unit] for n, unit in parts)
    at = _time(value)
    return None if at is None else max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


def _time(value: str) -> datetime | None:
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            at = read(value)
        except ValueError:
            continue
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    return None
