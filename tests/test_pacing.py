"""Pacing against a server that is simulated: no clock, no network, thousands of virtual seconds in one."""

from __future__ import annotations

import heapq
import math
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.collect.endpoints.pacing import Bucket, Pacer

Limiter = Callable[[float], float | None]
"""At a time: None to accept a request, or the seconds after which to come back."""


def token_bucket(rate: Callable[[float], float], burst: float, *, whole_seconds: bool = False) -> Limiter:
    level, last = burst, 0.0

    def limiter(now: float) -> float | None:
        nonlocal level, last
        level, last = min(burst, level + (now - last) * rate(now)), now
        if level >= 1:
            level -= 1
            return None
        wait = (1 - level) / rate(now)
        return math.ceil(wait) if whole_seconds else wait

    return limiter


def window(rate: Callable[[float], float], length: float) -> Limiter:
    """So many in every stretch of `length` seconds."""
    seen: Counter[int] = Counter()

    def limiter(now: float) -> float | None:
        number = int(now / length)
        if seen[number] < rate(now) * length:
            seen[number] += 1
            return None
        return (number + 1) * length - now

    return limiter


def simulate(
    pacer: Pacer, limiter: Limiter, seconds: float, *, latency: float = 0.05, told: bool = True
) -> list[float]:
    """Ask as fast as the pacer lets us; the times at which requests were accepted."""
    stream, accepted = random.Random(3), []
    now, number = 0.0, 0
    events: list[tuple[float, int, float, bool, float | None]] = []
    while now < seconds:
        wait = pacer.wait(now, 1)
        if wait == 0:
            pacer.left(now, 1)
            refusal = limiter(now)
            took = 0.005 if refusal is not None else latency * stream.uniform(0.8, 1.2)
            if refusal is None:
                accepted.append(now)
            number += 1
            heapq.heappush(events, (now + took, number, now, refusal is None, refusal))
            continue
        if events and events[0][0] <= now + wait:
            now, _, started, good, refusal = heapq.heappop(events)
            if good:
                pacer.succeeded()
            else:
                pacer.refused(now, started, refusal if told else None)
        else:
            now += max(wait, 1e-4)  # as coarse as a timer
    return accepted


def halved_twice(now: float) -> float:
    return 400.0 if now < 30 else 200.0 if now < 60 else 100.0


