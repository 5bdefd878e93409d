"""An endpoint that no request ever reaches, first starts that fail, and what a cap says to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from asking import ask, file_of, made
from command import call

from limbeck.cli.show import as_text, standing
from limbeck.collect.endpoints.batch_log import BatchLog, Planned
from limbeck.collect.endpoints.batching import asked_of
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.endpoints.transport import NoReplyError, Transport
from limbeck.collect.glance import collected
from limbeck.collect.journal import Ended, Journal, Sent
from limbeck.collect.prompts import gather
from limbeck.collect.teachers import Answer, Request
from limbeck.errors import EndpointError, RunDirError
from limbeck.ledger.store import Ledger
from limbeck.recipe import FileTeacher, Recipe
from limbeck.records import Prompt
from limbeck.rundir import RunDir, open_run
from limbeck.tables import read_records
from limbeck.testing import Model, Server, Settings


def dead_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def written(tmp_path: Path, url: str, **collect: Any) -> Path:
    """A recipe file with a teacher at `url`, and a student that loads."""
    recipe = made(url, file_of(tmp_path, 16), teacher={"price": {"input": 1, "output": 2}}, **collect)
    values = recipe.model_dump(mode="json")
    values["student"]["model"] = str(tiny.save(tmp_path / "student", layers=1))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


# Nobody there


@pytest.mark.parametrize(("attempts", "most"), [(1, 3.0), (2, 10.0)])
def test_a_dead_address_stops_the_run_once_a_request_is_out_of_attempts(tmp_path: Path, attempts: int, most: float):
    address = f"http://127.0.0.1:{dead_port()}"
    recipe = made(address, file_of(tmp_path, 16), teacher={"attempts": attempts})
    began = time.monotonic()
    with pytest.raises(EndpointError, match="cannot be reached") as caught:
        ask(recipe, tmp_path / "run")
    assert time.monotonic() - began < most
    (problem,) = caught.value.problems
    assert f"{address}/v1/chat/completions" in problem.where
    assert problem.found == "connection refused"
    assert "base_url" in problem.remedy


def test_with_many_attempts_a_dead_address_stops_the_run_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("limbeck.collect.endpoints.sending._UNREACHED", 1.5)
    recipe = made(f"http://127.0.0.1:{dead_port()}", file_of(tmp_path, 16), teacher={"attempts": 99})
    began = time.monotonic()
    with pytest.raises(EndpointError, match="cannot be reached"):
        ask(recipe, tmp_path / "run")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_a_dead_address_of_a_batch_api_is_told_as_one_of_requests(tmp_path: Path, kind: str):
    """Nothing is sent from then on, and no batch stays behind that would be looked for."""
    port = dead_port()
    recipe = made(f"http://127.0.0.1:{port}", file_of(tmp_path, 4), kind=kind, teacher={"attempts": 2}, batch=True)
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(EndpointError, match="cannot be reached") as caught:
            ask(recipe, tmp_path / "run")
        assert time.monotonic() - began < 5
        (problem,) = caught.value.problems
        assert f"http://127.0.0.1:{port}/v1/" in problem.where
        assert problem.found == "connection refused"
        assert "base_url" in problem.remedy
    with BatchLog(tmp_path / "run" / "journal.db") as log:
        assert not log.open_batches(asked_of(endpoint_of(recipe)))


@pytest.mark.parametrize("name", ["batch_1", None])
def test_a_batch_waits_in_the_journal_while_its_provider_is_not_there(tmp_path: Path, name: str | None):
    """Also where its name there is not known yet; nothing is put in its place."""
    recipe = made(f"http://127.0.0.1:{dead_port()}", file_of(tmp_path, 4), teacher={"attempts": 1}, batch=True)
    teacher, root = endpoint_of(recipe), tmp_path / "run"
    root.mkdir()
    gather(recipe, RunDir(root))
    with BatchLog(root / "journal.db") as log:
        with log.intending("limbeck-0", asked_of(teacher), recipe.account) as intent:
            for prompt in read_records(root / "prompts.parquet", Prompt):
                intent.add(Planned(teacher.request(prompt, 0), 0))
        log.asking(intent.batch)
        if name is not None:
            log.named(intent.batch, name)
        before = log.open_batches(asked_of(teacher))
    with pytest.raises(EndpointError, match="cannot be reached"):
        ask(recipe, root)
    with BatchLog(root / "journal.db") as log:
        assert log.open_batches(asked_of(teacher)) == before
        assert len(log.open_rows(intent.batch)) == 4


def endpoint_of(recipe: Recipe) -> Endpoint:
    (settings,) = recipe.teachers
    assert settings.kind == "openai" or settings.kind == "anthropic"
    return Endpoint(settings, recipe.collect, recipe.seed)


def test_no_tls_is_told_as_such(tmp_path: Path):
    with Server(Settings(words=8)) as server:
        recipe = made(server.url.replace("http:", "https:"), file_of(tmp_path, 4), teacher={"attempts": 1})
        with pytest.raises(EndpointError, match="TLS failed"):
            ask(recipe, tmp_path / "run")


def test_a_name_that_nobody_has_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    recipe = made("http://nobody.invalid:1", file_of(tmp_path, 4), teacher={"attempts": 1, "route": "self-hosted"})
    with pytest.raises(EndpointError, match=r"the name is not found \(Name or service not known\)"):
        ask(recipe, tmp_path / "run")


def test_an_endpoint_that_answered_before_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three connections fail after the first answers: with attempts left, all is answered; without, it is not called
    an address where nobody is."""
    real, sent, fails = Transport.post, [0], [range(8, 11)]

    async def post(self, body, key):
        sent[0] += 1
        if sent[0] in fails[0]:
            raise NoReplyError("connect", "connection refused")
        return await real(self, body, key)

    monkeypatch.setattr(Transport, "post", post)
    with Server(Settings(words=8)) as server:
        source = file_of(tmp_path, 16)
        recipe = made(server.url, source, concurrency=1, teacher={"attempts": 5})
        assert len(ask(recipe, tmp_path / "a")[1]) == 16
        sent[0], fails[0] = 0, range(8, 99)
        recipe = made(server.url, source, concurrency=1, teacher={"attempts": 1})
        monkeypatch.setattr("limbeck.collect.endpoints.pacing._PROBE_FIRST", 0.001)
        with pytest.raises(EndpointError) as caught:
            ask(recipe, tmp_path / "b")
    assert "cannot be reached" not in str(caught.value)


