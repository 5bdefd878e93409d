"""Both providers' batch APIs, through their own clients."""

from __future__ import annotations

import json
import time
from decimal import Decimal

import anthropic
import openai
import pytest
from test_testing_faults import body, post

from limbeck.testing import BadBatch, Cut, Faults, Server, ServerError, Settings

TOLD = Settings(words=20, batch_seconds=0.1)


def lines(count, **more):
    rows = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": body(str(number), **more),
        }
        for number in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def openai_client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)


def submit(client, data, **more):
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **more
    )


def ended(retrieve, done):
    end = time.monotonic() + 10
    while not done(batch := retrieve()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return batch


def finish(client, batch):
    over = ("completed", "failed", "expired", "cancelled")
    found = ended(lambda: client.batches.retrieve(batch.id), lambda b: b.status in over)
    assert not found.model_extra
    read = lambda name: [json.loads(line) for line in client.files.content(name).text.splitlines()] if name else []  # noqa: E731
    return found, read(found.output_file_id), read(found.error_file_id)


def test_a_batch_answers_as_the_endpoint_does_at_half_the_price():
    with Server(TOLD) as server, openai_client(server) as client:
        batch = submit(client, lines(30), metadata={"run": "r1"})
        assert (batch.status, batch.metadata) == ("validating", {"run": "r1"})
        found, output, errors = finish(client, batch)
        assert (found.status, errors) == ("completed", [])
        assert (found.request_counts.total, found.request_counts.completed) == (30, 30)
        assert found.created_at <= found.in_progress_at <= found.completed_at < found.expires_at
        ids = [row["custom_id"] for row in output]
        assert sorted(ids) == sorted(f"row-{number}" for number in range(30))
        assert ids != sorted(ids)
        assert ids != [f"row-{number}" for number in range(30)]
        batched = server.bill.money
        for row in output:
            assert row["response"]["status_code"] == 200
            alone = json.loads(post(server, body(row["custom_id"].removeprefix("row-")))[2])
            assert row["response"]["body"]["choices"] == alone["choices"]
        assert batched * 2 == server.bill.money - batched
        charges = server.bill.charges[:30]
        assert {charge.custom_id for charge in charges} == set(ids)
        assert {charge.batch for charge in charges} == {batch.id}
        assert {charge.answer_id for charge in charges} == {row["response"]["body"]["id"] for row in output}


def test_an_expired_batch_keeps_and_bills_what_was_done():
    fate = BadBatch(kind="batch_expired", share=0.4)
    with Server(TOLD, Faults(faults=(fate,))) as server, openai_client(server) as client:
        found, output, errors = finish(client, submit(client, lines(10)))
        assert (found.status, len(output), len(errors)) == ("expired", 4, 6)
        assert {row["error"]["code"] for row in errors} == {"batch_expired"}
        assert all(row["response"] is None for row in errors)
        assert server.bill.requests == 4


def test_nothing_done_means_no_output_file():
    with (
        Server(TOLD, Faults(faults=(BadBatch(kind="batch_expired", share=0),))) as server,
        openai_client(server) as client,
    ):
        found, _, errors = finish(client, submit(client, lines(3)))
        assert (found.output_file_id, len(errors), server.bill.requests) == (None, 3, 0)


def test_a_cancelled_batch_keeps_what_was_done():
    told = TOLD.model_copy(update={"batch_seconds": 2.0})
    with Server(told) as server, openai_client(server) as client:
        batch = submit(client, lines(100))
        ended(lambda: client.batches.retrieve(batch.id), lambda b: b.request_counts.completed > 0)
        assert client.batches.cancel(batch.id).status == "cancelling"
        found, output, errors = finish(client, batch)
        assert found.status == "cancelled"
        assert 0 < len(output) < 100
        assert len(output) + len(errors) == 100
        assert server.bill.requests == len(output)


def test_rows_fail_one_by_one():
    bad = (
        lines(20)
        + json.dumps(
            {"custom_id": "hot", "method": "POST", "url": "/v1/chat/completions", "body": body("x", temperature=9)}
        ).encode()
    )
    with (
        Server(TOLD, Faults(faults=(BadBatch(kind="batch_rows", share=0.3),))) as server,
        openai_client(server) as client,
    ):
        found, output, errors = finish(client, submit(client, bad))
        assert found.status == "completed"
        assert {row["custom_id"]: row["response"]["status_code"] for row in errors}["hot"] == 400
        broken = [row for row in errors if row["response"]["status_code"] == 500]
        assert 0 < len(broken) < 20
        assert len(output) + len(errors) == 21
        assert server.bill.requests == len(output)
        assert found.request_counts.failed == len(errors)


@pytest.mark.parametrize(("data", "code", "line"), [
    (lines(2) + lines(1), "duplicate_custom_id", 3),
    (b"{not json}\n", "invalid_json_line", 1),
    (b"{}\n", "missing_required_parameter", 1),
    (lines(1).replace(b"/v1/chat/completions", b"/v1/responses"), "invalid_url", 1),
    (lines(1) + lines(2).splitlines()[1].replace(b'"toy"', b'"other"'), "mismatched_model", None),
    (b"", "empty_file", None),
])  # fmt: skip
def test_a_batch_with_wrong_rows_fails(data, code, line):
    with Server(TOLD) as server, openai_client(server) as client:
        found, output, errors = finish(client, submit(client, data))
        assert (found.status, output, errors) == ("failed", [], [])
        assert [(error.code, error.line) for error in found.errors.data] == [(code, line)]
        assert server.bill.requests == 0


def test_a_batch_whose_creation_was_not_answered_can_be_found():
    """The connection is cut after the batch was made: listing, page by page, finds it by its metadata."""
    cut = Cut(when="after_billing", endpoints=("/v1/batches",), contains="lost", attempts=1)
    with Server(TOLD, Faults(faults=(cut,))) as server, openai_client(server) as client:
        known = [submit(client, lines(1, seed=number), metadata={"run": str(number)}).id for number in range(5)]
        with pytest.raises(openai.APIConnectionError):
            submit(client, lines(2), metadata={"run": "lost"})
        page = client.batches.list(limit=2)
        assert page.has_more
        assert [batch.id for batch in page.data][1] == known[-1]
        every = list(client.batches.list(limit=2))
        assert [batch.id for batch in every[1:]] == known[::-1]
        lost = every[0]
        assert lost.metadata == {"run": "lost"}
        _, output, _ = finish(client, lost)
        assert len(output) == 2
        with pytest.raises(openai.NotFoundError):
            client.batches.list(after="batch_none")


def test_files():
    with Server(TOLD) as server, openai_client(server) as client:
        file = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
        assert not file.model_extra
        assert (file.bytes, file.filename, file.purpose) == (3, "in.jsonl", "batch")
        assert client.files.content(file.id).read() == b"{}\n"
        assert [f.id for f in client.files.list()] == [file.id]
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)
        for wrong, error in ((file.id, openai.NotFoundError), ("file-none", openai.NotFoundError)):
            with pytest.raises(error):
                client.batches.create(input_file_id=wrong, endpoint="/v1/responses", completion_window="24h")


