"""Batches: what comes back, what is kept, asked again, paid for, and found again."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from decimal import Decimal
from pathlib import Path
from typing import Literal

import openai
import pytest
from asking import ask, file_of, made
from pydantic import ValidationError

from limbeck.collect.endpoints.batch_apis import AnthropicBatches, OpenAIBatches
from limbeck.collect.endpoints.batch_log import BatchLog, Planned, custom_id, row_number
from limbeck.collect.endpoints.batch_raw import batch_of, unwrapped, wrapped
from limbeck.collect.endpoints.prices import PICO, batch_prices_of, dollars, prices_of
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Request
from limbeck.errors import EndpointError, RefusedError
from limbeck.recipe import AnthropicTeacher, OpenAITeacher, Recipe
from limbeck.testing import BadBatch, Cut, Faults, Malformed, Model, Refusal4xx, Server, ServerError, Settings

KINDS = ["openai", "responses", "anthropic"]
CREATES = {"openai": "/v1/batches", "responses": "/v1/batches", "anthropic": "/v1/messages/batches"}
QUICK = {"rows": 10, "poll": 0.05}
PRICED = {"price": {"input": 0.5, "output": 2}}
TOLD = Settings(words=20, batch_seconds=0.1)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "limbeck.collect.endpoints.batch_calls."
    monkeypatch.setattr(where + "_BACKOFF", 0.01)
    monkeypatch.setattr(where + "_SETTLE", 0.3)
    monkeypatch.setattr("limbeck.collect.endpoints.batching._FIRST_LOOK", 0.05)


def batched(server: Server, tmp_path: Path, count: int = 25, kind: str = "openai", **more) -> Recipe:
    more.setdefault("batch", QUICK)
    return made(server.url, file_of(tmp_path, count), kind=kind, teacher=PRICED, **more)


def alone(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"batch": False, **changes})})


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_answers_as_requests_do_at_half_the_price(tmp_path: Path, kind: str):
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path, kind=kind)
        facts, rows = ask(recipe, tmp_path / "run")
        batches = {charge.batch for charge in server.bill.charges}
        assert (len(rows), server.bill.requests, len(batches)) == (25, 25, 3)
        assert {row.batch for row in rows} == batches
        assert facts["money"]["spent_dollars"] == float(server.bill.money)
        assert facts["generated"] == 25
        half = server.bill.money
        _, single = ask(alone(recipe), tmp_path / "single")
        assert server.bill.money == 3 * half
        assert all(row.batch is None for row in single)
        same = ("prompt_id", "text", "reasoning", "finish_reason", "request_id", "prompt_tokens", "completion_tokens")
        assert [[getattr(row, name) for name in same] for row in rows] == [
            [getattr(row, name) for name in same] for row in single
        ]


@pytest.mark.parametrize("first", [True, False])
def test_what_was_answered_in_one_way_is_not_asked_in_the_other(tmp_path: Path, first: bool):
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path)
        for one in (recipe, alone(recipe)) if first else (alone(recipe), recipe):
            _, rows = ask(one, tmp_path / "run")
            assert len(rows) == 25
        assert (server.bill.requests, server.bill.doubled) == (25, {})


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("when", ["before_billing", "after_billing", "mid_body"])
def test_a_cut_creation_is_looked_for_and_not_repeated(
    tmp_path: Path, kind: str, when: Literal["before_billing", "after_billing", "mid_body"]
):
    cut = Cut(when=when, attempts=1, endpoints=(CREATES[kind],))
    with Server(TOLD, Faults(faults=(cut,))) as server:
        _, rows = ask(batched(server, tmp_path, kind=kind), tmp_path / "run")
        assert len(rows) == 25
        assert (server.bill.requests, server.bill.doubled) == (25, {})
        assert server.bill.faults["cut"] >= 1


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_strangers_batches_are_not_taken_for_ours(tmp_path: Path, kind: str):
    """Another client's batches have the same size, and are made at the same time."""
    cut = Cut(when="before_billing", attempts=1, endpoints=(CREATES[kind],))
    with Server(TOLD) as server:
        stranger = batched(server, tmp_path, 25, kind)
        stranger = stranger.model_copy(
            update={"seed": 1, "collect": stranger.collect.model_copy(update={"top_p": 0.5})}
        )
        ask(stranger, tmp_path / "stranger")
        server.set_faults(Faults(faults=(cut,)))
        facts, rows = ask(batched(server, tmp_path, 25, kind), tmp_path / "run")
        ours = [charge for charge in server.bill.charges if charge.batch in {row.batch for row in rows}]
        assert (len(rows), len(ours), server.bill.requests) == (25, 25, 50)
        assert facts["money"]["spent_dollars"] == float(sum(charge.dollars for charge in ours))


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_expired_rows_are_asked_again(tmp_path: Path, kind: str):
    with Server(TOLD, Faults(faults=(BadBatch(kind="batch_expired", share=0.6, requests=(1, 3)),))) as server:
        facts, rows = ask(batched(server, tmp_path, kind=kind), tmp_path / "run")
        assert len(rows) == server.bill.requests == 25
        asked = facts["money"]["requests"]
        assert asked["answered"] == 25
        assert asked["expired"] == 10
        assert sum(asked.values()) == 25 + asked["expired"]
        assert facts["money"]["spent_dollars"] == float(server.bill.money)


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_rows_that_fail_are_asked_again_and_in_the_end_left_out(tmp_path: Path, kind: str):
    with Server(TOLD, Faults(faults=(BadBatch(kind="batch_rows", share=0.5, requests=(1, 3)),))) as server:
        recipe = batched(server, tmp_path, kind=kind)
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == server.bill.requests == 25
        assert facts["money"]["requests"]["http 500"] > 0
        server.set_faults(Faults(faults=(BadBatch(kind="batch_rows", share=1.0),)))
        with pytest.raises(EndpointError, match="http 500"):
            ask(recipe, tmp_path / "again")
        with Journal(tmp_path / "again" / "journal.db") as journal:
            outcomes = journal.outcomes(recipe.account)
        assert {name: one.cost for name, one in outcomes.items()} == {"http 500": 0}
        assert outcomes["http 500"].requests == 25 * 6


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_rows_that_are_refused_are_data(tmp_path: Path, kind: str):
    with Server(TOLD.model_copy(update={"models": {"toy": Model(context=420)}})) as server:
        recipe = batched(server, tmp_path, 12, kind, max_tokens=300)
        path = tmp_path / "p12.jsonl"
        path.write_text(path.read_text() + json.dumps({"prompt": "word " * 400}) + "\n")
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == 13
        assert sum(row.finish_reason == "context_length" for row in rows) == 1
        assert facts["money"]["requests"] == {"answered": 12, "refused": 1}
        assert ask(recipe, tmp_path / "run")[0]["generated"] == 0


