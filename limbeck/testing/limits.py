"""Rate limits as token buckets, and the headers that say what is left of them.

Header names and forms as OpenAI (`x-ratelimit-remaining-requests`, resets as durations such as `1s`, `6m0s`) and
Anthropic (`anthropic-ratelimit-requests-remaining`, resets as RFC 3339 times) publish them. Anthropic's separate
buckets for input and output tokens are not modelled; its `tokens` headers stand for both.
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
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def set(self, limit: Limit, now: float) -> None:
        """Change the limits at once."""
        self._limit = limit
        self._requests = _changed(self._requests, limit.requests_per_minute, limit.burst, now)
        self._tokens = _changed(self._tokens, limit.tokens_per_minute, limit.burst, now)

    def admit(self, tokens: int, now: float) -> None:
        """Take a request and its tokens, or raise `Refused` (429)."""
        while self._coming and self._coming[0].after <= now:
            self.set(self._coming.pop(0), now)
        if self._limit is None:
            return
        wanted = [(self._requests, 1.0, "requests"), (self._tokens, float(tokens), "tokens")]
        there = [(bucket, amount, kind) for bucket, amount, kind in wanted if bucket is not None]
        waits = []
        for bucket, amount, kind in there:
            bucket.fill(now)
            waits.append((bucket.wait(amount), kind))
        longest = max(waits, default=(0.0, ""))
        if longest[0] <= 1e-9:  # what rounding leaves; who waited as told is let in
            for bucket, amount, _ in there:
                bucket.level -= amount
            return
        if self._limit.count_refused and self._requests is not None:
            self._requests.level -= 1
        message = f"Rate limit reached on {longest[1]} per min. Please try again in {longest[0]:.3f}s."
        raise Refused(longest[1], message, headers=retry_headers(self._limit.retry_after, longest[0]))

    def headers(self, provider: Provider) -> dict[str, str]:
        """What is left, for an answer's headers."""
        if self._limit is None or not self._limit.headers:
            return {}
        found = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is None:
                continue
            full = (bucket.capacity - bucket.level) / bucket.rate
            if provider == "anthropic":
                reset = (datetime.now(UTC) + timedelta(seconds=full)).strftime("%Y-%m-%dT%H:%M:%SZ")
                name = f"anthropic-ratelimit-{kind}-"
                found |= {name + "limit": str(int(bucket.per_minute)), name + "reset": reset,
                          name + "remaining": str(max(0, int(bucket.level)))}  # fmt: skip
            else:
                found |= {f"x-ratelimit-limit-{kind}": str(int(bucket.per_minute)),
                          f"x-ratelimit-remaining-{kind}": str(max(0, int(bucket.level))),
                          f"x-ratelimit-reset-{kind}": _duration(full)}  # fmt: skip
        return found


def _changed(bucket: Bucket | None, per_minute: float | None, burst: float, now: float) -> Bucket | None:
    if per_minute is None:
        return None
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
