"""The test server as OpenAI's own client sees it. Its types come from OpenAI's description of the API."""

from __future__ import annotations

import json
import math

import jsonschema
import numpy as np
import openai
import pytest

from limbeck.testing import Faults, Model, Server, Settings, Withheld, body_digest

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def server():
    faults = Faults(faults=(
        Withheld(kind="refusal", contains="REFUSE"),
        Withheld(kind="filter", contains="FILTER"),
        Withheld(kind="empty", contains="EMPTY"),
    ))  # fmt: skip
    models = {
        "toy": Model(context=4000),
        "thinker": Model(reasoning=32),
        "vllm": Model(reasoning=4, reasoning_key="reasoning"),
        "closed": Model(reasoning=32, reasoning_key="none"),
    }
    with Server(Settings(models=models, words=60), faults) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="sk-any", max_retries=0) as client:
        yield client


def strict(answer):
    """An answer has no field that the client's types do not know; returns it."""
    assert type(answer).model_validate(answer.model_dump(), strict=True)
    unknown = answer.model_extra
    assert not unknown, unknown
    return answer


def test_a_chat_is_answered_and_billed(server, client):
    before = server.bill.requests
    answer = strict(client.chat.completions.create(model="toy", messages=HELLO))
    again = client.chat.completions.create(model="toy", messages=HELLO)
    assert answer.choices[0].message.content == again.choices[0].message.content
    assert answer.id != again.id
    assert answer.choices[0].finish_reason == "stop"
    first, second = server.bill.charges[before:]
    assert first.answer_id == answer.id
    assert first.request_id == answer._request_id
    assert (first.prompt_tokens, first.completion_tokens) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    assert first.digest == second.digest == body_digest({"model": "toy", "messages": HELLO})
    assert server.bill.doubled[first.digest] == 2


def test_a_test_can_know_what_must_come(server, client):
    before = server.bill.requests
    for path, create, more in (
        ("/v1/chat/completions", client.chat.completions.create, {"messages": HELLO, "n": 2}),
        ("/v1/responses", client.responses.create, {"input": "Hello"}),
        ("/v1/completions", client.completions.create, {"prompt": "Hello", "logprobs": 2}),
    ):
        body = {"model": "thinker", **more}
        wanted, got = server.expected(path, body), create(**body).to_dict()
        apart = ("id", "created", "created_at", "output")
        assert {key: got.get(key) for key in wanted if key not in apart} == {
            key: value for key, value in wanted.items() if key not in apart
        }
    assert server.bill.requests == before + 3