# A first start that failed


def test_a_key_that_is_not_set_makes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with Server(Settings(words=8)) as server:
        recipe, out = written(tmp_path, server.url), tmp_path / "run"
        failed = call("collect", recipe, "--out", out, "--set", "teacher.api_key_env=NO_SUCH_KEY")
        assert (failed.exit_code, "NO_SUCH_KEY" in failed.stderr, out.exists()) == (2, True, False)
        good = call("collect", recipe, "--out", out)
        assert good.exit_code == 0, good.stderr


def test_without_an_entry_another_recipe_takes_the_place_and_the_journal_stays(tmp_path: Path):
    first = made("http://a.invalid", file_of(tmp_path, 4))
    other = made("http://b.invalid", file_of(tmp_path, 4))
    out = tmp_path / "run"
    with open_run(out, first), Ledger(out / "ledger.db"):
        (out / "journal.db").write_bytes(b"paid for")
    with open_run(out, other) as run:
        assert run.recipe() == other
        assert (out / "journal.db").read_bytes() == b"paid for"
    with Ledger(out / "ledger.db") as ledger:
        ledger.append(stage="prompts", started=datetime.now(UTC), inputs={}, outputs={}, recipe=other.digest, facts={},
                      leaves=[])  # fmt: skip
    with pytest.raises(RunDirError, match="another recipe"), open_run(out, first):
        pass
    assert Recipe.model_validate(yaml.safe_load((out / "recipe.yaml").read_text())) == other


def entries_of(out: Path) -> list[tuple[str, str]]:
    with Ledger(out / "ledger.db", read_only=True) as ledger:
        return [(entry.stage, entry.recipe) for entry in ledger.entries()]


