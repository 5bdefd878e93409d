"""Killed with -9 at random moments, some while a batch is submitted: nothing is billed twice, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import forked
import pytest
from asking import ask, file_of, made, work
from test_endpoints_killed import account_for

from limbeck.collect.endpoints import batch_calls
from limbeck.collect.journal import Journal
from limbeck.recipe import Recipe
from limbeck.testing import Delay, Faults, Server, Settings

KILLS = int(os.environ.get("LIMBECK_TEST_KILLS", "4"))
"""How often a run is killed."""
SUBMISSIONS = max(2, KILLS * 8 // 50)
"""How many of the kills are to be inside a batch's submission."""
REQUESTS = 40 * KILLS
SUBMITS = {"openai": ("/v1/files", "/v1/batches"), "anthropic": ("/v1/messages/batches",)}
SETTLE = 0.5
"""Seconds: longer than the server takes to create a batch, as in earnest."""


def impatient_work(recipe: str, root: str) -> None:
    """`work`, where it is sooner certain that a batch does not exist."""
    batch_calls._SETTLE, batch_calls._BACKOFF = SETTLE, 0.02
    work(recipe, root)


def half_submitted(journal: Path) -> bool:
    """Whether a batch was intended whose id at the provider is not known."""
    if not journal.exists():
        return False
    with sqlite3.connect(journal) as db:
        found = db.execute("SELECT count(*) FROM batches WHERE ended IS NULL AND name IS NULL").fetchone()[0]
    db.close()
    return found > 0


class Killed(NamedTuple):
    kills: int
    submitting: int
    """Of them, so many left a batch half submitted."""


def killed_and_continued(server: Server, recipe: Recipe, root: Path, seed: int) -> Killed:
    """Run, kill at a random moment, and again, and let it end. Each attempt is in batches or, now and then, one by one.
    Some kills wait until a submission arrives at the server.
    """
    moments = random.Random(seed)
    alone = recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"batch": False})})
    kills = submitting = 0
    while True:
        aimed = submitting < SUBMISSIONS and kills % max(1, KILLS // SUBMISSIONS // 2) == 0
        one = recipe if aimed or kills >= KILLS or moments.random() < 0.6 else alone
        received, submitted = server.service.bill.received, server.service.bill.faults["delay"]
        more, long = moments.randrange(1, max(2, REQUESTS // KILLS)), moments.uniform(0, 0.6)
        began = time.monotonic()
        worker = forked.start(impatient_work, one.model_dump_json(), str(root))
        while kills < KILLS and worker.is_alive():
            if aimed and server.service.bill.faults["delay"] > submitted:
                break
            if not aimed and (server.service.bill.received > received + more or time.monotonic() > began + 0.5 + long):
                break
            time.sleep(0.001)
        worker.join(moments.uniform(0, 0.12 if aimed else 0.03) if kills < KILLS else 300)
        worker.kill()
        worker.join(60)
        if worker.exitcode == 0:
            return Killed(kills, submitting)
        assert worker.exitcode == -signal.SIGKILL
        kills, submitting = kills + 1, submitting + half_submitted(root / "journal.db")


def test_ctrl_c_leaves_batches_at_the_provider(tmp_path: Path):
    """It is not awaited: a batch can take a day."""
    with Server(Settings(words=20, batch_seconds=2.0)) as server:
        recipe = made(server.url, file_of(tmp_path, 20), batch={"poll": 0.1})
        (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
        code = (
            "import sys, asking; from pathlib import Path; from limbeck.recipe import Recipe; "
            "asking.ask(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))"
        )
        worker = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "recipe.json"), str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while not server.service.bill.requests:
            time.sleep(0.005)
        worker.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, said = worker.communicate(timeout=30)
        assert time.monotonic() - began < 2
        assert worker.returncode != 0
        assert b"KeyboardInterrupt" in said
        assert server.bill.requests < 20
        _, answers = ask(recipe, tmp_path / "run")
        assert len(answers) == server.bill.requests == 20
        assert len({c.batch for c in answers}) == 1


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_killed_at_random_moments(tmp_path: Path, kind: str):
    slow = Delay(seconds=0.08, endpoints=SUBMITS[kind])
    told = Settings(words=20, delay=0.02, idempotency=False, batch_seconds=0.3)
    with Server(told, Faults(faults=(slow,))) as server:
        rows = max(5, REQUESTS // (6 * KILLS))
        recipe = made(server.url, file_of(tmp_path, REQUESTS), kind=kind, batch={"rows": rows, "poll": 0.1})
        root = tmp_path / "run"
        killed = killed_and_continued(server, recipe, root, seed=11)
        assert killed.kills == KILLS
        assert killed.submitting >= SUBMISSIONS
        outcomes = account_for(server, root, REQUESTS)
        billed = Counter(charge.digest for charge in server.bill.charges)
        in_batches = [charge for charge in server.bill.charges if charge.batch is not None]
        assert len(in_batches) > REQUESTS // 5
        # What a batch was billed for is never asked again, in a batch or alone; so what was billed beyond the journal
        # was in flight alone, at a kill.
        last = {charge.digest: charge for charge in server.bill.charges}
        assert all(last[charge.digest] is charge for charge in in_batches)
        assert 0 <= billed.total() - REQUESTS <= outcomes["killed"]
        assert not set(outcomes) & {"lost", "in a batch", "None"}
        facts, answers = ask(recipe, root)
        assert len(answers) == len({c.prompt_id for c in answers}) == REQUESTS
        assert facts["generated"] == 0
        assert sum(c.batch is not None for c in answers) == len(in_batches) == facts["money"]["answers_in_batches"]
        assert {c.batch for c in answers} - {None} == {charge.batch for charge in in_batches}
        print(f"{kind}: {killed}, {billed.total()} billed, {REQUESTS} journaled, {dict(outcomes)}")
    with Journal(root / "journal.db") as journal:
        assert journal._db.execute("SELECT count(*) FROM batch_rows").fetchone()[0] == 0
