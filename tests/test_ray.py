"""Collecting with workers on a local Ray: the same answers, the same bill, and nothing paid twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import zstandard
from asking import ask, file_of, made
from pydantic import ValidationError

from limbeck.collect.journal import Ended, Journal, Sent, held
from limbeck.collect.shards import SPAN, merge_shards, shards_of
from limbeck.collect.teachers import Answer, Request
from limbeck.errors import InputError, RefusedError
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.testing import Model, Server, Settings, body_digest

ray = pytest.importorskip("ray", reason="needs the extra ray")
TWO = {"ray": {"workers": 2}}
PRICE = {"price": {"input": 1, "output": 1}}
ACCOUNT = "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for the tests that need no start of their own."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no token in the home directory
    ray.init(address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False,
             log_to_driver=False)  # fmt: skip
    yield
    ray.shutdown()


def journaled(root: Path) -> Counter[str]:
    """Digests of what was asked, by the journal."""
    with Journal(root / "journal.db") as journal:
        assert journal.refused == 0
        rows = journal._db.execute("SELECT request FROM answers").fetchall()
    return Counter(body_digest(json.loads(zstandard.decompress(request))["body"]) for (request,) in rows)


def test_two_workers_get_what_one_process_gets(tmp_path: Path, local_ray):
    prompts = file_of(tmp_path, 300)
    with Server(Settings(words=8)) as server:
        recipe = made(server.url, prompts, teacher=PRICE, samples=2, **TWO)
        told, shared = ask(recipe, tmp_path / "shared")
        assert Counter(charge.digest for charge in server.bill.charges) == journaled(tmp_path / "shared")
        assert server.bill.requests == server.bill.received == 600
        again, _ = ask(recipe, tmp_path / "shared")
        assert (again["generated"], server.bill.received) == (0, 600)
        # The server knows the requests by their Idempotency-Key, and so gives the same bytes again.
        facts, plain = ask(made(server.url, prompts, teacher=PRICE, samples=2), tmp_path / "plain")
        assert (server.bill.requests, server.bill.received) == (600, 1200)
    assert [row.model_dump(exclude={"created"}) for row in shared] == [
        row.model_dump(exclude={"created"}) for row in plain
    ]
    del facts["seconds"], told["seconds"]
    assert told == facts
    assert not shards_of(tmp_path / "shared" / "journal.db").exists()
    with Journal(tmp_path / "shared" / "journal.db") as journal:
        numbers = [number for (number,) in journal._db.execute("SELECT number FROM sent")]
    assert {number // SPAN for number in numbers} == {0, 1}  # each of the two asked


def test_the_cap_holds_over_the_workers(tmp_path: Path, local_ray):
    """And what is left of their shares is spent before the run stops, as one process would."""
    cap = 0.006
    models = {"toy": Model(input=Decimal(1), output=Decimal(1))}
    with Server(Settings(words=8, models=models)) as server:
        recipe = made(server.url, file_of(tmp_path, 300), teacher=PRICE, **TWO, budget={"money": cap})
        with pytest.raises(RefusedError, match="the money cap is reached"):
            ask(recipe, tmp_path / "run")
        spent = sum((charge.dollars for charge in server.bill.charges), Decimal(0))
        assert spent <= Decimal(str(cap))
        assert Counter(charge.digest for charge in server.bill.charges) == journaled(tmp_path / "run")
        with Journal(tmp_path / "run" / "journal.db") as journal:
            cost = sum(one.cost for one in journal.outcomes(recipe.account).values())
            assert cost <= cap * 10**12
            assert cost > cap * 10**12 - 2000 * 10**6  # no room for a request of 2,000 tokens


def test_a_killed_run_is_gone_on_with_and_pays_for_nothing_twice(tmp_path: Path, local_ray):
    """The driver is killed with -9, and Ray ends its workers; the next run has none and merges what they left."""
    with Server(Settings(words=8, delay=0.05, idempotency=False)) as server:
        recipe = made(server.url, file_of(tmp_path, 300), teacher=PRICE, concurrency=8, **TWO)
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        code = "import sys, asking; from pathlib import Path; asking.work(Path(sys.argv[1]).read_text(), sys.argv[2])"
        places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        driver = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "recipe.json"), str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": places, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        )
        while server.bill.received < 80:
            assert driver.poll() is None
            time.sleep(0.005)
        driver.kill()
        driver.wait()
        place = shards_of(tmp_path / "run" / "journal.db")
        wait_for_workers(place)
        left = sorted(path.name for path in place.glob("*.db"))
        assert left == sorted(f"{number}.db" for number in (0, SPAN))
        _, rows = ask(recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"ray": None})}),
                      tmp_path / "run")  # fmt: skip
        assert not place.exists()
        assert len(rows) == 300
        with Journal(tmp_path / "run" / "journal.db") as journal:
            outcomes = journal.outcomes(recipe.account)
        billed = Counter(charge.digest for charge in server.bill.charges)
        assert set(billed) == set(journaled(tmp_path / "run"))
        killed = outcomes["killed"].requests if "killed" in outcomes else 0
        # Eight under way, and as many again that were written down to be sent next.
        assert 0 <= server.bill.requests - 300 <= killed <= 16
        spent = sum((charge.dollars for charge in server.bill.charges), Decimal(0))
        assert sum(one.cost for one in outcomes.values()) >= spent * 10**12


def wait_for_workers(place: Path) -> None:
    """Ray ends the workers of a driver that is gone; until then they hold their journals."""
    end = time.monotonic() + 60
    for path in place.glob("*.db"):
        while True:
            try:
                with held(path):
                    break
            except InputError:
                assert time.monotonic() < end
                time.sleep(0.05)


def test_merging_again_changes_nothing(tmp_path: Path):
    """As after a kill between the merging and the removal; a second answer that differs is set aside once."""
    one, other = (Request.of({"n": n}) for n in range(2))
    place = shards_of(tmp_path / "journal.db")
    place.mkdir()
    with Journal(tmp_path / "journal.db") as journal:
        journal.put_traffic([Sent(1, one.key, ACCOUNT, 5)], [Answer(one, b"first")], [Ended(1, "answered", 3)])
        with Journal(place / f"{SPAN}.db") as shard:
            sent = [Sent(n, request.key, ACCOUNT, 7) for n, request in enumerate((one, other, other), start=1)]
            shard.put_traffic(sent, [Answer(one, b"second"), Answer(other, b"other")],
                              [Ended(1, "answered", 2), Ended(2, "answered", 4)])  # fmt: skip
        shutil.copytree(place, tmp_path / "kept")
        for _ in range(2):
            merge_shards(journal)
            assert not place.exists()
            assert (len(journal), journal.refused) == (2, 1)
            assert (journal.get(one.key).raw, journal.get(other.key).raw) == (b"first", b"other")
            # Two and one answered for 3 + 2 + 4; the third was under way, and may have cost all of its 7.
            assert journal.outcomes(ACCOUNT) == {"answered": (3, 9), "killed": (1, 7)}
            shutil.copytree(tmp_path / "kept", place)
        with held(place / f"{SPAN}.db"), pytest.raises(InputError, match="another run is collecting"):
            merge_shards(journal)


def test_what_does_not_go_with_workers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = made("http://127.0.0.1:1", file_of(tmp_path, 4), **TWO).model_dump(mode="json")
    values["collect"]["batch"] = True
    with pytest.raises(ValidationError, match=r"collect\.ray") as refused:
        Recipe.model_validate(values)
    assert "beside collect.batch" in str(refused.value)
    values["collect"]["batch"] = False
    values["teacher"] = {"kind": "local", "model": "wheel:a==1", "terms": "own-model"}
    with pytest.raises(ValidationError, match="workers for wheel:a==1"):
        Recipe.model_validate(values)


def test_without_ray_the_extra_is_named_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "keys"))
    monkeypatch.setattr("limbeck.preflight.find_spec", lambda name: None if name == "ray" else object())
    recipe = made("http://127.0.0.1:1", file_of(tmp_path, 8), teacher=PRICE, **TWO)
    with pytest.raises(InputError, match=re.escape("pip install 'limbeck[ray]'")):
        preflight(recipe)
