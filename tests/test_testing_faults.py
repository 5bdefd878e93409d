"""What goes wrong on purpose, as a bare socket and plain HTTP clients see it, and what the bill says of it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from email.utils import parsedate_to_datetime

import pytest
from pydantic import ValidationError

from limbeck.errors import InputError
from limbeck.testing import (
    Cut,
    Delay,
    Drip,
    Faults,
    Malformed,
    RateLimit,
    Refusal4xx,
    Server,
    ServerError,
    Settings,
    Timeout,
    Truncated,
    WrongType,
    body_digest,
)
from limbeck.testing.faults import Sent, read_form

SMALL = Settings(words=30)


def body(text="Hello", **more):
    return {"model": "toy", "messages": [{"role": "user", "content": text}], **more}


def post(server, payload, path="/v1/chat/completions", headers=None, method="POST"):
    """Status, headers and bytes of one request over a connection of its own."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    try:
        data = None if payload is None else json.dumps(payload)
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def bill(server):
    return json.loads(post(server, None, "/bill", method="GET")[2])


def faulty(*faults, **more):
    return Server(SMALL, Faults(faults=faults, **more))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("when", ["before_billing", "after_billing", "mid_body"])
def test_a_cut_connection_is_billed_only_after_billing(when, reset):
    with faulty(Cut(when=when, attempts=1, reset=reset)) as server:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            post(server, body())
        assert server.bill.requests == (when != "before_billing")
        assert post(server, body())[0] == 200
        assert server.bill.counts[body_digest(body())] == 1 + (when != "before_billing")
        assert server.bill.outcomes == {"cut": 1, "200": 1}
        assert server.bill.in_flight == 0


def test_the_same_idempotency_key_is_answered_alike_and_billed_once():
    with faulty(Cut(when="after_billing", attempts=1)) as server:
        key = {"idempotency-key": "k1"}
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            post(server, body(), headers=key)
        first, second = post(server, body(), headers=key), post(server, body(), headers=key)
        assert first[0] == 200
        assert first[2] == second[2]
        assert first[1]["x-request-id"] == second[1]["x-request-id"] == server.bill.charges[0].request_id
        assert json.loads(first[2])["id"] == server.bill.charges[0].answer_id
        assert server.bill.requests == 1
        assert server.bill.charges[0].idempotency_key == "k1"
        assert server.bill.outcomes["replayed"] == 2
        assert post(server, body("Other"), headers=key)[0] == 400
        assert post(server, body(), headers={"idempotency-key": "k2"})[0] == 200
        assert server.bill.requests == 2


def test_a_twin_that_comes_while_the_first_is_answered_waits_for_it():
    told = SMALL.model_copy(update={"delay": 0.1})
    with Server(told) as server:
        found = []
        send = lambda: found.append(post(server, body(), headers={"idempotency-key": "k"})[2])  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
        assert len(found) == 5
        assert server.bill.requests == 1


def test_a_key_whose_first_request_was_never_billed_is_free_again():
    with faulty(Cut(when="before_billing", contains="Hello")) as server:
        key = {"idempotency-key": "k1"}
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            post(server, body(), headers=key)
        assert post(server, body("Other"), headers=key)[0] == 200
        assert server.bill.requests == 1


def test_idempotency_can_be_turned_off():
    with Server(SMALL.model_copy(update={"idempotency": False})) as server:
        for _ in range(2):
            post(server, body(), headers={"idempotency-key": "k1"})
        assert server.bill.requests == 2


def test_an_answer_is_billed_although_the_client_has_left():
    told = SMALL.model_copy(update={"delay": 0.15})
    with Server(told) as server:
        data = json.dumps(body()).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data
            )
            until(lambda: server.bill.in_flight == 1)
            assert server.bill.requests == 0
        until(lambda: server.bill.in_flight == 0)
        assert server.bill.requests == 1
        assert server.bill.outcomes == {"gone": 1}


def until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come to pass"
        time.sleep(0.005)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529])
def test_server_errors_come_as_they_do_from_a_gateway(status):
    with faulty(ServerError(status=status)) as server:
        got, headers, data = post(server, body())
        assert got == status
        assert server.bill.requests == 0
        if status in (502, 504):
            assert headers["content-type"].startswith("text/html")
        else:
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_refusals_that_must_not_be_tried_again():
    wanted = {
        "quota": (429, "insufficient_quota"),
        "unauthorized": (401, "invalid_api_key"),
        "context": (400, "context_length_exceeded"),
        "billing": (402, None),
        "forbidden": (403, None),
        "invalid": (400, None),
    }
    with faulty(*(Refusal4xx(kind=kind, contains=kind) for kind in wanted), Timeout(contains="slow")) as server:
        for kind, (status, code) in wanted.items():
            got, _, data = post(server, body(kind))
            assert (got, json.loads(data)["error"]["code"]) == (status, code)
        assert post(server, body("slow"))[0] == 408
        assert (server.bill.requests, server.bill.received) == (0, 7)
        assert server.bill.faults == {**dict.fromkeys(wanted, 1), "timeout": 1}


def test_retry_after_in_all_its_forms():
    forms = ("none", "seconds", "date", "ms")
    with faulty(*(RateLimit(retry_after=form, wait=2.5, contains=form) for form in forms)) as server:
        found = {form: post(server, body(form)) for form in forms}
        assert {status for status, _, _ in found.values()} == {429}
        assert json.loads(found["none"][2])["error"]["code"] == "rate_limit_exceeded"
        assert found["none"][1]["retry-after"] is found["none"][1]["retry-after-ms"] is None
        assert found["seconds"][1]["retry-after"] == "3"
        assert found["ms"][1]["retry-after-ms"] == "2500"
        server.set_faults(Faults(faults=(ServerError(status=503, retry_after="seconds", wait=4),)))
        assert post(server, body())[1]["retry-after"] == "4"
        moment = parsedate_to_datetime(found["date"][1]["retry-after"]).timestamp()
        assert 0 < moment - time.time() <= 4