def test_only_what_can_be_batched_is():
    with Server(TOLD) as server, openai_client(server) as client:
        good = client.files.create(file=("in.jsonl", lines(1)), purpose="batch").id
        other = client.files.create(file=("in.jsonl", lines(1)), purpose="user_data").id
        asked = {"input_file_id": good, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for wrong in ({"input_file_id": other}, {"endpoint": "/v1/messages"}, {"completion_window": "1h"}):
            with pytest.raises(openai.BadRequestError):
                client.batches.create(**{**asked, **wrong})


def test_a_large_file_is_taken():
    with Server(TOLD) as server, openai_client(server) as client:
        data = b"x" * (5 * 2**20)
        assert client.files.create(file=("in.jsonl", data), purpose="batch").bytes == len(data)


def anthropic_client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="k", max_retries=0)


def requests(count, **more):
    params = {"model": "toy", "max_tokens": 100, **more}
    return [{"custom_id": f"row-{number}",
             "params": {**params, "messages": [{"role": "user", "content": str(number)}]}}
            for number in range(count)]  # fmt: skip


def anthropic_end(client, batch):
    retrieve = lambda: client.messages.batches.retrieve(batch.id)  # noqa: E731
    found = ended(retrieve, lambda b: b.processing_status == "ended")
    assert not found.model_extra
    counts = found.request_counts
    assert counts.processing == 0
    results = {row.custom_id: row.result for row in client.messages.batches.results(batch.id)}
    assert len(results) == counts.succeeded + counts.errored + counts.canceled + counts.expired
    return found, results