@pytest.mark.parametrize("mistake", ["address", "key", "model"])
def test_a_mistyped_teacher_is_corrected_in_the_recipe_and_the_same_run_goes_on(
    tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WRONG", "sk-wrong-wrong")
    monkeypatch.setenv("RIGHT", "sk-right-right")
    with Server(Settings(words=8, api_keys=("sk-right-right",), models={"toy": Model()})) as server:
        recipe, out = written(tmp_path, server.url), tmp_path / "run"
        wrong = {"address": f"teacher.base_url=http://127.0.0.1:{dead_port()}/v1",
                 "key": "teacher.api_key_env=WRONG", "model": "teacher.model=tov"}[mistake]  # fmt: skip
        right = ["--set", "teacher.api_key_env=RIGHT"]
        stopped = call("collect", recipe, "--out", out, *right, "--set", "teacher.attempts=1", "--set", wrong)
        assert stopped.exit_code == 2, stopped.stderr
        assert [stage for stage, _ in entries_of(out)] == ["prompts"]
        good = call("collect", recipe, "--out", out, *right)
        assert good.exit_code == 0, good.stderr
        said = " ".join(good.stderr.split())
        assert "nothing was collected by the recipe that lay there" in said
        assert "teacher.attempts was 1, is 6" in said
        assert wrong.partition("=")[2] in said
        assert server.bill.requests == 16
        made_by = RunDir(out).recipe().digest
        assert entries_of(out) == [(stage, made_by) for stage in ("prompts", "collect", "checkpoint")]
        assert call("ledger", "verify", out).exit_code == 0


@pytest.mark.parametrize("left", ["an answer", "a batch", "what may have been billed"])
def test_where_something_was_collected_another_address_is_refused_and_told(tmp_path: Path, left: str):
    dead = f"http://127.0.0.1:{dead_port()}/v1"
    with Server(Settings(words=8)) as server:
        recipe, out = written(tmp_path, server.url), tmp_path / "run"
        stopped = call(
            "collect", recipe, "--out", out, "--set", f"teacher.base_url={dead}", "--set", "teacher.attempts=1"
        )
        assert stopped.exit_code == 2
        there = RunDir(out).recipe()
        teacher = endpoint_of(there)
        requests = [teacher.request(prompt, 0) for prompt in read_records(out / "prompts.parquet", Prompt)]
        with BatchLog(out / "journal.db") as log:
            if left == "a batch":
                with log.intending("limbeck-0", asked_of(teacher), there.account) as intent:
                    intent.add(Planned(requests[0], 5))
            else:
                number = log.next_number
                outcome = "answered" if left == "an answer" else "timeout"
                answers = [Answer(requests[0], b"{}")] if left == "an answer" else []
                log.put_traffic([Sent(number, requests[0].key, there.account, 5)], answers, [Ended(number, outcome, 5)])
        before, recipe_before = entries_of(out), (out / "recipe.yaml").read_bytes()
        refused = call("collect", recipe, "--out", out)
        assert refused.exit_code == 2
        said = " ".join(refused.stderr.split())
        assert "teacher.base_url" in said
        assert dead in said
        assert f"{server.url}/v1" in said
        assert f"what it collected is in {out / 'journal.db'}" in said
        assert "another --out" in said
        assert (entries_of(out), (out / "recipe.yaml").read_bytes()) == (before, recipe_before)
        assert server.bill.requests == 0


def test_answers_of_a_file_are_collected_too(tmp_path: Path):
    """They are no requests; a RUN that took some in does not give way."""
    out, recipe = tmp_path / "run", made("http://127.0.0.1:1", file_of(tmp_path, 4))
    file = recipe.model_copy(update={"teacher": FileTeacher(path="a.jsonl", model="m", terms="own-model")})
    with open_run(out, file, collected=collected):
        pass
    with Ledger(out / "ledger.db") as ledger:
        ledger.append(stage="prompts", started=datetime.now(UTC), inputs={}, outputs={}, recipe=file.digest, facts={})
    with Journal(out / "journal.db") as journal:
        assert collected(RunDir(out), file) == ""
        journal.put_group([Answer(Request.of({"a": 1}), b"answer")])
    with pytest.raises(RunDirError, match="answers: 1"), open_run(out, recipe, collected=collected):
        pass


def test_a_run_that_lost_its_ledger_is_not_taken_for_a_new_one(tmp_path: Path):
    out = tmp_path / "run"
    with open_run(out, made("http://a.invalid", file_of(tmp_path, 4))):
        (out / "completions.parquet").write_bytes(b"something")
    with (
        pytest.raises(RunDirError, match="another recipe"),
        open_run(out, made("http://b.invalid", file_of(tmp_path, 4))),
    ):
        pass


def test_a_run_in_use_names_who_holds_it_and_says_to_wait(tmp_path: Path):
    """Another --out would pay for the same answers again; it is not what is told."""
    with Server(Settings(words=8)) as server:
        recipe, out = written(tmp_path, server.url), tmp_path / "run"
        code = (
            "import os, sys; from pathlib import Path; from limbeck.recipe_file import load_recipe; "
            "from limbeck.rundir import open_run\n"
            "with open_run(sys.argv[2], load_recipe(Path(sys.argv[1]))):\n"
            "    print(os.getpid(), flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        refused = call("collect", recipe, "--out", out)
        assert refused.exit_code == 2
        assert f"held by process {pid}," in refused.stderr
        assert "wait until it has ended" in refused.stderr
        assert "--out" not in refused.stderr
        holder.communicate("", timeout=30)
        assert call("collect", recipe, "--out", out).exit_code == 0
        assert server.bill.requests == 16


# The cap


@pytest.mark.parametrize("change", ["collect.unanswered=leave_out", "collect.budget.money=1"])
def test_what_a_cap_says_to_do_works_and_show_says_what_was_spent(tmp_path: Path, change: str):
    settings = Settings(words=8, models={"toy": Model(input=Decimal(1), output=Decimal(2))})
    with Server(settings) as server:
        recipe, out = written(tmp_path, server.url, max_tokens=40, concurrency=1), tmp_path / "run"
        capped = call("collect", recipe, "--out", out, "--set", "collect.budget.money=0.0012")
        assert capped.exit_code == 1
        assert f"collect.journal: {out / 'journal.db'}" in " ".join(capped.stderr.split())
        told, before = json.loads(call("show", out, "--json").stdout)["collecting"], server.bill.requests
        assert 0 < told["answers"] == told["requests"]["answered"] == before < 16
        assert Decimal(str(told["spent_dollars"])) == server.bill.money
        text = as_text(standing(out), facts=False)
        assert f"{told['answers']} in {out / 'journal.db'}" in text
        assert f"{server.bill.money:.6f}" in text
        cap = [] if "money" in change else ["--set", "collect.budget.money=0.0012"]
        more = ["--set", change, *cap, "--set", f"collect.journal={out / 'journal.db'}"]
        result = call("collect", recipe, "--out", tmp_path / "more", *more)
        assert result.exit_code == 0, result.stderr
        assert server.bill.requests == (before if cap else 16)
