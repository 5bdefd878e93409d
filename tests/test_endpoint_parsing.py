"""What endpoints say, whatever it is: read without trust, never raising, with the words of each API."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.collect.endpoints.anthropic import AnthropicMessages
from limbeck.collect.endpoints.dialects import read_raw
from limbeck.collect.endpoints.keys import read_key, scrub
from limbeck.collect.endpoints.openai_chat import OpenAIChat
from limbeck.collect.endpoints.openai_responses import OpenAIResponses
from limbeck.collect.endpoints.teacher import Endpoint, canonical_fast
from limbeck.collect.endpoints.waits import low_quotas, retry_after
from limbeck.errors import InputError, PromptError
from limbeck.ledger.canonical import canonical
from limbeck.recipe import AnthropicTeacher, Collect, OpenAITeacher
from limbeck.records import Message, Prompt, Split

CHAT, MESSAGES, RESPONSES = OpenAIChat("max_tokens"), AnthropicMessages(), OpenAIResponses()


def chat(message: object, finish: object = "stop", **more) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    return json.dumps(
        {"model": "m-1", "choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage} | more
    ).encode()


@pytest.mark.parametrize(
    ("message", "finish", "expected"),
    [
        ({"content": "Yes."}, "stop", ("Yes.", None, "stop")),
        ({"content": "Ye"}, "length", ("Ye", None, "length")),
        ({"content": None}, "content_filter", ("", None, "content_filter")),
        ({"content": None, "refusal": "I will not."}, "stop", ("I will not.", None, "refusal")),
        ({"content": None, "tool_calls": []}, "tool_calls", ("", None, "tool_calls")),
        ({"content": "4", "reasoning_content": "2+2"}, "stop", ("4", "2+2", "stop")),
        ({"content": "4", "reasoning": "2+2"}, "stop", ("4", "2+2", "stop")),
        ({"content": "<think>\n2+2\n</think>\n\n4"}, "stop", ("4", "2+2", "stop")),
        ({"content": "say <think>no</think>"}, "stop", ("say <think>no</think>", None, "stop")),
        ({"content": "<think>cut"}, "length", ("<think>cut", None, "length")),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop", ("ab", None, "stop")),
        ({"content": "x"}, None, ("x", None, "malformed")),
        ({"content": "x"}, "odd_reason", ("x", None, "odd_reason")),
    ],
)
def test_a_chat_completion(message, finish, expected):
    parsed, usage = read_raw(CHAT, chat(message, finish))
    assert (parsed.text, parsed.reasoning, parsed.finish_reason) == expected
    assert (parsed.model, parsed.prompt_tokens, parsed.completion_tokens) == ("m-1", 7, 5)
    assert usage == (7, 5)


@pytest.mark.parametrize(
    ("blocks", "stop", "expected"),
    [
        ([{"type": "text", "text": "Yes."}], "end_turn", ("Yes.", None, "stop")),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "stop_sequence", ("ab", None, "stop")),
        ([{"type": "thinking", "thinking": "2+2", "signature": "s"}, {"type": "text", "text": "4"}], "max_tokens",
         ("4", "2+2", "length")),
        ([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "4"}], "end_turn", ("4", None, "stop")),
        ([], "refusal", ("", None, "refusal")),
        ([{"type": "tool_use", "id": "t", "name": "f", "input": {}}], "tool_use", ("", None, "tool_calls")),
        ([{"type": "text", "text": "x"}], "pause_turn", ("x", None, "pause_turn")),
    ],
)  # fmt: skip
def test_a_message(blocks, stop, expected):
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5}
    raw = json.dumps({"type": "message", "model": "c", "content": blocks, "stop_reason": stop, "usage": usage})
    parsed, used = read_raw(MESSAGES, raw.encode())
    assert (parsed.text, parsed.reasoning, parsed.finish_reason) == expected
    assert used == (7, 5)


@pytest.mark.parametrize(
    ("output", "more", "expected"),
    [
        ([{"type": "message", "content": [{"type": "output_text", "text": "Yes."}]}], {}, ("Yes.", None, "stop")),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "2+2"}]},
          {"type": "message", "content": [{"type": "output_text", "text": "4"}]}], {}, ("4", "2+2", "stop")),
        ([{"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "2+2"}]},
          {"type": "message", "content": [{"type": "output_text", "text": "4"}]}], {}, ("4", "2+2", "stop")),
        ([{"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}], {}, ("No.", None, "refusal")),
        ([{"type": "message", "content": [{"type": "output_text", "text": "Y"}]}],
         {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, ("Y", None, "length")),
        ([], {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}},
         ("", None, "content_filter")),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], {}, ("", None, "tool_calls")),
        ([], {"status": "failed", "error": {"code": "server_error", "message": "no"}}, ("", None, "error")),
    ],
)  # fmt: skip
def test_a_response(output, more, expected):
    usage = {"input_tokens": 7, "output_tokens": 5}
    raw = json.dumps({"model": "r", "status": "completed", "error": None, "output": output, "usage": usage} | more)
    parsed, used = read_raw(RESPONSES, raw.encode())
    assert (parsed.text, parsed.reasoning, parsed.finish_reason) == expected
    assert used == (7, 5)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "malformed"),
        (b'{"choices": [{"mess', "malformed"),
        (b"<html>no</html>", "malformed"),
        (b"[]", "malformed"),
        (b'{"choices": []}', "malformed"),
        (b'{"choices": [{"message": "x"}], "content": 3}', "malformed"),
        (b'{"error": {"code": "context_length_exceeded", "message": "long"}}', "context_length"),
        (b'{"error": {"code": "content_filter", "message": "no"}}', "content_filter"),
        (b'{"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9"}}',
         "context_length"),
        (b'{"object": "error", "message": "This model\'s maximum context length is 4096 tokens", "code": 400}',
         "context_length"),
        (b'{"error": "model not loaded"}', "error"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_data_with_its_reason(raw, reason):
    for dialect in (CHAT, MESSAGES, RESPONSES):
        parsed, usage = read_raw(dialect, raw)
        assert (parsed.text, parsed.finish_reason, usage) == ("", reason, None)


@pytest.mark.parametrize("name", [{}, {"id": 3, "system_fingerprint": ["fp"]}, {"id": "", "system_fingerprint": None}])
def test_an_answer_has_the_names_that_its_provider_gave_it_as_text(name):
    """A refusal and what is malformed too."""
    said = {"id": "chatcmpl-1", "system_fingerprint": "fp_1"}
    for dialect in (CHAT, MESSAGES, RESPONSES):
        for rest in (json.loads(chat({"content": "Yes."})), {"error": {"code": "content_filter"}}, {}):
            parsed = read_raw(dialect, json.dumps(rest | said).encode()).parsed
            assert (parsed.answer_id, parsed.fingerprint) == ("chatcmpl-1", "fp_1")
            parsed = read_raw(dialect, json.dumps(rest | name).encode()).parsed
            assert (parsed.answer_id, parsed.fingerprint) == (None, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "usage", "prompt_tokens", "completion_tokens", "input_tokens",
                         "output_tokens", "finish_reason", "stop_reason", "type", "text", "thinking", "error", "model",
                         "refusal", "reasoning_content", "code", "output", "status", "summary", "incomplete_details",
                         "reason"]), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(JSON, st.binary(max_size=20))
def test_reading_never_raises(value, raw):
    for data in (raw, orjson.dumps(value)):
        for dialect in (CHAT, MESSAGES, RESPONSES):
            parsed, usage = read_raw(dialect, data)
            assert isinstance(parsed.text, str)
            assert isinstance(parsed.finish_reason, str)
            assert parsed.reasoning is None or parsed.reasoning
            assert min(parsed.prompt_tokens, parsed.completion_tokens) >= 0
            assert usage is None or usage == (parsed.prompt_tokens, parsed.completion_tokens)


def prompt(*roles: str, say: str = "a") -> Prompt:
    messages = tuple(Message.model_validate({"role": role, "content": f"{say} {n}"}) for n, role in enumerate(roles))
    return Prompt(id=Prompt.id_of(messages), messages=messages, source="s", licence="MIT", split=Split.TRAIN)


def openai(**more) -> OpenAITeacher:
    return OpenAITeacher.model_validate({"base_url": "http://127.0.0.1:1/v1", "model": "m"} | more)


def claude(**more) -> AnthropicTeacher:
    return AnthropicTeacher.model_validate({"base_url": "http://127.0.0.1:1", "model": "m"} | more)


def test_roles_are_passed_through():
    asked = prompt("system", "user", "assistant", "user")
    sent = json.loads(Endpoint(openai(), Collect(), 0).wire(Endpoint(openai(), Collect(), 0).request(asked, 0)))
    assert sent["messages"] == [m.model_dump() for m in asked.messages]
    teacher = Endpoint(claude(), Collect(), 0)
    sent = json.loads(teacher.wire(teacher.request(asked, 0)))
    assert sent["system"] == asked.messages[0].content
    assert sent["messages"] == [m.model_dump() for m in asked.messages[1:]]
    with pytest.raises(PromptError, match="role tool"):
        teacher.request(prompt("user", "assistant", "tool", "user"), 0)


def test_the_key_covers_all_that_is_sent_and_the_sample_and_nothing_else():
    asked = prompt("user")

    def key(teacher=None, which=asked, sample=0, seed=0, **how) -> str:
        return Endpoint(teacher or openai(), Collect(**how), seed).request(which, sample).key

    others = [
        key(openai(model="n")), key(openai(api="responses")),
        key(openai(base_url="http://127.0.0.1:2/v1")), key(openai(extra={"k": 1})),
        key(openai(omit=("seed",))), key(openai(limit_key="max_completion_tokens")), key(claude()),
        key(which=prompt("system", "user")), key(which=prompt("user", say="b")), key(sample=1), key(seed=1),
        key(max_tokens=9), key(temperature=0.1), key(top_p=0.5),
    ]  # fmt: skip
    assert len({key(), *others}) == 1 + len(others)
    assert key(concurrency=3, samples=9) == key()
    assert (
        key(openai(api_key_env="A", timeout=1, attempts=2, terms="own-model", price={"input": 1, "output": 2})) == key()
    )


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(ANY)
@settings(max_examples=400, deadline=None)
def test_fast_canonical_json_is_canonical_json(value):
    assert canonical_fast(value) == canonical(value)


def test_each_sample_has_its_seed():
    teacher = Endpoint(openai(), Collect(), 0)
    seeds = [json.loads(teacher.wire(teacher.request(prompt("user"), sample)))["seed"] for sample in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_the_bound_is_no_smaller_than_the_bytes_of_the_prompt(text):
    messages = (Message(role="user", content=text),)
    asked = Prompt(id=Prompt.id_of(messages), messages=messages, source="s", licence="MIT", split=Split.TRAIN)
    teacher = Endpoint(openai(), Collect(max_tokens=9), 0)
    bound = teacher.bound(teacher.wire(teacher.request(asked, 0)))
    assert bound.prompt > len(text.encode())
    assert bound.completion == 9


def test_who_answers_and_how_it_is_reached():
    def identity(address: str, **more) -> tuple[str, str]:
        who = Endpoint(openai(base_url=address, **more), Collect(), 0).identity
        return who.provider, who.route

    assert identity("http://127.0.0.1:8000/v1") == ("self-hosted", "self-hosted")
    assert identity("http://192.168.1.7/v1") == ("self-hosted", "self-hosted")
    assert identity("https://api.openai.com/v1") == ("api.openai.com", "maker-api")
    assert identity("https://openrouter.ai/api/v1") == ("openrouter.ai", "router")
    assert identity("https://example.org/v1") == ("example.org", "unknown")
    assert identity("https://example.org/v1", route="router") == ("example.org", "router")


# Keys


def test_a_key_comes_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", " sk-1 \n")
    (tmp_path / "key").write_text("sk-2\n")
    assert read_key(openai()) is None
    assert read_key(openai(api_key_env="SOME_KEY")) == "sk-1"
    assert read_key(openai(api_key_file=str(tmp_path / "key"))) == "sk-2"


def test_a_key_that_cannot_be_is_refused_without_showing_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EMPTY", " ")
    monkeypatch.setenv("ODD", "sk-secret and more")
    (tmp_path / "bytes").write_bytes(b"\xffsk-secret")
    for place in ({"api_key_env": "EMPTY"}, {"api_key_env": "NOT_SET"}, {"api_key_env": "ODD"},
                  {"api_key_file": str(tmp_path / "bytes")}, {"api_key_file": "/sk-secret"}):  # fmt: skip
        with pytest.raises(InputError) as error:
            read_key(openai(**place))
        assert "sk-secret" not in str(error.value)
        assert error.value.problems[0].remedy


def test_a_key_that_a_server_repeats_is_taken_out():
    assert scrub(b'{"error": "bad key sk-1!"}', "sk-1") == b'{"error": "bad key [key]!"}'
    assert scrub(json.dumps({"e": 'a"b/c'}).encode(), 'a"b/c') == b'{"e": "[key]"}'
    assert scrub(b"sk-1", None) == b"sk-1"


# When to come back

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "20", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=90), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=90), usegmt=True)}, 0.0),
        ({"retry-after": "1m30s"}, 90.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after(headers, NOW) == seconds


def limits(kind: str, limit: object, remaining: object, reset: object) -> dict[str, str]:
    names = (f"x-ratelimit-{word}-{kind}" for word in ("limit", "remaining", "reset"))
    return dict(zip(names, map(str, (limit, remaining, reset)), strict=True))


def test_a_quota_that_runs_low_says_how_fast_it_fills():
    assert low_quotas({}, NOW) == []
    assert low_quotas(limits("requests", 60, 30, "30s"), NOW) == []
    assert low_quotas(limits("requests", 60, 0, "1m0s"), NOW) == [("requests", 1.0)]
    both = limits("requests", 600, 60, "54s") | limits("tokens", 1000, 10, "990ms")
    assert low_quotas(both, NOW) == [("requests", 10.0), ("tokens", 1000.0)]
    reset = (NOW + timedelta(seconds=7)).isoformat().replace("+00:00", "Z")
    claude_says = {f"anthropic-ratelimit-input-tokens-{word}": value
                   for word, value in (("limit", "70"), ("remaining", "0"), ("reset", reset))}  # fmt: skip
    assert low_quotas(claude_says, NOW) == [("tokens", 10.0)]
    assert low_quotas(limits("requests", 60, 0, "soon"), NOW) == []
    assert low_quotas(limits("requests", "x", 0, "1s"), NOW) == []


@given(st.text(max_size=20))
@settings(deadline=None)
def test_headers_never_raise(value):
    for name in ("retry-after", "retry-after-ms"):
        found = retry_after({name: value}, NOW)
        assert found is None or found >= 0
    for quota in (limits("requests", value, 0, 1), limits("requests", 9, value, 1), limits("requests", 9, 0, value)):
        assert all(found.rate > 0 for found in low_quotas(quota, NOW))


# The recipe


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8000",
        "ftp://x/v1",
        "http://",
        "https://user:sk-secret@x/v1",
        "https://x/v1?key=sk-secret",
        "http://x:y/",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_without_showing_it(tmp_path, address):
    from limbeck.errors import RecipeError
    from limbeck.recipe_file import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: a\nteacher: {{kind: openai, model: m, base_url: '{address}', api_key_env: sk-secret, "
        "api_key: sk-secret}\n"
        "prompts: [{kind: file, path: p.jsonl}]\nstudent: {kind: pretrained, model: m}\n"
        "signal: {kind: text}\ntrain: {loss: cross_entropy}\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert "sk-secret" not in str(error.value)
    assert {re.split(r": ", p.where)[-1] for p in error.value.problems} == {
        "teacher.base_url", "teacher.api_key_env", "teacher.api_key",
    }  # fmt: skip


def test_prices_of_a_recipe_are_checked_as_other_keys_are(tmp_path):
    from limbeck.errors import RecipeError
    from limbeck.recipe_file import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a\nteacher: {kind: openai, model: m, price: {inputx: 1, output: true}}\n"
        "prompts: [{kind: file, path: p.jsonl}]\nstudent: {kind: pretrained, model: m}\n"
        "signal: {kind: text}\ntrain: {loss: cross_entropy}\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    found = {re.split(r": ", p.where)[-1]: p for p in error.value.problems}
    assert found.keys() == {"teacher.price.input", "teacher.price.inputx", "teacher.price.output"}
    assert found["teacher.price.inputx"].remedy == "did you mean teacher.price.input?"
    assert found["teacher.price.output"].expected == "a number"