LIMITERS = {
    "a bucket": lambda: token_bucket(halved_twice, 20),
    "a bucket with whole seconds": lambda: token_bucket(halved_twice, 20, whole_seconds=True),
    "a large bucket": lambda: token_bucket(halved_twice, 400),
    "windows of a second": lambda: window(halved_twice, 1.0),
    "windows of a tenth": lambda: window(halved_twice, 0.1),
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("latency", [0.05, 2.0])
@pytest.mark.parametrize("name", LIMITERS)
def test_under_a_rate_that_halves_twice_it_settles_within_a_tenth(name: str, latency: float, told: bool):
    accepted = simulate(Pacer(1000), LIMITERS[name](), 90, latency=latency, told=told)
    for start, rate in ((25, 400), (50, 200), (80, 100)):
        found = sum(start <= at < start + 5 for at in accepted) / 5
        assert found == pytest.approx(rate, rel=0.1), f"from second {start} on"


def test_it_comes_back_when_the_storm_is_over():
    def storm(now: float) -> float:
        return 50.0 if 5 < now < 15 else 400.0

    accepted = simulate(Pacer(200), token_bucket(storm, 20), 80)
    assert sum(60 <= at < 80 for at in accepted) / 20 == pytest.approx(400, rel=0.1)


def test_without_a_limit_it_reaches_its_ceiling():
    pacer = Pacer(500)
    accepted = simulate(pacer, lambda _: None, 3)
    assert pacer.limit == 500
    assert sum(at >= 1 for at in accepted) / 2 == pytest.approx(500 / 0.05, rel=0.1)


@given(st.integers(1, 600), st.floats(0.5, 400), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_requests_a_minute_are_never_passed(a_minute: int, burst: float, seed: int):
    bucket, stream, now, sent = Bucket(a_minute, burst), random.Random(seed), 0.0, deque[float]()
    while now < 150:
        if bucket.wait(now, 1) == 0:
            bucket.take(now, 1)
            sent.append(now)
            while sent[0] <= now - 60:
                sent.popleft()
            assert len(sent) <= max(1, a_minute)
        else:
            now += max(bucket.wait(now, 1), 1e-3)
        if stream.random() < 0.01:
            now += stream.uniform(0, 20)


def test_tokens_a_minute_are_never_passed_and_nearly_reached():
    pacer, now, used = Pacer(50, tokens_per_minute=60_000), 0.0, 0
    while now < 60:
        wait = pacer.wait(now, 500)
        if wait == 0:
            pacer.left(now, 500)
            pacer.succeeded(200)  # 300 of 500 were used
            used += 300
        else:
            now += max(wait, 1e-3)
    assert 0.9 * 60_000 < used <= 60_000


def test_a_request_larger_than_the_bucket_is_not_stuck():
    pacer = Pacer(5, tokens_per_minute=1000)
    assert pacer.wait(0.0, 10**6) == 0
    pacer.left(0.0, 10**6)
    pacer.succeeded(10**6)
    assert pacer.wait(60.0, 10**6) == 0


def test_the_circuit_opens_probes_and_closes():
    pacer, now = Pacer(50), 0.0
    for _ in range(30):
        pacer.left(now, 1)
    now += 0.1
    for _ in range(30):  # those that left together are not counted as probes
        pacer.failed(now, now - 0.1)
    assert pacer.open
    assert pacer.wait(now, 1) == pytest.approx(2.0)
    now += 2.0
    pacer.left(now, 1)
    assert pacer.wait(now, 1) == math.inf  # one probe at a time
    pacer.failed(now, now)
    assert pacer.wait(now, 1) == pytest.approx(4.0)
    now += 4.0
    pacer.left(now, 1)
    pacer.succeeded()
    assert not pacer.open
    assert pacer.wait(now, 1) == 0


def test_an_endpoint_that_stays_away_is_given_up():
    pacer, now = Pacer(50), 0.0
    while not pacer.given_up:
        now += pacer.wait(now, 1)
        pacer.left(now, 1)
        pacer.failed(now, now)
        assert now < 600
    assert now > 60


def test_one_failure_among_successes_opens_nothing():
    pacer = Pacer(50)
    for _ in range(100):
        pacer.left(0.0, 1)
        pacer.failed(0.0, 0.0)
        pacer.left(0.0, 1)
        pacer.succeeded()
    assert not pacer.open
    assert not pacer.given_up


def test_failures_that_left_together_halve_once():
    pacer = Pacer(64)
    pacer.limit = 64.0
    for _ in range(20):
        pacer.left(1.0, 1)
    for _ in range(9):
        pacer.failed(2.0, 1.0)
    assert pacer.limit == 32.0


def test_failures_now_and_then_do_not_slow_it_down_and_many_do():
    limits = {}
    for every in (50, 4):
        pacer = Pacer(100)
        for number in range(2000):
            pacer.left(number, 1)
            if number % every:
                pacer.succeeded()
            else:
                pacer.failed(number, number)
        limits[every] = pacer.limit
    assert limits[50] == 100
    assert limits[4] < 20


def test_it_minds_what_flows_back_into_a_quota():
    pacer = Pacer(100)
    pacer.told(0.0, 50.0)
    accepted = simulate(pacer, lambda _: None, 1.0)
    assert 45 <= len(accepted) <= 60


def test_what_is_remembered_does_not_grow_with_the_number_of_requests():
    pacer = Pacer(100)

    def ask(first: int, last: int) -> None:
        for n in range(first, last):
            pacer.left(n / 1000, 1)
            pacer.succeeded()

    ask(0, 5_000)
    tracemalloc.start()
    try:
        ask(5_000, 10_000)
        before, _ = tracemalloc.get_traced_memory()
        ask(10_000, 40_000)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < before + 100_000  # 30,000 times kept would be a million bytes
