"""The register against what was read of the field, and rulings: nothing that is left out relaxes one."""

from __future__ import annotations

import datetime as dt
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.recipe import Use
from limbeck.terms.gate import STRICTNESS, Outcome, _rule, rule, rule_route
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Terms, find, register

TODAY = dt.date(2026, 11, 24)
PUBLISHED = Use(distribution="public-weights", purpose="general-assistant", commercial=True)
KEPT = Use(distribution="internal", purpose="classifier", commercial=True)
LLAMA_3, LLAMA_31 = "meta/llama-3/2024-04-18", "meta/llama-3.1/2024-07-23"

SECTION_A = """
openai/api/2026-01-01 transcription | openai/consumer/2026-01-01 transcription
anthropic/api/2025-06-17 transcription | anthropic/usage-policy/2025-09-15 transcription
google/gemini-api/2025-05-20 primary | google/gemini-api/2026-03-23 transcription
google/consumer/2026-07-30 transcription | xai/api/2026-08-14 transcription
xai/acceptable-use/2026-11-24 transcription | xai/grok-2-weights/2025-11-04 primary
mistral/api/2026-09-25 transcription | deepseek/api/2026-04-29 transcription
deepseek/model-license-1.0/2023-10-23 primary | alibaba/qwen-license/2024-09-19 primary
meta/llama-2/2023-07-18 primary | meta/llama-3/2024-04-18 primary | meta/llama-3.1/2024-07-23 transcription
meta/llama-4/2025-04-05 transcription | google/gemma-3/2026-04-01 primary
google/gemma-4-weights/2026-11-24 transcription | openai/gpt-oss/2026-11-24 transcription
nvidia/open-model-license/2025-09-23 primary | microsoft/phi/2024-02-01 primary
allenai/olmo/2026-11-24 unverified | allenai/tulu-3-sft-mixture/2026-11-24 primary
moonshot/kimi-k3/2026-11-24 transcription | zai/glm-5.3/2026-11-24 transcription
zai/glm-5.3-flash/2026-11-24 transcription
minimax/m3/2026-11-24 transcription | cohere/api/2026-09-18 transcription
cohere/open-weights/2026-11-24 primary | stanford/alpaca/2026-11-24 primary
openrouter/router/2026-11-24 transcription
"""
"""What was read of the field: the date in each id, and how it was read."""


def test_the_register_has_what_was_read_of_the_field_with_its_date_and_mark():
    pairs = [pair.split() for line in SECTION_A.strip().splitlines() for pair in line.split(" | ")]
    for terms_id, mark in pairs:
        row = find(terms_id)
        assert (row.read, str(row.effective)) == (mark, terms_id.rpartition("/")[2]), terms_id
        assert row.retrieved >= row.effective or row.read != "primary"


# Rulings


def without(value: object, path: tuple) -> object:
    """A JSON value without what lies at the path."""
    if isinstance(value, dict):
        head, *rest = path
        kept = {k: v for k, v in value.items() if k != head}
        return kept | {head: without(value[head], tuple(rest))} if rest else kept
    assert isinstance(value, list)
    head, *rest = path
    return [without(v, tuple(rest)) if i == head and rest else v for i, v in enumerate(value)]


def paths(value: object, above: tuple = ()) -> list[tuple]:
    """Every key of a JSON value, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(*above, key) for key in value] if isinstance(value, dict) else []
    return found + [path for key, inner in items for path in paths(inner, (*above, key))]


uses = st.builds(
    Use,
    distribution=st.sampled_from(["internal", "hosted", "public-weights"]),
    purpose=st.sampled_from(["general-assistant", "task-specific", "classifier", "research"]),
    commercial=st.booleans(),
)
days = st.dates(dt.date(2023, 1, 1), dt.date(2027, 12, 31))


@settings(max_examples=300)
@given(st.sampled_from([*register()]), uses, days, st.data())
def test_leaving_any_field_of_terms_out_never_relaxes(terms_id, use, day, data):
    told = json.loads(find(terms_id).model_dump_json(exclude_defaults=True))
    path = data.draw(st.sampled_from(paths(told)))
    full = _rule(find(terms_id), use, day)
    try:
        less = _rule(Terms.model_validate(without(told, path)), use, day)
    except ValidationError:
        return  # no row, so nothing is let through
    assert STRICTNESS[less.verdict] >= STRICTNESS[full.verdict], path
    if less.passes:
        assert {(o.kind, o.value) for o in full.obligations} <= {(o.kind, o.value) for o in less.obligations}, path


@given(st.sampled_from([*register(), OWN_MODEL, UNKNOWN]), uses, days)
def test_a_route_or_a_day_that_is_not_said_never_relaxes(terms_id, use, day):
    due = "self-hosted" if terms_id in (OWN_MODEL, UNKNOWN) else find(terms_id).route
    full = rule_route(terms_id, use, day, due)
    assert full.verdict == rule(terms_id, use, day).verdict
    for less in (rule_route(terms_id, use, day, "unknown"), rule_route(terms_id, use, None, due)):
        assert not less.passes or (terms_id == OWN_MODEL and full.passes)


@pytest.mark.parametrize(
    ("terms_id", "route", "use", "verdict"),
    [
        (LLAMA_3, "self-hosted", PUBLISHED, Outcome.REFUSED),
        (LLAMA_31, "self-hosted", PUBLISHED, Outcome.ALLOWED),
        ("google/gemma-3/2026-04-01", "self-hosted", PUBLISHED, Outcome.ALLOWED),
        ("google/gemma-4-weights/2026-11-24", "self-hosted", PUBLISHED, Outcome.ALLOWED),
        ("google/gemini-api/2026-03-23", "maker-api", PUBLISHED, Outcome.REFUSED),
        ("google/gemma-4-weights/2026-11-24", "maker-api", PUBLISHED, Outcome.UNKNOWN),
        ("openai/api/2026-01-01", "maker-api", KEPT, Outcome.ALLOWED),
        (
            "openai/api/2026-01-01",
            "maker-api",
            KEPT.model_copy(update={"distribution": "public-weights"}),
            Outcome.UNKNOWN,
        ),
        ("deepseek/v4-weights/2026-11-24", "self-hosted", PUBLISHED, Outcome.ALLOWED),
        ("deepseek/v4-weights/2026-11-24", "router", PUBLISHED, Outcome.UNKNOWN),
        ("deepseek/api/2026-04-29", "maker-api", PUBLISHED, Outcome.ALLOWED),
        ("xai/api/2026-08-14", "maker-api", KEPT, Outcome.REFUSED),
        ("huggingface/smollm2/2025-02-07", "self-hosted", PUBLISHED, Outcome.ALLOWED),
        (OWN_MODEL, "maker-api", KEPT, Outcome.UNKNOWN),
    ],
)
def test_golden_pairs_by_route(terms_id, route, use, verdict):
    assert rule_route(terms_id, use, TODAY, route).verdict is verdict


def test_what_travels_differs_between_gemma_3_and_4_and_between_deepseeks_routes():
    def kinds(terms_id: str) -> set[str]:
        return {o.kind for o in rule(terms_id, PUBLISHED, TODAY).obligations}

    assert kinds("google/gemma-3/2026-04-01") == {"notice", "use-limits"}
    assert kinds("google/gemma-4-weights/2026-11-24") == set()
    assert kinds("deepseek/api/2026-04-29") == {"label"}
    assert kinds("deepseek/v4-weights/2026-11-24") == set()
