"""What a server does wrong: tried again, told at once, or refused, and never paid for twice."""

from __future__ import annotations

import time

import pytest
import served
from served import LENGTHS, SERVER, SIZE, attempted, recipe_for, run_with
from test_annotate import chat

from limbeck.collect.journal import Journal
from limbeck.errors import EndpointError, ModelError
from limbeck.render.examples import read_examples
from limbeck.signal import endpoint
from limbeck.signal.annotate import annotate
from limbeck.signal.endpoint import wait_of
from limbeck.testing import Cut, Faults, Malformed, RateLimit, Refusal4xx, Server, ServerError, Settings

pytestmark = pytest.mark.usefixtures("quick_asking")


@pytest.mark.parametrize(
    "fault",
    [
        RateLimit(attempts=1, retry_after="ms", wait=0.02),
        RateLimit(attempts=2, retry_after="none"),
        ServerError(status=500, attempts=2),
        ServerError(status=502, attempts=1),
        Cut(when="before_billing", attempts=1),
        Cut(when="before_billing", attempts=1, reset=True),
        Cut(when="mid_body", attempts=1),
    ],
    ids=lambda fault: f"{fault.kind}-{getattr(fault, 'when', '')}{getattr(fault, 'status', '')}",
)
def test_what_passes_is_tried_again(toy_teacher, tmp_path, fault):
    with Server(SERVER, Faults(faults=(fault,))) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        assert annotate(recipe, run)["examples"] == len(LENGTHS)
        twice = fault.kind == "cut" and fault.when == "mid_body"  # that answer was paid for, and lost on the wire
        assert server.bill.requests == len(LENGTHS) * (2 if twice else 1)


def test_a_server_says_when_to_come_again(toy_teacher, tmp_path):
    with Server(SERVER, Faults(faults=(RateLimit(requests=(1, 1), retry_after="seconds", wait=1),))) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        started = time.monotonic()
        annotate(recipe, run)
        assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Refusal4xx(kind="invalid"), "400: Invalid request."),
        (Refusal4xx(kind="context"), "400: The context length was exceeded."),
        (Refusal4xx(kind="forbidden"), "403: You are not allowed"),
        (Refusal4xx(kind="quota"), "429: You exceeded your current quota."),
        (Refusal4xx(kind="billing"), "402: Insufficient balance."),
    ],
)
def test_what_cannot_pass_is_told_at_once_in_the_servers_words(toy_teacher, tmp_path, fault, said):
    with Server(SERVER, Faults(faults=(fault,))) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        with pytest.raises(EndpointError, match="the server refuses") as caught:
            annotate(recipe, run)
        assert said in caught.value.problems[0].found
        assert "example " in caught.value.problems[0].where
        assert server.bill.received == 1
        assert not (run / "signals").exists()


def test_a_refused_example_costs_nothing_of_the_others(toy_teacher, tmp_path):
    with Server(SERVER.model_copy(update={"delay": 0.02})) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        bad = read_examples(run / "examples").train[3]
        fault = Refusal4xx(kind="invalid", contains=str(bad.tokens_T[:8].tolist())[1:-1].replace(" ", ""))
        server.set_faults(Faults(faults=(fault,)))
        with pytest.raises(EndpointError) as caught:
            annotate(recipe, run)
        assert [bad.id in p.where for p in caught.value.problems] == [True]
        with Journal(run / "journal.db") as journal:
            assert len(journal) == server.bill.requests, "what was in flight was waited for"
        server.set_faults(Faults())
        annotate(recipe, run)
        assert server.bill.requests == len(LENGTHS)


def test_a_dead_server_is_given_up(toy_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "_TRIES", 3)
    with Server(SERVER, Faults(faults=(ServerError(status=503),))) as server:
        recipe, run = attempted(toy_teacher, tmp_path / "one", server)
        with pytest.raises(EndpointError, match="does not answer") as caught:
            annotate(recipe, run)
        assert server.bill.received == 3
        assert "503: The engine" in caught.value.problems[0].found
    with pytest.raises(EndpointError, match="does not answer"):
        annotate(recipe, run)


