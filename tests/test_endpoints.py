"""Collecting from endpoints, against the test server and its bill."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from asking import ask, file_of, made

from limbeck.collect.journal import Journal
from limbeck.errors import EndpointError, RefusedError
from limbeck.testing import (
    Cut,
    Drip,
    Faults,
    Malformed,
    Model,
    RateLimit,
    Refusal4xx,
    Server,
    ServerError,
    Settings,
    Timeout,
    Truncated,
    Withheld,
)

SHORT = Settings(words=20)


def test_every_prompt_and_sample_is_answered_once(tmp_path: Path):
    for kind in ("openai", "responses", "anthropic"):
        with Server(Settings(words=20, models={"toy": Model(reasoning=4)})) as server:
            extra = {"anthropic": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
                     "responses": {"reasoning": {"summary": "auto"}}, "openai": {}}[kind]  # fmt: skip
            recipe = made(
                server.url, file_of(tmp_path, 30), kind=kind, samples=2, teacher={"extra": extra}, max_tokens=2000
            )
            facts, rows = ask(recipe, tmp_path / kind)
            assert server.bill.requests == len(rows) == 60
            assert server.bill.doubled == {} or kind != "openai"  # the others have no seed
            assert facts["answers"] == facts["generated"] == 60
            assert (facts["unanswered"], facts["from_journal"]) == (0, 0)
            assert {c.finish_reason for c in rows} == {"stop"}
            assert all(c.text and c.reasoning and c.model == "toy" for c in rows)
            assert sum(c.prompt_tokens for c in rows) == server.bill.prompt_tokens
            assert sum(c.completion_tokens for c in rows) == server.bill.completion_tokens == facts["tokens_generated"]
            assert {(c.provider, c.route, c.terms, c.weights) for c in rows} == {
                ("self-hosted", "self-hosted", "own-model", None)
            }
            facts, again = ask(recipe, tmp_path / kind)
            assert again == rows
            assert (facts["generated"], facts["from_journal"]) == (0, 60)
            assert server.bill.received == 60


FAULTS = {
    "too many": RateLimit(attempts=2, wait=0.01, retry_after="ms"),
    "too many, unsaid": RateLimit(attempts=1, retry_after="none"),
    "500": ServerError(attempts=1),
    "529": ServerError(attempts=1, status=529),
    "502": ServerError(attempts=1, status=502),
    "408": Timeout(attempts=1),
    "cut before": Cut(when="before_billing", attempts=1),
    "cut after": Cut(when="after_billing", attempts=1),
    "cut in the middle": Cut(when="mid_body", attempts=1, reset=True),
    "drip": Drip(piece=300, pause=0.01),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_go_better_next_time_is_sent_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("limbeck.collect.endpoints.sending._BACKOFF", 0.02)
    # Every other request, so that the circuit stays closed.
    fault = FAULTS[name].model_copy(update={"contains": "and 1"})
    settings = SHORT.model_copy(update={"idempotency": False})
    with Server(settings, Faults(faults=(fault,))) as server:
        facts, rows = ask(made(server.url, file_of(tmp_path, 40)), tmp_path / "run")
        assert len(rows) == len({c.prompt_id for c in rows}) == 40
        assert {c.finish_reason for c in rows} == {"stop"}
        assert facts["second_answers_set_aside"] == 0
        requests = facts["money"]["requests"]
        assert requests["answered"] == 40
        assert sum(requests.values()) == server.bill.received
        lost = server.bill.requests - 40
        assert lost == (server.bill.faults["cut"] if name in ("cut after", "cut in the middle") else 0)


KEPT = {
    "truncated": (Truncated(), "length"),
    "refusal": (Withheld(kind="refusal"), "refusal"),
    "filter": (Withheld(kind="filter"), "content_filter"),
    "empty": (Withheld(kind="empty"), "malformed"),
    "malformed": (Malformed(), "malformed"),
    "context": (Refusal4xx(kind="context"), "context_length"),
    "invalid": (Refusal4xx(kind="invalid"), "error"),
    "forbidden": (Refusal4xx(kind="forbidden"), "error"),
}


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_usable_answer_is_kept_and_never_asked_again(tmp_path: Path, name: str, kind: str):
    fault, reason = KEPT[name]
    with Server(SHORT, Faults(faults=(fault.model_copy(update={"contains": "and 1"}),))) as server:
        recipe = made(server.url, file_of(tmp_path, 40), kind=kind)
        _, rows = ask(recipe, tmp_path / "run")
        found = Counter(c.finish_reason for c in rows)
        # The APIs do not have a word for everything.
        others = {("anthropic", "filter"): "refusal", ("anthropic", "empty"): "stop", ("responses", "empty"): "stop"}
        reason = others.get((kind, name), reason)
        odd = server.bill.faults[fault.kind]
        assert found == Counter(["stop"] * (40 - odd) + [reason] * odd)
        assert server.bill.received == 40
        ask(recipe, tmp_path / "run")
        assert server.bill.received == 40


@pytest.mark.parametrize(
    ("fault", "settings", "said"),
    [
        (Refusal4xx(kind="unauthorized"), SHORT, "401"),
        (Refusal4xx(kind="quota", requests=(6, 999)), SHORT, "quota"),
        (Refusal4xx(kind="invalid"), SHORT, "refuses every request"),
        (None, SHORT.model_copy(update={"models": {"other": Model()}}), "404"),
    ],
)
@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_what_no_request_survives_stops_the_run_and_keeps_what_there_is(tmp_path, fault, settings, said, kind):
    with Server(settings, Faults(faults=(fault,) if fault else ())) as server:
        recipe = made(server.url, file_of(tmp_path, 200), kind=kind, concurrency=2)
        with pytest.raises(EndpointError) as error:
            ask(recipe, tmp_path / "run")
        assert said in str(error.value)
        assert error.value.problems[0].remedy
        assert server.bill.received < 60
        with Journal(tmp_path / "run" / "journal.db") as journal:
            assert len(journal) == server.bill.requests
        if fault is not None:
            server.set_faults(Faults())
            _, rows = ask(recipe, tmp_path / "run")
            assert len(rows) == server.bill.requests == 200


def test_what_was_answered_can_be_gone_on_with(tmp_path: Path):
    with Server(SHORT, Faults(faults=(Refusal4xx(kind="quota", requests=(11, 10**6)),))) as server:
        recipe = made(server.url, file_of(tmp_path, 60), concurrency=2, unanswered="leave_out")
        facts, rows = ask(recipe, tmp_path / "run")
        assert len(rows) == server.bill.requests == facts["answers"]
        assert facts["unanswered"] == 60 - len(rows) > 40


def test_offline_nothing_is_sent(tmp_path: Path):
    with Server(SHORT) as server:
        recipe = made(server.url, file_of(tmp_path, 12))
        with pytest.raises(EndpointError, match="12 requests"):
            ask(recipe, tmp_path / "run", offline=True)
        assert server.bill.received == 0
        _, rows = ask(recipe, tmp_path / "run")
        received = server.bill.received
        assert ask(recipe, tmp_path / "run", offline=True)[1] == rows
        assert server.bill.received == received
    # And with no server at all.
    assert ask(recipe, tmp_path / "run", offline=True)[1] == rows


def test_runs_that_share_a_journal_pay_for_what_is_new(tmp_path: Path):
    shared = str(tmp_path / "workspace" / "journal.db")
    with Server(SHORT) as server:
        few = made(server.url, file_of(tmp_path, 20), journal=shared)
        more = made(server.url, file_of(tmp_path, 30), journal=shared, samples=2)
        _, first = ask(few, tmp_path / "one")
        facts, second = ask(more, tmp_path / "two")
        assert server.bill.requests == 60
        assert facts["generated"] == 40
        by_id = {c.request_id: c for c in second}
        assert all(by_id[c.request_id].text == c.text for c in first)
        for name, rows in (("one", first), ("two", second)):
            with Journal(tmp_path / name / "journal.db") as own:  # each RUN holds its own evidence
                assert len(own) == len(rows)
                assert all(own.get(c.request_id).response == c.response for c in rows)


# Money

PRICED = {"price": {"input": 0.5, "output": 2.0}}


def test_the_facts_say_what_it_cost_and_what_was_wasted(tmp_path: Path):
    faults = (Cut(when="after_billing", attempts=1, contains="and 3"), Truncated(contains="and 2"))
    settings = SHORT.model_copy(update={"idempotency": False})
    with Server(settings, Faults(faults=faults)) as server:
        recipe = made(server.url, file_of(tmp_path, 40), teacher=PRICED)
        facts, rows = ask(recipe, tmp_path / "run")
        money = facts["money"]
        billed = float(server.bill.money)
        answered = sum(0.5e-6 * c.prompt_tokens + 2e-6 * c.completion_tokens for c in rows)
        assert money["prices"] == {"toy": "recipe"}
        assert money["spent_dollars"] >= billed > answered
        assert money["wasted"]["cut"]["requests"] == server.bill.faults["cut"]
        assert money["spent_dollars"] - money["wasted"]["cut"]["dollars_at_most"] == pytest.approx(answered, abs=1e-12)
        cut_off = [c for c in rows if c.finish_reason == "length"]
        assert money["wasted"]["length"]["answers"] == len(cut_off) > 0
        assert money["wasted"]["length"]["dollars"] == pytest.approx(
            sum(0.5e-6 * c.prompt_tokens + 2e-6 * c.completion_tokens for c in cut_off), abs=1e-12
        )


@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_cap_stops_before_it_is_passed_and_a_raised_one_goes_on(tmp_path: Path, concurrency: int):
    with Server(SHORT) as server:

        def with_cap(dollars: float):
            return made(server.url, file_of(tmp_path, 100), teacher=PRICED, budget={"money": dollars},
                        concurrency=concurrency)  # fmt: skip

        with pytest.raises(RefusedError, match="cap"):
            ask(with_cap(0.002), tmp_path / "run")
        assert 0.001 < float(server.bill.money) <= 0.002
        first = server.bill.requests
        assert first > 5
        with pytest.raises(RefusedError, match="cap"):
            ask(with_cap(0.002), tmp_path / "run")
        assert server.bill.requests - first <= 1
        with pytest.raises(RefusedError, match="cap"):
            ask(with_cap(0.004), tmp_path / "run")
        assert 0.003 < float(server.bill.money) <= 0.004  # what was spent stays spent
        facts, rows = ask(with_cap(1.0), tmp_path / "run")
        assert len(rows) == server.bill.requests == 100
        assert facts["money"]["spent_dollars"] == pytest.approx(float(server.bill.money), abs=1e-12)
