"""The toy model behind the test server: its vocabulary, its distribution, its structured answers."""

from __future__ import annotations

import json
import math

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.testing.answers import Ask, Tool, Twist, body_digest, compose, content_seed, words
from limbeck.testing.schema import instance
from limbeck.testing.settings import Model, Settings
from limbeck.testing.vocabulary import END, WORDS, Vocabulary

VOCABULARY = Vocabulary(512)


def composed(model: Model | None = None, told: Settings | None = None, choice: int = 0, **asked):
    ask = Ask(**{"model": "toy", "seed": b"0123456789abcdef" * 2, "prompt": "hello", **asked})
    return compose(ask, choice, model or Model(), told or Settings(), VOCABULARY)


@given(st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join))
@settings(deadline=None, derandomize=True)
def test_every_text_goes_into_tokens_and_back(text):
    ids = VOCABULARY.encode(text)
    assert VOCABULARY.decode(ids) == text
    assert VOCABULARY.count(text) == len(ids)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 20_000))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_word_is_one_token_and_five_bytes(seed, count):
    text = words(seed, count)
    assert text.split() == [word for word in text.split(" ") if word in WORDS]
    assert len(text.split()) == VOCABULARY.count(text) == count
    assert len(text) == 5 * count - 1


@given(st.lists(st.integers(0, 511), max_size=8))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_log_probabilities_are_a_distribution(context):
    logprobs = VOCABULARY.logprobs(context)
    assert logprobs.shape == (512,)
    assert math.isclose(math.fsum(math.exp(value) for value in logprobs), 1, rel_tol=1e-12)


def test_every_token_of_a_context_matters():
    plain = VOCABULARY.logprobs([1, 2, 3])
    for other in ([1, 2], [2, 1, 3], [1, 2, 4], [0, 1, 2, 3]):
        assert not np.array_equal(plain, VOCABULARY.logprobs(other))
    assert np.array_equal(plain, Vocabulary(512).logprobs([1, 2, 3]))


def test_tokens_are_drawn_by_their_probability():
    """Chi-squared against the distribution itself, over the tokens that are expected at least 20 times."""
    n, probs = 4000, np.exp(VOCABULARY.logprobs([7]))
    counts = np.bincount([VOCABULARY.draw([7], 1.0, seed) for seed in range(n)], minlength=512)
    often = n * probs >= 20
    expected = np.append(n * probs[often], n * probs[~often].sum())
    observed = np.append(counts[often], counts[~often].sum())
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_greedy_token_is_the_most_likely_one():
    for start in range(20):
        assert VOCABULARY.draw([start], 0, 1) == int(np.argmax(VOCABULARY.logprobs([start])))


def test_a_shorter_limit_gives_a_prefix():
    whole = composed()
    assert whole.finish == "stop"
    assert whole.tokens == 240
    for limit in (1, 7, 239):
        cut = composed(max_tokens=limit)
        assert (cut.finish, cut.tokens) == ("length", limit)
        assert whole.text.startswith(cut.text)
    assert composed(max_tokens=240) == whole


def test_reasoning_counts_against_the_limit():
    thinker = Model(reasoning=64)
    assert (composed(thinker).reasoning_tokens, composed(thinker).text_tokens) == (64, 240)
    cut = composed(thinker, max_tokens=100)
    assert (cut.reasoning_tokens, cut.text_tokens, cut.finish) == (64, 36, "length")
    only = composed(thinker, max_tokens=50)
    assert (only.reasoning_tokens, only.text, only.finish) == (50, "", "length")


def test_an_answer_ends_before_its_stop_sequence():
    whole = composed().text
    stop = whole[50:54]
    answer = composed(stop=("not there", stop))
    assert (answer.text, answer.stop_sequence, answer.finish) == (whole[: whole.find(stop)], stop, "stop_sequence")
    assert composed(stop=(stop,), max_tokens=2).finish == "length"


def test_choices_and_seeds_differ_and_lengths_spread():
    texts = {composed(choice=choice).text for choice in range(20)}
    assert len(texts) == 20
    told = Settings(words=100, spread=0.5)
    lengths = [composed(told=told, choice=choice).tokens for choice in range(300)]
    assert 50 <= min(lengths) < 60
    assert 140 < max(lengths) <= 150
    assert 93 < sum(lengths) / 300 < 107


def test_faults_change_what_is_written():
    truncated = composed(twist=Twist("truncated", 0.25))
    assert (truncated.tokens, truncated.finish) == (60, "length")
    assert composed(twist=Twist("refusal")).finish == "refusal"
    assert composed(twist=Twist("filter")).finish == "filter"


def test_content_decides_the_text_and_bookkeeping_does_not():
    body = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    same = {"n": 3, "max_tokens": 5, **body, "user": "x"}
    assert content_seed(body) == content_seed(same)
    assert body_digest(body) != body_digest(same)
    assert body_digest(body) == body_digest(dict(reversed(body.items())))
    for key, value in (("seed", 2), ("model", "other"), ("temperature", 0.5)):
        assert content_seed(body) != content_seed({**body, key: value})


NAMES = st.sampled_from(["a", "b", "c"])
LEAVES = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": [1, "x", None]}, {"const": {"k": [1]}}])
    | st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
                st.integers(-99, 99), st.integers(0, 50))
    | st.builds(lambda low: {"type": "number", "exclusiveMinimum": low}, st.integers(-9, 9))
    | st.builds(lambda high: {"type": "integer", "maximum": high}, st.integers(-9, 9))
    | st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
                st.integers(0, 40), st.integers(0, 20))
    | st.sampled_from([{"type": "string", "format": form} for form in ("date", "date-time", "email")])
)  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3).map(
            lambda p: {"type": "object", "properties": p, "required": sorted(p), "additionalProperties": False}
        )
        | st.builds(lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 1},
                    inner, st.integers(0, 3))
        | st.lists(inner, min_size=1, max_size=3).map(lambda members: {"anyOf": members})
    ),
    max_leaves=8,
)  # fmt: skip


@given(SCHEMAS, st.binary(min_size=4, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_an_instance_fits_its_schema(schema, digest):
    made = instance(schema, digest)
    jsonschema.validate(made, schema, format_checker=jsonschema.FormatChecker())
    assert made == instance(schema, digest)


def test_a_schema_that_holds_itself_ends():
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
                                                                               {"type": "null"}]}},
                "required": ["value", "next"],
            }
        },
    }  # fmt: skip
    for number in range(50):
        jsonschema.validate(instance(schema, bytes([number])), schema)


def test_parts_of_all_of_hold_together():
    schema = {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"type": "boolean"}}, "required": ["y"]}],
              "$defs": {"a": {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}}}  # fmt: skip
    jsonschema.validate(made := instance(schema, b"q"), schema)
    assert set(made) == {"x", "y"}


def test_arguments_of_a_tool_fit_its_schema():
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    answer = composed(tool=Tool("weather", schema))
    assert answer.finish == "tool"
    assert answer.text == ""
    jsonschema.validate(json.loads(answer.arguments), schema)


def test_the_end_is_a_token_that_can_come():
    assert VOCABULARY.logprobs([3])[END] > -30


@pytest.mark.parametrize("size", [256, 300, 50_000])
def test_a_vocabulary_has_the_size_it_is_told(size):
    vocabulary = Vocabulary(size)
    assert vocabulary.logprobs([1]).shape == (size,) == (len(vocabulary.tokens),)
    assert len({vocabulary.text(number) for number in range(size)}) == size
    assert vocabulary.decode(vocabulary.encode("batu été")) == "batu été"