def test_where_every_row_is_refused_it_is_the_settings(tmp_path: Path):
    with Server(TOLD.model_copy(update={"models": {"toy": Model(context=10)}})) as server:
        recipe = batched(server, tmp_path)
        with pytest.raises(EndpointError, match="refuses every request"):
            ask(recipe, tmp_path / "run")
        with Journal(tmp_path / "run" / "journal.db") as journal:
            assert len(journal) == 0


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize(
    "fault",
    [Malformed(attempts=2, endpoints=("/v1/files/*", "/v1/messages/batches/*")),
     Cut(when="mid_body", attempts=2, endpoints=("/v1/files/*", "/v1/messages/batches/*")),
     ServerError(status=503, attempts=2, endpoints=("/v1/files*", "/v1/batches*", "/v1/messages/batches*"))],
    ids=["malformed", "cut", "503"],
)  # fmt: skip
def test_broken_downloads_and_looks_are_repeated(tmp_path: Path, kind: str, fault):
    with Server(TOLD, Faults(faults=(fault,))) as server:
        facts, rows = ask(batched(server, tmp_path, kind=kind, batch={"poll": 0.05}), tmp_path / "run")
        assert len(rows) == server.bill.requests == 25
        assert facts["money"]["requests"] == {"answered": 25} | (
            {"not sent": facts["money"]["requests"]["not sent"]} if "not sent" in facts["money"]["requests"] else {}
        )
        assert facts["second_answers_set_aside"] == 0


def test_a_batch_that_the_provider_refuses_stops_the_run(tmp_path: Path):
    with Server(TOLD, Faults(faults=(BadBatch(kind="batch_failed"),))) as server:
        with pytest.raises(EndpointError, match="refuses a batch"):
            ask(batched(server, tmp_path), tmp_path / "run")
        assert server.bill.requests == 0
    bad_key = Refusal4xx(kind="unauthorized", endpoints=("/v1/batches*", "/v1/files"))
    with Server(TOLD, Faults(faults=(bad_key,))) as server, pytest.raises(EndpointError, match="refuses requests"):
        ask(batched(server, tmp_path), tmp_path / "key")