def test_choices_limits_and_stops(client):
    whole = client.chat.completions.create(model="toy", messages=HELLO, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.completion_tokens == 180
    for name in ("max_tokens", "max_completion_tokens"):
        cut = client.chat.completions.create(model="toy", messages=HELLO, **{name: 10})
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 10
        assert texts[0].startswith(cut.choices[0].message.content)
    stop = texts[0].split()[20]
    stopped = client.chat.completions.create(model="toy", messages=HELLO, stop=stop)
    assert stopped.choices[0].message.content == texts[0][: texts[0].find(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_reasoning_is_shown_where_the_model_shows_it(client):
    def ask(model):
        answer = client.chat.completions.create(model=model, messages=HELLO)
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        return answer.choices[0].message.model_extra

    assert len(ask("thinker")["reasoning_content"].split()) == 32
    assert len(ask("vllm")["reasoning"].split()) == 4
    assert ask("closed") == {}


def test_log_probabilities_are_those_of_the_distribution(server, client):
    answer = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3)
    context = server.context({"model": "toy", "messages": HELLO})
    assert server.service.desk.vocabulary.decode(context) == "user: Hello"
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == answer.choices[0].message.content
    for entry in content:
        wanted = server.distribution(context)
        best = sorted(wanted, reverse=True)[:3]
        assert [top.logprob for top in entry.top_logprobs] == best
        token = server.service.desk.vocabulary.encode(entry.token)
        assert entry.logprob == wanted[token[0]]
        context += token


def test_tools_and_structured_answers_fit_their_schemas(client):
    tools = [{"type": "function", "function": WEATHER}]
    called = client.chat.completions.create(model="toy", messages=HELLO, tools=tools).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.content is None
    assert called.message.tool_calls[0].function.name == "weather"
    jsonschema.validate(json.loads(called.message.tool_calls[0].function.arguments), SCHEMA)
    result = {"role": "tool", "tool_call_id": called.message.tool_calls[0].id, "content": "sunny"}
    asked = [*HELLO, called.message.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(model="toy", messages=asked, tools=tools)
    assert after.choices[0].finish_reason == "stop"
    assert client.chat.completions.create(model="toy", messages=HELLO, tools=tools,
                                          tool_choice="none").choices[0].message.tool_calls is None  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    structured = client.chat.completions.create(model="toy", messages=HELLO, response_format=form)
    jsonschema.validate(json.loads(structured.choices[0].message.content), SCHEMA)


def test_images_are_passed_through_and_paid(client):
    def usage(url):
        parts = [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": url}}]
        return client.chat.completions.create(model="toy", messages=[{"role": "user", "content": parts}])

    plain = client.chat.completions.create(model="toy", messages=HELLO)
    one, other = usage("data:image/png;base64,AAAA"), usage("data:image/png;base64,BBBB")
    assert one.usage.prompt_tokens == plain.usage.prompt_tokens + 85
    assert one.choices[0].message.content != other.choices[0].message.content


def test_refusals_filters_and_empty_choices(client):
    def ask(word):
        return strict(client.chat.completions.create(model="toy", messages=[{"role": "user", "content": word}]))

    refused = ask("REFUSE").choices[0]
    assert (refused.message.content, refused.finish_reason) == (None, "stop")
    assert refused.message.refusal
    assert ask("FILTER").choices[0].finish_reason == "content_filter"
    assert ask("EMPTY").choices == []


@pytest.mark.parametrize(("body", "error", "code"), [
    ({"model": "unknown"}, openai.NotFoundError, "model_not_found"),
    ({"messages": [{"role": "user", "content": "x" * 4000}]}, openai.BadRequestError, "context_length_exceeded"),
    ({"max_tokens": 4000}, openai.BadRequestError, "context_length_exceeded"),
    ({"messages": []}, openai.BadRequestError, None),
    ({"temperature": 3}, openai.BadRequestError, None),
    ({"stream": True}, openai.BadRequestError, None),
])  # fmt: skip
def test_wrong_requests_are_refused_and_not_billed(server, client, body, error, code):
    before = server.bill.requests
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "toy", "messages": HELLO, **body})
    assert raised.value.code == code
    assert raised.value.type == "invalid_request_error"
    assert server.bill.requests == before


def test_responses(server, client):
    answer = strict(client.responses.create(model="thinker", input="Hello", instructions="Be short"))
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert (answer.status, len(answer.output_text.split())) == ("completed", 60)
    assert answer.usage.output_tokens == 92
    assert answer.usage.output_tokens_details.reasoning_tokens == 32
    assert server.bill.charges[-1].answer_id == answer.id
    assert server.bill.charges[-1].endpoint == "/v1/responses"
    summarised = client.responses.create(model="thinker", input="Hello", reasoning={"summary": "auto"})
    assert len(summarised.output[0].summary[0].text.split()) == 32
    cut = client.responses.create(model="toy", input=HELLO, max_output_tokens=16)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.usage.output_tokens == 16
    filtered = client.responses.create(model="toy", input="FILTER")
    assert filtered.incomplete_details.reason == "content_filter"
    assert client.responses.create(model="toy", input="REFUSE").output[0].content[0].type == "refusal"
    assert client.responses.create(model="toy", input="EMPTY").output == []


def test_responses_call_tools_and_keep_to_schemas(client):
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    called = client.responses.create(model="toy", input="Hello", tools=[tool]).output[0]
    assert (called.type, called.name) == ("function_call", "weather")
    jsonschema.validate(json.loads(called.arguments), SCHEMA)
    output = {"type": "function_call_output", "call_id": called.call_id, "output": "sunny"}
    turns = [*HELLO, called.model_dump(exclude_none=True), output]
    assert client.responses.create(model="toy", input=turns, tools=[tool]).output[0].type == "message"
    form = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    structured = client.responses.create(model="toy", input="Hello", text=form)
    jsonschema.validate(json.loads(structured.output_text), SCHEMA)


def test_completions_are_drawn_from_the_distribution(server, client):
    answer = strict(client.completions.create(model="toy", prompt="batu detu", temperature=0, max_tokens=6, logprobs=2))
    vocabulary = server.service.desk.vocabulary
    context = vocabulary.encode("batu detu")
    written = answer.choices[0].logprobs
    for token, logprob, top in zip(written.tokens, written.token_logprobs, written.top_logprobs, strict=True):
        wanted = np.array(server.distribution(context))
        assert vocabulary.text(int(wanted.argmax())) == token
        assert logprob == wanted.max()
        assert sorted(top.values(), reverse=True) == sorted(wanted, reverse=True)[:2]
        context.append(int(wanted.argmax()))
    assert answer.choices[0].text == "".join(written.tokens)
    warm = [client.completions.create(model="toy", prompt="batu", seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_prompts_are_scored(server, client):
    """By echo, and as vLLM does: both say what the distribution says, for token ids of any kind."""
    ids = [300, 7, 255, 511, 0, 90]
    extra = {"prompt_logprobs": 3, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = client.completions.create(model="toy", prompt=ids, max_tokens=0, echo=True, logprobs=3, extra_body=extra)
    choice = answer.choices[0]
    assert choice.logprobs.tokens == [f"token_id:{number}" for number in ids]
    assert choice.prompt_token_ids == ids
    assert choice.token_ids == []
    assert choice.logprobs.token_logprobs[0] is choice.logprobs.top_logprobs[0] is choice.prompt_logprobs[0] is None
    for at in range(1, len(ids)):
        wanted = server.distribution(ids[:at])
        ranks = sorted(range(512), key=lambda number: -wanted[number])
        assert choice.logprobs.token_logprobs[at] == wanted[ids[at]]
        shown = {int(name): entry for name, entry in choice.prompt_logprobs[at].items()}
        assert set(shown) == {*ranks[:3], ids[at]}
        for number, entry in shown.items():
            assert entry["logprob"] == wanted[number]
            assert ranks[entry["rank"] - 1] == number
        assert {int(name.removeprefix("token_id:")) for name in choice.logprobs.top_logprobs[at]} == set(shown)
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 0


def test_many_prompts_and_wrong_ones(client):
    answer = client.completions.create(model="toy", prompt=["batu", "detu"], n=2, max_tokens=3, temperature=0.9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2
    for wrong in ({"prompt": [[512]]}, {"logprobs": 21}, {"prompt": ""}, {"prompt": "a", "max_tokens": 4000}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "toy", "prompt": "a", **wrong})


def test_what_is_drawn_has_the_entropy_of_its_distribution(server, client):
    """At temperature 1, mean surprisal minus mean entropy is a sum of martingale differences: zero but for noise."""
    surplus = []
    start = server.service.desk.vocabulary.encode("batu")
    for seed in range(10):
        extra = {"return_token_ids": True}
        answer = client.completions.create(model="toy", prompt="batu", max_tokens=40, seed=seed, extra_body=extra)
        tokens = answer.choices[0].token_ids
        for at, token in enumerate(tokens):
            logprobs = np.array(server.distribution(start + tokens[:at]))
            surplus.append(-logprobs[token] + (np.exp(logprobs) * logprobs).sum())
    assert len(surplus) > 200
    assert abs(np.mean(surplus)) < 4 * np.std(surplus) / math.sqrt(len(surplus))


def test_models_and_paths_that_are_not_there(client, server):
    assert [model.id for model in client.models.list()] == ["toy", "thinker", "vllm", "closed"]
    assert strict(client.models.retrieve("toy")).id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="toy", input="x")
