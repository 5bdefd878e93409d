"""Rate limits: token buckets against their law, and the headers against clocks."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_testing_faults import SMALL, body, post

from limbeck.testing import Faults, Limit, Server
from limbeck.testing.errors import Refused
from limbeck.testing.limits import Limits


def admitted(limits, tokens, now):
    try:
        limits.admit(0, tokens, now)
    except Refused as refused:
        return refused
    return None


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 300)), max_size=200),
    st.floats(60, 6000),
    st.floats(600, 60_000),
    st.floats(0.5, 60),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_buckets_let_in_what_virtual_scheduling_lets_in(arrivals, requests, tokens, burst):
    """The generic cell rate algorithm (ITU-T I.371) says the same of each bucket, with times in place of levels."""
    limits = Limits((Limit(requests_per_minute=requests, tokens_per_minute=tokens, burst=burst),))
    due, now = {"requests": 0.0, "tokens": 0.0}, 0.0
    for gap, size in arrivals:
        now += gap
        late = {}
        for kind, per_minute, amount in (("requests", requests, 1), ("tokens", tokens, size)):
            hold = max(1.0, per_minute / 60 * burst)
            fits = max(due[kind], now) - now <= (hold - min(amount, hold)) / (per_minute / 60)
            near = abs(max(due[kind], now) - now - (hold - min(amount, hold)) / (per_minute / 60)) < 1e-6
            late[kind] = (fits, near)
        if any(near for _, near in late.values()):
            return  # too close for floating point to call
        refused = admitted(limits, size, now)
        assert (refused is None) == all(fits for fits, _ in late.values())
        if refused is None:
            due["requests"] = max(due["requests"], now) + 60 / requests
            due["tokens"] = max(due["tokens"], now) + size * 60 / tokens
        else:
            assert not late[refused.kind][0]


def test_who_waits_as_told_is_let_in():
    limits = Limits((Limit(requests_per_minute=60, burst=1, retry_after="ms"),))
    now, served = 0.0, 0
    for _ in range(200):
        refused = admitted(limits, 1, now)
        if refused is None:
            served += 1
        else:
            now += int(refused.headers["retry-after-ms"]) / 1000
    assert served == 100
    assert now == pytest.approx(100, abs=0.2)  # half of the tries were refused, each a second too early


def test_a_storm_halves_what_is_allowed_twice():
    """Somebody who asks 200 times a second gets what each stretch allows, and a bucketful at the start."""
    limits = Limits((
        Limit(requests_per_minute=2400, burst=1),
        Limit(after=10, requests_per_minute=1200, burst=1),
        Limit(after=20, requests_per_minute=600, burst=1),
    ))  # fmt: skip
    served = [0, 0, 0]
    for tick in range(30 * 200):
        now = tick / 200
        served[int(now // 10)] += admitted(limits, 1, now) is None
    for found, rate in zip(served, (40, 20, 10), strict=True):
        assert abs(found - 10 * rate) <= rate + 1


def test_refused_requests_can_take_from_the_bucket_too():
    limits = Limits((Limit(requests_per_minute=60, burst=1, count_refused=True),))
    assert admitted(limits, 1, 0) is None
    assert all(admitted(limits, 1, 0.1 + number / 10) for number in range(100))
    assert Limits(()).headers("openai") == {}


def test_tokens_are_taken_by_what_may_be_answered():
    told = Limit(tokens_per_minute=1000, burst=60)
    with Server(SMALL, Faults(limits=(told,))) as server:
        assert post(server, body(max_tokens=900))[0] == 200
        status, _, data = post(server, body(max_tokens=900))
        assert status == 429
        assert b'"type":"tokens"' in data
        assert server.bill.requests == 1
        assert post(server, body(max_tokens=10))[0] == 200


def test_headers_say_what_is_left():
    with Server(SMALL, Faults(limits=(Limit(requests_per_minute=120, tokens_per_minute=6000, burst=60),))) as server:
        status, headers, _ = post(server, body(max_tokens=50))
        assert status == 200
        assert headers["x-ratelimit-limit-requests"] == "120"
        assert headers["x-ratelimit-remaining-requests"] == "119"
        assert re.fullmatch(r"[\d.]+ms|[\d.]+s", headers["x-ratelimit-reset-requests"])
        assert 5900 < int(headers["x-ratelimit-remaining-tokens"]) < 5950
        ask = {"model": "toy", "max_tokens": 50, "messages": [{"role": "user", "content": "Hello"}]}
        status, headers, _ = post(server, ask, "/v1/messages")
        assert status == 200
        assert headers["anthropic-ratelimit-requests-limit"] == "120"
        assert headers["anthropic-ratelimit-requests-remaining"] in ("118", "119")
        reset = datetime.strptime(headers["anthropic-ratelimit-tokens-reset"], "%Y-%m-%dT%H:%M:%SZ")
        assert abs(reset.replace(tzinfo=UTC).timestamp() - time.time()) < 5
        server.set_limit(Limit(requests_per_minute=1, burst=60, headers=False))
        assert "x-ratelimit-limit-requests" not in post(server, body())[1]
        status, headers, _ = post(server, body())
        assert status == 429
        assert 50 < int(headers["retry-after"]) <= 60


def test_input_and_output_can_have_limits_of_their_own():
    limits = Limits((Limit(input_tokens_per_minute=600, output_tokens_per_minute=60, burst=1, retry_after="ms"),))
    limits.admit(10, 1, 0)
    for prompt, answer, kind, wait in ((5, 0, "input-tokens", 500), (0, 1, "output-tokens", 1000)):
        with pytest.raises(Refused) as raised:
            limits.admit(prompt, answer, 0)
        assert (raised.value.kind, raised.value.headers) == (kind, {"retry-after-ms": str(wait)})
    assert {name: value for name, value in limits.headers("anthropic").items() if "reset" not in name} == {
        "anthropic-ratelimit-input-tokens-limit": "600", "anthropic-ratelimit-input-tokens-remaining": "0",
        "anthropic-ratelimit-output-tokens-limit": "60", "anthropic-ratelimit-output-tokens-remaining": "0",
    }  # fmt: skip
    assert limits.headers("openai") == {}


def test_limits_are_changed_over_http():
    with Server(SMALL) as server:
        assert post(server, {"requests_per_minute": 1}, "/limit", method="PUT")[0] == 200
        assert [post(server, body())[0] for _ in range(2)] == [200, 429]
        assert post(server, {"requests_per_minute": -1}, "/limit", method="PUT")[0] == 400