def test_a_cancelled_batch_keeps_what_it_has_and_is_not_repeated_unasked(tmp_path: Path):
    told = TOLD.model_copy(update={"batch_seconds": 1.0})
    with Server(told) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="k") as client:

        def cancel_soon() -> None:
            while not (batches := client.batches.list().data) or not server.bill.requests:
                time.sleep(0.01)
            client.batches.cancel(batches[0].id)

        recipe = batched(server, tmp_path, 40, batch={"poll": 0.05})

        async def both() -> None:
            await asyncio.gather(asyncio.to_thread(cancel_soon), asyncio.to_thread(ask, recipe, tmp_path / "run"))

        with pytest.raises(EndpointError, match="cancelled at the provider"):
            asyncio.run(both())
        with Journal(tmp_path / "run" / "journal.db") as journal:
            assert 0 < len(journal) == server.bill.requests < 40
        _, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == server.bill.requests == 40


# What is under way


def left_behind(recipe: Recipe, root: Path, when: str) -> None:
    """A run that ended without a word when its batch was created, or as it was about to be."""

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchLog, when, dies)
        with pytest.raises(Killed):
            ask(recipe, root)


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
@pytest.mark.parametrize("when", ["asking", "named", "open_rows"])
@pytest.mark.parametrize("way", ["in batches", "alone"])
def test_the_next_run_takes_up_what_is_under_way(tmp_path: Path, kind: str, when: str, way: str):
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path, kind=kind, batch={"poll": 0.05})
        left_behind(recipe, tmp_path / "run", when)
        deadline = time.monotonic() + 10
        while server.bill.requests not in (0, 25) and time.monotonic() < deadline:
            time.sleep(0.05)  # the server answers and bills what it was handed, whoever is gone
        assert server.bill.requests in (0, 25)
        _, rows = ask(recipe if way == "in batches" else alone(recipe), tmp_path / "run")
        assert len(rows) == server.bill.requests == 25
        assert all(row.batch is not None for row in rows) or (way == "alone" and when == "asking")


def test_offline_leaves_batches_where_they_are(tmp_path: Path):
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path)
        left_behind(recipe, tmp_path / "run", "open_rows")
        deadline = time.monotonic() + 10
        while server.bill.requests < 25 and time.monotonic() < deadline:
            time.sleep(0.05)  # rows that are worked off take serial numbers too
        acts = server.service.serial()
        with pytest.raises(EndpointError, match="does not hold every answer"):
            ask(recipe, tmp_path / "run", offline=True)
        assert int(server.service.serial()[8:], 16) == int(acts[8:], 16) + 1  # nothing was asked in between


def test_another_recipe_waits_for_what_it_shares(tmp_path: Path):
    """Two recipes share a journal and some prompts; the first one's run ended while its batch was under way."""
    shared = str(tmp_path / "shared.db")
    with Server(TOLD) as server:
        small = batched(server, tmp_path, 10, journal=shared)
        left_behind(small, tmp_path / "small", "open_rows")
        large = batched(server, tmp_path, 25, journal=shared)
        facts, rows = ask(large, tmp_path / "large")
        assert (len(rows), server.bill.requests, server.bill.doubled) == (25, 25, {})
        own = [c.dollars for c in server.bill.charges if c.batch in {r.batch for r in rows[10:]}]
        assert facts["money"]["spent_dollars"] == float(sum(own))  # the first ten are the other's to pay
        assert ask(small, tmp_path / "small")[0]["generated"] == 0
        assert server.bill.requests == 25


# Planning


def test_batches_are_no_larger_than_told(tmp_path: Path):
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path, 30, batch={"megabytes": 0.002, "poll": 0.05})
        ask(recipe, tmp_path / "run")
        listed = json.load(urllib.request.urlopen(f"{server.url}/v1/files?limit=100"))["data"]
        sizes = [file["bytes"] for file in listed if file["purpose"] == "batch"]
        assert len(sizes) > 3
        assert max(sizes) <= 2000
        assert min(sizes[1:]) > 1500  # and hardly smaller, but for the last


def test_local_teachers_have_no_batches():
    values = {
        "name": "x", "teacher": {"kind": "local", "model": "m"}, "prompts": [{"kind": "self-prompt", "count": 9}],
        "student": {"kind": "pruned", "layers": 1}, "collect": {"batch": True},
    }  # fmt: skip
    with pytest.raises(ValidationError, match=r"collect\.batch"):
        Recipe.model_validate(values)
    for wrong in ("yes", 1, {"rows": 0}, {"price_share": 1.5}, {"row": 3}):
        with pytest.raises(ValidationError):
            Recipe.model_validate(values | {"collect": {"batch": wrong}})


def test_providers_limits():
    assert (OpenAIBatches.most_rows, OpenAIBatches.most_bytes) == (50_000, 200_000_000)
    assert (AnthropicBatches.most_rows, AnthropicBatches.most_bytes) == (100_000, 256_000_000)