def test_bodies_that_cannot_be_read_are_billed():
    with faulty(Malformed(contains="cut"), WrongType(contains="type"), WrongType(contains="page", page=True)) as server:
        plain = post(server, body())[2]
        status, _, data = post(server, body("cut"))
        assert status == 200
        with pytest.raises(json.JSONDecodeError):
            json.loads(data)
        status, headers, data = post(server, body("type"))
        assert headers["content-type"] == "text/html"
        assert json.loads(data).keys() == json.loads(plain).keys()
        assert post(server, body("page"))[2].startswith(b"<html>")
        assert server.bill.requests == 4


def test_truncated_answers_say_so():
    with faulty(Truncated(share=0.5, contains="short")) as server:
        choice = json.loads(post(server, body("short"))[2])["choices"][0]
        assert choice["finish_reason"] == "length"
        assert len(choice["message"]["content"].split()) == 15
        assert server.bill.charges[0].completion_tokens == 15


def test_slow_answers_come_whole():
    with faulty(Drip(piece=100, pause=0.01, contains="drip"), Delay(seconds=0.2, contains="late")) as server:
        plain = json.loads(post(server, body())[2])
        for text, least in (("drip", 0.01 * (len(json.dumps(plain)) // 100 - 2)), ("late", 0.2)):
            started = time.monotonic()
            status, headers, data = post(server, body(text))
            assert status == 200
            assert time.monotonic() - started >= least
            assert len(data) == int(headers["content-length"])
            assert json.loads(data)["usage"]["completion_tokens"] == 30


def test_faults_keep_to_their_windows_numbers_and_paths():
    schedule = Faults(faults=(
        ServerError(window=(10, 20)),
        Timeout(requests=(3, 5)),
        Malformed(every=7),
        Delay(seconds=1, endpoints=("/v1/files", "/v1/batches/*")),
        Drip(contains="needle"),
    ))  # fmt: skip
    sent = Sent(schedule)

    def kind(number=1, now=0.0, path="/v1/chat/completions", raw=b"", answers=True):
        fault = sent.draw(path=path, answers=answers, number=number, attempt=1, digest="d", raw=raw, now=now)
        return fault and fault.kind

    assert [kind(now=now) for now in (9.9, 10, 19.9, 20)] == [None, "server_error", "server_error", None]
    assert [kind(number) for number in (2, 3, 5, 6, 7, 14)] == [
        None,
        "timeout",
        "timeout",
        None,
        "malformed",
        "malformed",
    ]
    assert kind(raw=b"a needle here") == "drip"
    paths = ("/v1/files", "/v1/batches/b1", "/v1/batches", "/v1/models")
    assert [kind(path=path, answers=False) for path in paths] == ["delay", "delay", None, None]


def test_what_is_drawn_does_not_depend_on_the_order():
    """And it comes as often as it should: 2,000 draws at 0.3, within five standard deviations."""
    sent = Sent(Faults(seed=3, faults=(ServerError(probability=0.3),)))

    def draws(order):
        return {digest: sent.draw(path="/v1/messages", answers=True, number=number, attempt=1, digest=str(digest),
                                  raw=b"", now=0) for number, digest in enumerate(order)}  # fmt: skip

    forward, backward = draws(range(2000)), draws(reversed(range(2000)))
    assert forward == backward
    hits = sum(fault is not None for fault in forward.values())
    assert abs(hits - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_the_first_fault_that_applies_is_the_only_one():
    sent = Sent(Faults(faults=(Timeout(attempts=1), ServerError(attempts=2))))
    found = [sent.draw(path="/v1/messages", answers=True, number=1, attempt=attempt, digest="", raw=b"", now=0)
             for attempt in (1, 2, 3)]  # fmt: skip
    assert [fault and fault.kind for fault in found] == ["timeout", "server_error", None]


def test_a_schedule_is_read_from_yaml_and_every_error_is_named(tmp_path):
    file = tmp_path / "faults.yaml"
    file.write_text("seed: 1\nfaults:\n- {kind: cut, when: mid_body, probability: 0.1}\nlimits:\n- {after: 2}\n")
    assert read_form(file, Faults).faults == (Cut(when="mid_body", probability=0.1),)
    file.write_text("faults:\n- {kind: cut, when: never}\n- {kind: drip, piece: 0}\nsed: 1\n")
    with pytest.raises(InputError) as raised:
        read_form(file, Faults)
    assert len(raised.value.problems) == 3
    assert all(str(file) in problem.where for problem in raised.value.problems)
    for wrong in (tmp_path / "none.yaml", file.with_name("bad.yaml")):
        file.with_name("bad.yaml").write_text("a: [")
        with pytest.raises(InputError):
            read_form(wrong, Faults)
    with pytest.raises(ValidationError):
        Faults.model_validate({"faults": [{"kind": "unheard of"}]})


def test_the_schedule_can_be_changed_while_it_runs():
    with faulty(ServerError()) as server:
        assert post(server, body())[0] == 500
        server.set_faults(Faults())
        assert post(server, body())[0] == 200
        told = json.dumps({"faults": [{"kind": "timeout"}]})
        assert post(server, json.loads(told), "/faults", method="PUT")[0] == 200
        assert post(server, body())[0] == 408
        assert json.loads(post(server, None, "/faults", method="GET")[2])["faults"][0]["kind"] == "timeout"
        assert post(server, {"faults": [{"kind": "x"}]}, "/faults", method="PUT")[0] == 400
        assert post(server, body())[0] == 408
