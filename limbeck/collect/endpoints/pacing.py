"""How fast an endpoint is asked: at once as many as it bears, and no faster than it says or shows.

Four things hold a request back, and the strictest counts: the number under way, a rate learned from refusals (both
by additive increase and multiplicative decrease; Chiu and Jain, 1989), the rates of the recipe, and pauses the endpoint
asks for. Failures lower the number, refusals (429) the rate: a number alone cannot settle at a rate, since it swings by
the factor it is cut by. After failures without a success between them the circuit opens: nothing leaves but one request
now and then, until one succeeds.

Nothing here waits or sends; times are seconds of any clock that does not go backwards.
"""

from __future__ import annotations

import math
from collections import deque

_FIRST = 32
"""Requests under way at the start, before anything is known; doubled with each round of answers."""
_HALVED = 0.5
"""What failures leave of the number under way, once for all that left before it was known."""
_MEMORY, _TOO_OFTEN = 0.05, 0.12
"""Weight of the last request in the running share of failures, and the share from which on there are fewer: a
connection that breaks now and then says nothing about load."""

_WINDOW = 2.0
"""Seconds over which the accepted rate is measured."""
_BELOW = 0.97
"""Share of the accepted rate that is tried after a refusal."""
_CUT_EVERY = 0.3
"""Seconds between two lessons: refusals that come together are one."""
_GROWTH, _GROWTH_DOUBLES, _GROWTH_MOST = 0.005, 2.0, 0.5
"""Growth of the learned rate a second; the seconds after which it doubles while nothing is refused; and its most."""

_OPENS_AFTER = 10
"""Failures in a row that open the circuit."""
_PROBE_FIRST, _PROBE_MOST, _PROBES = 2.0, 60.0, 7
"""Seconds to the first probe, doubled each time up to the most, and probes after which the endpoint is given up."""
_FEW, _MOSTLY = 5, 0.8
"""A `Retry-After` holds for all requests, and not only for the one that got it, where of at least so many that left at
the learned rate more than this share was refused."""


class Bucket:
    """So many units a minute, never more in any minute; up to `burst` of them at once."""

    def __init__(self, a_minute: float, burst: float):
        self._burst = min(burst, a_minute / 2)
        self._rate = (a_minute - self._burst) / 60
        self._level, self._at = self._burst, -math.inf

    def wait(self, now: float, amount: float) -> float:
        """Seconds until so many units are there. More than a bucket holds pass when it is full."""
        lacking = min(amount, self._burst) - self._filled(now)
        return max(0.0, lacking / self._rate)

    def take(self, now: float, amount: float) -> None:
        """Use them up; what is given back later was not needed."""
        self._level, self._at = self._filled(now) - amount, now

    def give(self, amount: float) -> None:
        """Give back what was taken and not used."""
        self._level = min(self._burst, self._level + amount)

    def _filled(self, now: float) -> float:
        return self._burst if self._at == -math.inf else min(self._burst, self._level + (now - self._at) * self._rate)


class LearnedRate:
    """The rate that an endpoint accepts, learned from what it refuses. No bound until it refuses something.

    What was accepted in the last seconds is what it allows; a little less is tried then, growing slowly at first, so
    that a rate that was found is not passed at once, and ever faster as long as nothing is refused.
    """

    def __init__(self):
        self._rate = math.inf
        self._grown = self._cut = -math.inf
        self._next = 0.0
        self._sent: deque[float] = deque()
        self._refused: deque[float] = deque()
        self._idle = 0.0
        self._idle_until = -math.inf
        self._began = math.inf
        self._sent_since = self._refused_since = 0

    def wait(self, now: float) -> float:
        """Seconds until one more may leave."""
        return max(0.0, self._next - now)

    def left(self, now: float) -> None:
        """One leaves."""
        self._began = min(self._began, now)
        at = self._active(now)
        self._sent.append(at)
        while self._sent[0] < at - _WINDOW:  # an endpoint that refuses nothing would have all of them kept
            self._sent.popleft()
        self._sent_since += 1
        rate = self.rate(now)
        if rate < math.inf:
            # Small debts of a late timer are caught up with, larger ones are not: that would be a burst.
            self._next = max(self._next, now - max(0.01, 1 / rate)) + 1 / rate

    def rate(self, now: float) -> float:
        """Requests a second that are allowed now."""
        if self._rate < math.inf:
            quiet = now - self._cut
            growth = min(_GROWTH * 2 ** (quiet / _GROWTH_DOUBLES), _GROWTH_MOST)
            self._rate *= (1 + growth) ** max(0.0, now - max(self._grown, self._idle_until))
            self._grown = now
        return self._rate

    def refused(self, now: float, started: float) -> bool:
        """One that left at `started` was refused. True where, since the last lesson, most were, although they left at
        the rate that was learned from it: then waiting is all that helps.
        """
        at = self._active(now)
        self._refused.append(at)
        if started < self._cut:
            return False
        self._refused_since += 1
        if now - self._cut < _CUT_EVERY:
            return False
        hopeless = self._sent_since >= _FEW and self._refused_since > _MOSTLY * self._sent_since
        for times in (self._sent, self._refused):
            while times and times[0] < at - _WINDOW:
                times.popleft()
        span = min(_WINDOW, max(0.02, at - self._began))
        accepted = max(1, len(self._sent) - len(self._refused)) / span
        self._rate = min(self.rate(now), _BELOW * accepted)
        self._cut = self._grown = now
        self._sent_since = self._refused_since = 0
        return hopeless

    def told(self, now: float, rate: float) -> None:
        """The endpoint says that no more than this flows back."""
        if rate < self.rate(now):
            self._rate, self._cut, self._grown = rate, now, now

    def paused(self, now: float, until: float) -> None:
        """Nothing leaves until then; that time says nothing about what is accepted."""
        self._idle += max(0.0, until - max(now, self._idle_until))
        self._idle_until = max(self._idle_until, until)

    def _active(self, now: float) -> float:
        return now - self._idle + max(0.0, self._idle_until - now)