def test_anthropics_batches():
    with Server(TOLD) as server, anthropic_client(server) as client:
        batch = client.messages.batches.create(requests=requests(10))
        assert (batch.processing_status, batch.results_url) == ("in_progress", None)
        assert batch.request_counts.processing == 10
        with pytest.raises(anthropic.AnthropicError):
            client.messages.batches.results(batch.id)
        _, results = anthropic_end(client, batch)
        batched = server.bill.money
        assert batched > Decimal(0)
        for name, result in results.items():
            alone = client.messages.create(**requests(10)[int(name.removeprefix("row-"))]["params"])
            assert result.type == "succeeded"
            assert result.message.content == alone.content
        assert server.bill.money == 3 * batched
        assert client.messages.batches.delete(batch.id).id == batch.id


def test_anthropics_rows_end_one_by_one():
    faults = Faults(faults=(BadBatch(kind="batch_expired", share=0.5, contains="EXPIRE"),))
    with Server(TOLD, faults) as server, anthropic_client(server) as client:
        bad = [*requests(4), {"custom_id": "bad", "params": {"model": "toy"}}]
        _, results = anthropic_end(client, client.messages.batches.create(requests=bad))
        assert results["bad"].type == "errored"
        assert results["bad"].error.error.type == "invalid_request_error"
        assert sum(result.type == "succeeded" for result in results.values()) == 4
        found, results = anthropic_end(client, client.messages.batches.create(requests=requests(6, system="EXPIRE")))
        assert (found.request_counts.succeeded, found.request_counts.expired) == (3, 3)
        assert sorted(result.type for result in results.values()) == ["expired"] * 3 + ["succeeded"] * 3
        assert server.bill.requests == 7


def test_anthropics_batches_are_cancelled_and_listed():
    told = TOLD.model_copy(update={"batch_seconds": 1.0})
    with Server(told) as server, anthropic_client(server) as client:
        made = [client.messages.batches.create(requests=requests(40, top_k=number)).id for number in range(5)]
        cancelled = client.messages.batches.cancel(made[0])
        assert cancelled.processing_status == "canceling"
        assert cancelled.cancel_initiated_at
        found, results = anthropic_end(client, cancelled)
        assert found.request_counts.canceled == sum(result.type == "canceled" for result in results.values()) > 0
        assert [batch.id for batch in client.messages.batches.list(limit=2)] == made[::-1]
        page = client.messages.batches.list(limit=2, before_id=made[0])
        assert [batch.id for batch in page.data] == [made[2], made[1]]
        assert page.has_more
        for wrong in ([], requests(1) * 2, [{**requests(1)[0], "custom_id": "with space"}]):
            with pytest.raises(anthropic.BadRequestError):
                client.messages.batches.create(requests=wrong)


def test_polling_can_fail_too():
    faults = Faults(faults=(ServerError(status=503, endpoints=("/v1/batches/*",), attempts=1),))
    with Server(TOLD, faults) as server, openai_client(server) as client:
        batch = submit(client, lines(1))
        with pytest.raises(openai.InternalServerError):
            client.batches.retrieve(batch.id)
        finish(client, batch)
