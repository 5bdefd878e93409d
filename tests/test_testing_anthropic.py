"""The test server as Anthropic's own client sees it. Its types come from Anthropic's description of the API."""

from __future__ import annotations

import json

import anthropic
import jsonschema
import pytest

from limbeck.testing import Faults, Model, Refusal4xx, Server, ServerError, Settings, Withheld

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server():
    faults = Faults(faults=(
        Withheld(kind="refusal", contains="REFUSE"),
        Withheld(kind="empty", contains="EMPTY"),
        ServerError(status=529, contains="OVERLOAD"),
        ServerError(status=500, contains="BREAK"),
        Refusal4xx(kind="quota", contains="BROKE"),
        Refusal4xx(kind="billing", contains="UNPAID"),
        Refusal4xx(kind="unauthorized", contains="WHO"),
    ))  # fmt: skip
    with Server(Settings(models={"toy": Model(context=8000)}, words=60), faults) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="sk-ant-any", max_retries=0) as client:
        yield client


def ask(client, text="Hello", **more):
    messages = [{"role": "user", "content": text}]
    answer = client.messages.create(**{"model": "toy", "max_tokens": 500, "messages": messages, **more})
    assert not answer.model_extra
    return answer


def test_a_message_is_answered_and_billed(server, client):
    answer = ask(client, system="Be short")
    assert (answer.stop_reason, answer.content[0].type) == ("end_turn", "text")
    assert len(answer.content[0].text.split()) == answer.usage.output_tokens == 60
    charge = server.bill.charges[-1]
    assert (charge.answer_id, charge.request_id) == (answer.id, answer._request_id)
    assert (charge.prompt_tokens, charge.completion_tokens) == (answer.usage.input_tokens, answer.usage.output_tokens)
    assert charge.endpoint == "/v1/messages"


def test_limits_and_stop_sequences(client):
    whole = ask(client).content[0].text
    cut = ask(client, max_tokens=10)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 10)
    assert whole.startswith(cut.content[0].text)
    stop = whole.split()[20]
    stopped = ask(client, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == whole[: whole.find(stop)]


def test_thinking_has_a_block_of_its_own(client):
    answer = ask(client, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert len(answer.content[0].thinking.split()) == 64
    assert answer.content[0].signature
    assert answer.usage.output_tokens == 124
    for wrong in ({"budget_tokens": 100, "type": "enabled"}, {"budget_tokens": 2000, "type": "enabled"}):
        with pytest.raises(anthropic.BadRequestError):
            ask(client, max_tokens=2000, thinking=wrong)


def test_tools_and_schemas(client):
    tools = [{"name": "count", "input_schema": SCHEMA}]
    called = ask(client, tools=tools)
    assert called.stop_reason == "tool_use"
    assert called.content[0].name == "count"
    jsonschema.validate(called.content[0].input, SCHEMA)
    result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "3"}
    turns = [
        *HELLO,
        {"role": "assistant", "content": called.to_dict()["content"]},
        {"role": "user", "content": [result]},
    ]
    assert ask(client, tools=tools, messages=turns).stop_reason == "end_turn"
    chosen = ask(client, tools=tools, messages=turns, tool_choice={"type": "tool", "name": "count"})
    assert chosen.stop_reason == "tool_use"
    structured = ask(client, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    jsonschema.validate(json.loads(structured.content[0].text), SCHEMA)


def test_what_is_withheld(client):
    assert ask(client, "REFUSE").stop_reason == "refusal"
    assert ask(client, "EMPTY").content == []


@pytest.mark.parametrize(("text", "error", "kind"), [
    ("OVERLOAD", anthropic.InternalServerError, "overloaded_error"),
    ("BREAK", anthropic.InternalServerError, "api_error"),
    ("BROKE", anthropic.BadRequestError, "invalid_request_error"),
    ("UNPAID", anthropic.APIStatusError, "billing_error"),
    ("WHO", anthropic.AuthenticationError, "authentication_error"),
    ("x" * 9000, anthropic.BadRequestError, "invalid_request_error"),
])  # fmt: skip
def test_errors_have_anthropics_shape(server, client, text, error, kind):
    before = server.bill.requests
    with pytest.raises(error) as raised:
        ask(client, text)
    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == kind
    assert raised.value.body["request_id"] == raised.value.request_id
    assert server.bill.requests == before


def test_models_and_unknown_ones(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    with pytest.raises(anthropic.NotFoundError):
        ask(client, model="nothing")
