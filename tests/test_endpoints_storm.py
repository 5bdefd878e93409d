"""A storm of 429s that halves the allowed rate twice: throughput settles at what is allowed, and nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from asking import ask, file_of, made

from limbeck.testing import Faults, Limit, Server, Settings


def test_throughput_settles_at_what_is_allowed(tmp_path: Path):
    # 240, 120 and 60 a second; the server's bucket holds what flows in within a tenth of a second.
    limits = tuple(
        Limit(after=after, requests_per_minute=rate, burst=0.1, headers=False)
        for after, rate in ((0.0, 14_400.0), (2.0, 7200.0), (4.0, 3600.0))
    )
    with Server(Settings(words=5, delay=0.02), Faults(limits=limits)) as server:
        began = time.time() - server.service.now
        recipe = made(server.url, file_of(tmp_path, 950), concurrency=64)
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == len({c.prompt_id for c in rows}) == 950
        assert server.bill.requests == 950
        assert facts["money"]["requests"]["http 429"] == server.bill.outcomes["429"] > 0
        times = [charge.time - began for charge in server.bill.charges]
    last = min(max(times), 8.0)
    assert last > 6.0
    settled = sum(5.0 <= at < last for at in times) / (last - 5.0)
    assert settled == pytest.approx(60, rel=0.1)


def test_limits_of_the_recipe_keep_refusals_away(tmp_path: Path):
    limits = (Limit(requests_per_minute=6000, burst=0.2, headers=False),)
    with Server(Settings(words=5), Faults(limits=limits)) as server:
        recipe = made(server.url, file_of(tmp_path, 150), teacher={"requests_per_minute": 6000})
        began = time.monotonic()
        ask(recipe, tmp_path / "run")
        assert 1.3 < time.monotonic() - began < 4
        assert server.bill.outcomes["429"] == 0


def test_nothing_stands_still_when_more_is_on_its_way_to_the_disk_than_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("limbeck.collect.endpoints.sending._LAG", 0)
    with Server(Settings(words=5)) as server:
        _, rows = ask(made(server.url, file_of(tmp_path, 40), concurrency=8), tmp_path / "run")
        assert len({c.prompt_id for c in rows}) == server.bill.requests == 40