def test_a_broken_answer_is_kept_and_only_it_is_asked_for_anew(toy_teacher, tmp_path):
    with Server(SERVER) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        bad = read_examples(run / "examples").train[5]
        some = str(bad.tokens_T[:8].tolist())[1:-1].replace(" ", "")
        server.set_faults(Faults(faults=(Malformed(contains=some, attempts=1),)))
        with pytest.raises(EndpointError, match="cannot be used") as caught:
            annotate(recipe, run)
        assert f"example {bad.id}" in caught.value.problems[0].where
        with Journal(run / "journal.db") as journal:
            kept = len(journal)
        assert kept == server.bill.requests
        annotate(recipe, run)
        assert server.bill.requests == len(LENGTHS) + 1
        assert list(server.bill.doubled.values()) == [2]


def test_two_models_in_one_run_are_refused(toy_teacher, tmp_path, monkeypatch):
    complete, asked = endpoint.Endpoint.complete, []

    async def swapped(self, body, what):
        asked.append(what)
        third = len(asked) == 3
        raw = await complete(self, body, what)
        return raw.replace(b'"toy"', b'"toy-2"') if third else raw

    monkeypatch.setattr(endpoint.Endpoint, "complete", swapped)
    with Server(SERVER) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        with pytest.raises(EndpointError, match="two models answered") as caught:
            annotate(recipe, run)
        (problem,) = caught.value.problems
        assert (problem.found, problem.expected[:3]) == ("toy-2", "toy")
        annotate(recipe, run)
        assert len(asked) == len(LENGTHS) + 1


def test_an_address_that_serves_nothing_is_told(toy_teacher, tmp_path):
    with Server(SERVER) as server:
        recipe = recipe_for(toy_teacher, server.url + "/v2")
        with pytest.raises(EndpointError, match=r"v2/completions.*\n.*404"):
            annotate(recipe, run_with(tmp_path, recipe, [12]))


def test_more_than_the_server_gives_is_refused_in_its_words(toy_teacher, tmp_path):
    with Server(Settings(vocabulary=SIZE, max_logprobs=5)) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server)
        with pytest.raises(EndpointError, match="greater than max allowed: 5"):
            annotate(recipe, run)


def test_a_model_with_another_vocabulary_is_refused(toy_teacher, tmp_path, teacher_dir):
    with Server(Settings(vocabulary=400)) as server:
        recipe, run = attempted(toy_teacher, tmp_path / "narrow", server)
        with pytest.raises(EndpointError, match="is out of vocabulary"):
            annotate(recipe, run)
    with Server(Settings(vocabulary=700)) as server:  # wider: ids that our tokenizer does not have
        recipe, run = attempted(toy_teacher, tmp_path / "wide", server)
        with pytest.raises(EndpointError, match="the model there has another"):
            annotate(recipe, run)
    with Server(Settings(vocabulary=320)) as server:  # as wide as ours, and not ours
        recipe = recipe_for(teacher_dir, server.url + "/v1")
        run = served.RunDir(tmp_path / "equal")
        chats = [chat(i, 40, recipe.teachers[0].name) for i in range(3)]
        some = served.digest_bytes(b"x")
        made = served.make_set(chats, tokenizer=some, templates={recipe.teachers[0].name: some}, max_length=999)
        served.write_examples(run / "examples", made)
        with pytest.raises(ModelError, match="another vocabulary") as caught:
            annotate(recipe, run)
        assert "as our tokenizer has it" in caught.value.problems[0].expected


def test_retry_after_in_all_its_forms():
    assert wait_of({}) is None
    assert wait_of({"retry-after": "7"}) == 7
    assert wait_of({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert wait_of({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert wait_of({"retry-after": "soon"}) is None