def test_a_plan_that_fails_leaves_nothing(tmp_path: Path):
    with BatchLog(tmp_path / "j.db") as log:

        def fails() -> None:
            with log.intending("t", "who", "sha256:" + "0" * 64) as intent:
                intent.add(Planned(Request.of({"a": 1}), 5))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fails()
        assert log.open_batches("who") == []
        assert log.outcomes("sha256:" + "0" * 64) == {}


def test_custom_ids():
    for token, number in (("limbeck-" + "f" * 32, 10**12), ("a-b", 0)):
        assert row_number(token, custom_id(token, number)) == number
        assert len(custom_id(token, number)) <= 64
    assert row_number("limbeck-a", custom_id("limbeck-b", 1)) is None
    assert row_number("limbeck-a", "limbeck-a") is None


def test_raw_answers_say_which_batch_they_came_in():
    line = b'{"id":"x","custom_id":"c","response":{"status_code":200,"body":{"a":[1,"\\n"]}},"error":null}'
    raw = wrapped("batch_1", line)
    assert raw.endswith(line)
    assert batch_of(raw) == "batch_1"
    assert json.loads(unwrapped(raw)) == {"a": [1, "\n"]}
    for body in (b'{"custom_id": "batch"}', b"batch x\n{}", b"", b"\xff"):
        assert (unwrapped(body), batch_of(body)) == (body, None)
    for torn in (raw[:40], wrapped("batch_1", b"[]"), wrapped("b", b"")):
        assert batch_of(torn)
        assert json.loads(unwrapped(torn)) == {"error": None}


# Money


def test_batch_prices():
    listed = batch_prices_of(OpenAITeacher(model="gpt-4o"), 0.9)
    assert listed is not None
    assert "batch" in listed.source
    assert dollars(listed.cost(1_000_000, 1_000_000)) == pytest.approx(1.25 + 5)  # as genai-prices lists them
    claude = batch_prices_of(AnthropicTeacher(model="claude-sonnet-4-5"), 0.9)
    assert claude is not None
    assert dollars(claude.cost(1000, 1000)) == pytest.approx(0.0015 + 0.0075)
    own = OpenAITeacher.model_validate({"model": "m", "price": {"input": 1, "output": 3}})
    half, whole = batch_prices_of(own, 0.5), prices_of(own)
    assert half is not None
    assert whole is not None
    assert half.cost(7, 11) * 2 == whole.cost(7, 11) == 40 * PICO // 10**6
    assert batch_prices_of(OpenAITeacher(model="no-such", base_url="http://127.0.0.1/v1"), 0.5) is None


def test_a_cap_cuts_batches_to_what_it_allows(tmp_path: Path):
    """The worst of a row is about 0.4 thousandths of a dollar: 25 do not fit at once, one after the other they do."""
    with Server(TOLD) as server:
        recipe = batched(server, tmp_path, 25, batch={"poll": 0.05}, budget={"money": 0.003})
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == 25
        assert len({row.batch for row in rows}) > 2
        assert facts["money"]["spent_dollars"] == float(server.bill.money) <= 0.003
        assert sum(1 for row in rows if row.batch == rows[0].batch) <= 8


def test_a_cap_that_is_reached_stops_the_run_with_what_was_answered(tmp_path: Path):
    with Server(TOLD.model_copy(update={"words": 250})) as server:
        recipe = batched(server, tmp_path, 25, batch={"poll": 0.05}, budget={"money": 0.003})
        with pytest.raises(RefusedError, match="cap is reached"):
            ask(recipe, tmp_path / "run")
        with Journal(tmp_path / "run" / "journal.db") as journal:
            assert 0 < len(journal) == server.bill.requests < 25
        assert server.bill.money <= Decimal("0.003")
        facts, rows = ask(
            recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"unanswered": "leave_out"})}),
            tmp_path / "run",
        )
        assert facts["answers"] == len(rows) < 25


def test_wasted_answers_of_a_batch_cost_half(tmp_path: Path):
    with Server(TOLD.model_copy(update={"words": 80})) as server:
        facts, rows = ask(batched(server, tmp_path, 10, max_tokens=16), tmp_path / "run")
        assert {row.finish_reason for row in rows} == {"length"}
        assert facts["money"]["wasted"]["length"] == {"answers": 10, "dollars": pytest.approx(float(server.bill.money))}


def test_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BATCH_KEY", "sk-very-secret")
    with Server(TOLD.model_copy(update={"api_keys": ("sk-very-secret",)})) as server:
        recipe = made(server.url, file_of(tmp_path, 5), teacher={"api_key_env": "BATCH_KEY"}, batch=QUICK)
        ask(recipe, tmp_path / "run")
        assert all(b"sk-very-secret" not in file.read_bytes() for file in (tmp_path / "run").iterdir())