class Pacer:
    """Says when the next request may leave, and learns from what became of the others."""

    def __init__(self, ceiling: int, requests_per_minute: int | None = None, tokens_per_minute: int | None = None):
        self._ceiling = ceiling
        self.limit = float(min(ceiling, _FIRST))
        """Requests that may be under way; grows in fractions."""
        self.active = 0
        self.given_up = False
        """The circuit was open for too long."""
        self._congested = False
        self._failing = 0.0
        self._cut = -math.inf
        self._requests = (
            Bucket(requests_per_minute, max(1, requests_per_minute / 3000)) if requests_per_minute else None
        )
        self._tokens = Bucket(tokens_per_minute, tokens_per_minute / 20) if tokens_per_minute else None
        self._learned = LearnedRate()
        self._not_before = -math.inf
        self._failed_in_a_row = self._probes = 0
        self._probed = -math.inf

    @property
    def open(self) -> bool:
        """Whether the circuit is open: the endpoint fails, and is only probed."""
        return self._failed_in_a_row >= _OPENS_AFTER

    def wait(self, now: float, tokens: int) -> float:
        """Seconds until a request of so many tokens may leave; infinite where another must end first."""
        if self.active >= (1 if self.open else max(1, int(self.limit))):
            return math.inf
        waits = [self._not_before - now, self._learned.wait(now)]
        if self._requests:
            waits.append(self._requests.wait(now, 1))
        if self._tokens:
            waits.append(self._tokens.wait(now, tokens))
        return max(0.0, *waits)

    def left(self, now: float, tokens: int) -> None:
        """A request of so many tokens leaves."""
        self.active += 1
        self._learned.left(now)
        if self._requests:
            self._requests.take(now, 1)
        if self._tokens:
            self._tokens.take(now, tokens)

    def succeeded(self, unused_tokens: int = 0) -> None:
        """A request was answered; so many of its tokens were not used."""
        self.active -= 1
        self._failing *= 1 - _MEMORY
        self._failed_in_a_row = self._probes = 0
        self._probed = -math.inf
        # Doubles with each round of answers at first; later one more each round, or a twentieth of what there is.
        self.limit += max(1.0, 0.05 * self.limit) / self.limit if self._congested else 1.0
        self.limit = min(self.limit, float(self._ceiling))
        if self._tokens:
            self._tokens.give(unused_tokens)

    def refused(self, now: float, started: float, wait: float | None) -> None:
        """A request was refused because there were too many (429); `wait` is what the endpoint says to wait."""
        self.active -= 1
        if self._learned.refused(now, started) and wait:
            self.pause(now, wait)

    def failed(self, now: float, started: float, wait: float | None = None) -> None:
        """A request failed: no connection, no answer in time, or a 5xx."""
        self._failing += _MEMORY * (1 - self._failing)
        if self._failing > _TOO_OFTEN and started >= self._cut:
            self.limit, self._cut, self._congested = max(1.0, self.limit * _HALVED), now, True
        self.active -= 1
        self._failed_in_a_row += 1
        if wait and self._failing > _TOO_OFTEN:
            self.pause(now, wait)
        if self.open and started >= self._probed:  # others left before the circuit opened, and are no probes
            self.given_up = self._probes >= _PROBES
            self.pause(now, min(_PROBE_FIRST * 2**self._probes, _PROBE_MOST))
            self._probes, self._probed = self._probes + 1, now

    def told(self, now: float, a_second: float) -> None:
        """The endpoint says how many requests flow back into a quota that is nearly used up."""
        self._learned.told(now, a_second)

    def cancelled(self) -> None:
        """A request ended without telling anything about the endpoint."""
        self.active -= 1

    def pause(self, now: float, seconds: float) -> None:
        """Nothing leaves for so long."""
        if seconds > 0 and now + seconds > self._not_before:
            self._learned.paused(now, now + seconds)
            self._not_before = now + seconds

    def paused_for(self, now: float) -> float:
        """Seconds that are left of a pause."""
        return max(0.0, self._not_before - now)
