"""Killed with -9 at random moments and continued: nothing is paid for that is not accounted for, nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import forked
import pytest
import zstandard
from asking import ask, file_of, made, work

from limbeck.collect.journal import Journal
from limbeck.recipe import Recipe
from limbeck.testing import Cut, Faults, RateLimit, Server, ServerError, Settings, body_digest


def killed_and_continued(server: Server, recipe: Recipe, root: Path, kills: int, seed: int) -> int:
    """Run, kill at a random moment, and again, and let it end; how often it was killed."""
    moments = random.Random(seed)
    killed = 0
    while True:
        worker = forked.start(work, recipe.model_dump_json(), str(root))
        seen, more = server.service.bill.received, moments.randrange(1, 60)  # so many requests later, and a moment
        while killed < kills and worker.is_alive() and server.service.bill.received < seen + more:
            time.sleep(0.001)
        worker.join(moments.uniform(0, 0.03) if killed < kills else 120)
        worker.kill()
        worker.join(60)
        if worker.exitcode == 0:
            return killed
        assert worker.exitcode == -signal.SIGKILL
        killed += 1


def account_for(server: Server, root: Path, requests: int) -> Counter[str]:
    """Hold the bill against the journal, request by request; the outcomes of what was sent."""
    with Journal(root / "journal.db") as journal:
        assert (len(journal), journal.refused) == (requests, 0)
        digests = {
            key: body_digest(json.loads(zstandard.decompress(request))["body"])
            for key, request in journal._db.execute("SELECT key, request FROM answers")
        }
        sent: Counter[str] = Counter()
        lost: Counter[str] = Counter()
        outcomes: Counter[str] = Counter()
        for key, outcome in journal._db.execute("SELECT key, outcome FROM sent"):
            sent[digests[key]] += 1
            outcomes[str(outcome)] += 1
            lost[digests[key]] += outcome in ("killed", "cut", "timeout")
    billed = Counter(charge.digest for charge in server.bill.charges)
    assert set(billed) == set(digests.values())
    for key, count in billed.items():
        # Each was journaled once; what was billed beside was in flight at a kill, or lost on the wire.
        assert 1 <= count <= 1 + lost[key]
        assert count <= sent[key]
    assert "None" not in outcomes
    return outcomes


@pytest.mark.parametrize("idempotency", [True, False])
def test_killed_at_random_moments(tmp_path: Path, idempotency: bool):
    count = 300
    with Server(Settings(words=20, delay=0.02, idempotency=idempotency)) as server:
        recipe = made(server.url, file_of(tmp_path, count), teacher={"price": {"input": 1, "output": 1}})
        killed = killed_and_continued(server, recipe, tmp_path / "run", 6, seed=5)
        assert killed >= 4
        outcomes = account_for(server, tmp_path / "run", count)
        # What the server did not see was killed between the journal and the wire.
        assert 0 <= outcomes.total() - server.bill.received <= 32 * killed
        assert 0 < outcomes["killed"] <= 32 * killed
        in_flight = server.bill.requests - count
        assert 0 <= in_flight <= outcomes["killed"]
        assert not (idempotency and in_flight)  # sent again under the same key, it is not billed again
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == len({c.prompt_id for c in rows}) == count
        assert facts["generated"] == 0
        assert facts["money"]["spent_dollars"] >= float(sum(charge.dollars for charge in server.bill.charges))


def test_killed_in_the_midst_of_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    count = 300
    faults = (
        Cut(when="after_billing", probability=0.05, attempts=1),
        ServerError(probability=0.05, attempts=1),
        RateLimit(probability=0.05, attempts=1, wait=0.05, retry_after="ms"),
    )
    with Server(Settings(words=20, delay=0.02, idempotency=False), Faults(faults=faults)) as server:
        recipe = made(server.url, file_of(tmp_path, count))
        killed_and_continued(server, recipe, tmp_path / "run", 4, seed=6)
        outcomes = account_for(server, tmp_path / "run", count)
        assert outcomes["http 500"] > 0


def test_ctrl_c_awaits_what_is_under_way(tmp_path: Path):
    """What was sent is paid for: it is journaled before the command ends."""
    with Server(Settings(words=20, delay=0.3, idempotency=False)) as server:
        recipe = made(server.url, file_of(tmp_path, 200), concurrency=8)
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        code = (
            "import sys, asking; from pathlib import Path; from limbeck.recipe import Recipe; "
            "asking.ask(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "recipe.json"), str(tmp_path / "run")]
        places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        # A shell that starts things in the background may have them ignore Ctrl-C.
        worker = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": places},
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while server.service.bill.received < 20:
            time.sleep(0.005)
        worker.send_signal(signal.SIGINT)
        _, said = worker.communicate(timeout=30)
        assert worker.returncode != 0
        assert b"KeyboardInterrupt" in said
        with Journal(tmp_path / "run" / "journal.db") as journal:
            outcomes = {outcome for (outcome,) in journal._db.execute("SELECT DISTINCT outcome FROM sent")}
            assert outcomes <= {"answered", "not sent"}
            assert len(journal) == server.bill.requests == server.bill.received < 60
