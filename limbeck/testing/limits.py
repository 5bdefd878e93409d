"""Rate limits as token buckets, and the headers that say what is left of them.

Header names and forms as OpenAI (`x-ratelimit-remaining-requests`, resets as durations such as `1s`, `6m0s`) and
Anthropic (`anthropic-ratelimit-requests-remaining`, resets as RFC 3339 times; requests, tokens, input-tokens,
output-tokens) publish them. OpenAI has no headers for input and output tokens apart.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from math import ceil

from limbeck.testing.errors import Provider, Refused
from limbeck.testing.faults import Limit


class Bucket:
    """A token bucket: holds up to `capacity`, fills by `rate` a second. Starts full."""

    def __init__(self, per_minute: float, burst: float, now: float):
        self.rate = per_minute / 60
        self.per_minute = per_minute
        self.capacity = max(1.0, self.rate * burst)
        self.level, self._at = self.capacity, now

    def fill(self, now: float) -> None:
        """Let in what flowed since the last time."""
        self.level = min(self.capacity, self.level + (now - self._at) * self.rate)
        self._at = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` can be taken (more than the bucket holds waits for a full one)."""
        return max(0.0, (min(amount, self.capacity) - self.level) / self.rate)

    def change(self, per_minute: float, burst: float, now: float) -> None:
        """Another rate from now on; what is in the bucket stays, as far as it fits."""
        self.fill(now)
        self.rate, self.per_minute = per_minute / 60, per_minute
        self.capacity = max(1.0, self.rate * burst)
        self.level = min(self.level, self.capacity)


class Limits:
    """The limits of a schedule, as they stand at each moment. `now` is in seconds since the server started."""

    def __init__(self, limits: tuple[Limit, ...]):
        self._coming = sorted(limits, key=lambda limit: limit.after)
        self._limit: Limit | None = None
        self._buckets: dict[str, Bucket] = {}

    def set(self, limit: Limit, now: float) -> None:
        """Change the limits at once."""
        self._limit = limit
        wanted = {
            "requests": limit.requests_per_minute,
            "tokens": limit.tokens_per_minute,
            "input-tokens": limit.input_tokens_per_minute,
            "output-tokens": limit.output_tokens_per_minute,
        }
        self._buckets = {
            kind: _changed(self._buckets.get(kind), per_minute, limit.burst, now)
            for kind, per_minute in wanted.items()
            if per_minute is not None
        }

    def admit(self, prompt_tokens: int, answer_tokens: int, now: float) -> None:
        """Take a request and its tokens, or raise `Refused` (429)."""
        while self._coming and self._coming[0].after <= now:
            self.set(self._coming.pop(0), now)
        if self._limit is None:
            return
        wanted = {
            "requests": 1,
            "tokens": prompt_tokens + answer_tokens,
            "input-tokens": prompt_tokens,
            "output-tokens": answer_tokens,
        }
        wait, kind = 0.0, ""
        for name, bucket in self._buckets.items():
            bucket.fill(now)
            if (needed := bucket.wait(wanted[name])) > wait:
                wait, kind = needed, name
        if wait <= 1e-9:  # what rounding leaves; who waited as told is let in
            for name, bucket in self._buckets.items():
                bucket.level -= wanted[name]
            return
        if self._limit.count_refused and "requests" in self._buckets:
            self._buckets["requests"].level -= 1
        message = f"Rate limit reached on {kind.replace('-', ' ')} per min. Please try again in {wait:.3f}s."
        raise Refused(kind, message, headers=retry_headers(self._limit.retry_after, wait))

    def headers(self, provider: Provider) -> dict[str, str]:
        """What is left, for an answer's headers."""
        if self._limit is None or not self._limit.headers:
            return {}
        found = {}
        for kind, bucket in self._buckets.items():
            full = (bucket.capacity - bucket.level) / bucket.rate
            left = str(max(0, int(bucket.level)))
            if provider == "anthropic":
                reset = (datetime.now(UTC) + timedelta(seconds=full)).strftime("%Y-%m-%dT%H:%M:%SZ")
                name = f"anthropic-ratelimit-{kind}-"
                found |= {name + "limit": str(int(bucket.per_minute)), name + "remaining": left, name + "reset": reset}
            elif kind in ("requests", "tokens"):
                found[f"x-ratelimit-limit-{kind}"] = str(int(bucket.per_minute))
                found[f"x-ratelimit-remaining-{kind}"] = left
                found[f"x-ratelimit-reset-{kind}"] = _duration(full)
        return found


def _changed(bucket: Bucket | None, per_minute: float, burst: float, now: float) -> Bucket:
    if bucket is None:
        return Bucket(per_minute, burst, now)
    bucket.change(per_minute, burst, now)
    return bucket


def retry_headers(form: str, seconds: float) -> dict[str, str]:
    """The header that says when to try again, in one of its forms: whole seconds and HTTP dates are rounded up."""
    if form == "seconds":
        return {"retry-after": str(ceil(seconds))}
    if form == "date":
        return {"retry-after": formatdate(ceil(time.time() + seconds), usegmt=True)}
    return {"retry-after-ms": str(ceil(seconds * 1000))} if form == "ms" else {}


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{round(seconds, 3):g}s"
    return f"{int(seconds // 60)}m{seconds % 60:.0f}s"
