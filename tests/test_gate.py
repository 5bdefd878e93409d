"""The gate in the pipeline: nothing refused is bought, nothing is trained without a token, a token is for one set."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import yaml
from command import call
from conftest import prompt_file
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from told import Told, tell

import limbeck
from limbeck.errors import InputError, RecipeError, RefusedError
from limbeck.ledger.canonical import digest_file
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.recipe import Recipe, Use
from limbeck.render.examples import ExampleSet, read_examples, write_examples
from limbeck.rundir import RunDir
from limbeck.terms import stage
from limbeck.terms.gate import STRICTNESS, Outcome, _rule, rule, rule_route
from limbeck.terms.obligations import name_problems, notice, shown
from limbeck.terms.rulings import rulings_of
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, Terms, find, register
from limbeck.terms.token import TokenFile, parse_token, require_token
from limbeck.terms.waivers import make_waiver

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


# Before anything is bought


def values(place: Path, *teachers: dict, **more) -> dict:
    return {
        "name": "asked",
        "use": {"distribution": "public-weights"},
        "teacher": list(teachers),
        "prompts": [{"kind": "file", "path": str(prompt_file(place / "prompts.jsonl", 40))}],
        "student": {"kind": "pretrained", "model": "hf:org/not-there@main"},
        "signal": {"kind": "text"},
        "train": {"loss": "cross_entropy"},
    } | more


def openai(model: str, terms: str | None, url: str = "http://127.0.0.1:9/v1") -> dict:
    return {"kind": "openai", "base_url": url, "model": model} | ({"terms": terms} if terms else {})


def written(place: Path, told: dict) -> Path:
    (place / "recipe.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return place / "recipe.yaml"


@pytest.mark.parametrize("command", ["run", "collect"])
def test_a_refused_recipe_is_refused_before_anything_is_asked_with_all_that_refuse(command, tmp_path):
    path = written(tmp_path, values(tmp_path, openai("one", LLAMA_3), openai("two", None), openai("three", OWN_MODEL)))
    refused = call(command, path, "--out", tmp_path / "run")
    assert refused.exit_code == 1, refused.output
    assert "refused under our reading of Meta Llama 3 Community License Agreement 1.b.v, version " in refused.output
    assert "answer of one" in refused.output
    assert "answer of two" in refused.output
    assert "answer of three" not in refused.output
    for remedy in ("another teacher", "another use", "limbeck terms waive", "`terms: own-model`"):
        assert remedy in refused.output
    assert "illegal" not in refused.output
    assert not (tmp_path / "run").exists()
    assert call("terms", "check", path).exit_code == 1


def test_a_pilot_buys_nothing_either(tmp_path):
    path = written(tmp_path, values(tmp_path, openai("one", LLAMA_3)))
    assert call("estimate", path, "--pilot", 2, "--out", tmp_path / "run").exit_code == 1
    assert not (tmp_path / "run").exists()


def test_one_models_weights_are_under_other_terms_by_its_makers_api(tmp_path):
    weights = "google/gemma-4-weights/2026-11-24"
    here = written(tmp_path, values(tmp_path, openai("gemma-4", weights)))
    day = ("--day", "2026-11-24")
    assert call("terms", "check", here, *day).exit_code == 0
    api = "https://generativelanguage.googleapis.com/v1beta/openai"
    there = written(tmp_path, values(tmp_path, openai("gemma-4", weights, api)))
    checked = call("terms", "check", there, *day, "--json")
    assert checked.exit_code == 1
    assert json.loads(checked.stdout)["verdict"] == "unknown"
    assert "maker-api" in json.loads(checked.stdout)["reason"]


def test_the_name_begins_as_the_licence_asks(tmp_path):
    told = values(tmp_path, openai("one", LLAMA_31))
    refused = call("run", written(tmp_path, told), "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "set name: Llama-asked" in refused.output
    stage.refuse_before(Recipe.model_validate(told | {"name": "Llama-asked"}))
    stage.refuse_before(Recipe.model_validate(told | {"use": {"distribution": "internal"}}))
    with pytest.raises(RecipeError):
        stage.refuse_before(Recipe.model_validate(told))


def test_who_only_says_probabilities_counts_too(tmp_path):
    told = values(tmp_path, {"model": "a", "terms": OWN_MODEL}, signal={"kind": "hidden"}, train={})
    roles = {s.role for s in stage.declared(Recipe.model_validate(told), TODAY)}
    assert roles == {"answer", "signal"}
    self_written = told | {"prompts": [{"kind": "self-prompt", "count": 9}]}
    roles = {s.role for s in stage.declared(Recipe.model_validate(self_written), TODAY)}
    assert roles == {"answer", "signal", "prompt"}


def test_prompts_that_a_model_wrote_count_by_their_own_terms_and_day(tmp_path):
    told = values(tmp_path, openai("one", OWN_MODEL))
    told["prompts"][0] |= {"terms": LLAMA_3, "generated": "2025-01-01"}
    with pytest.raises(RefusedError, match="prompt of"):
        stage.refuse_before(Recipe.model_validate(told))
    told["prompts"][0] |= {"terms": "deepseek/api/2026-04-29", "generated": "2026-05-01"}
    stage.refuse_before(Recipe.model_validate(told))
    told["prompts"][0] |= {"generated": None}
    with pytest.raises(RefusedError, match="which day"):
        stage.refuse_before(Recipe.model_validate(told))


# The stage and its token


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return runs.make_run(tmp_path_factory.mktemp("whole") / "run", until="annotate")


@pytest.fixture
def copy(whole, tmp_path) -> RunDir:
    return RunDir(shutil.copytree(whole, tmp_path / "run"))


def examples_of(run: RunDir):
    return read_examples(run / "examples").examples


def test_rows_and_tokens_are_counted_by_source(whole):
    found = rulings_of(whole)
    assert found is not None
    examples = read_examples(whole / "examples")
    (answers,) = [one for one in found.rulings if one.role == "answer"]
    assert (answers.rows, answers.tokens) == (len(examples.examples), sum(e.supervised for e in examples.train))
    assert found.verdict is Outcome.ALLOWED
    assert found.passes
    one = found.strictest_of(runs.TEACHER)
    assert one is not None
    assert (one.rows, one.tokens) == (answers.rows, answers.tokens)


def test_the_token_lets_its_own_set_through(copy):
    require_token(runs.RECIPE, copy, examples_of(copy))


def _other_use(_: RunDir) -> dict:
    return {"recipe": runs.RECIPE.model_copy(update={"use": KEPT})}


def _fewer(run: RunDir) -> dict:
    return {"examples": examples_of(run)[1:]}


def _tokens_changed(run: RunDir) -> dict:
    """What stands beside the tokens is left as it was."""
    found = read_examples(run / "examples")
    first, *others = found.examples
    edited = replace(first, tokens_T=first.tokens_T + 1)
    write_examples(run / "examples", ExampleSet([edited, *others], found.manifest))
    return {}


def _rulings_changed(run: RunDir) -> dict:
    path = run / "gate" / "rulings.json"
    path.write_text(path.read_text().replace("allowed", "waived"))
    return {}


def _by_another_key(run: RunDir) -> dict:
    path = run / "gate" / "token.json"
    file = TokenFile.model_validate_json(path.read_bytes())
    forged = file.model_copy(update={"token": sign(file.token.statement(), Ed25519PrivateKey.generate())})
    path.write_text(forged.model_dump_json(by_alias=True))
    return {}


def _no_token(run: RunDir) -> dict:
    (run / "gate" / "token.json").unlink()
    return {}


def _another_teacher(_: RunDir) -> dict:
    more = (*runs.RECIPE.teachers, runs.RECIPE.teachers[0].model_copy(update={"model": "./other"}))
    return {"recipe": runs.RECIPE.model_copy(update={"teacher": more})}


@pytest.mark.parametrize(
    "change",
    [_other_use, _fewer, _tokens_changed, _rulings_changed, _by_another_key, _no_token, _another_teacher],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_token_is_for_one_set_use_and_key(change, copy):
    given = {"recipe": runs.RECIPE} | change(copy)
    with pytest.raises(RefusedError):
        require_token(given["recipe"], copy, given.get("examples", examples_of(copy)))


def test_training_from_python_asks_for_the_token(copy):
    from limbeck.train.stage import train

    shutil.rmtree(copy / "gate")
    with pytest.raises(RefusedError, match="did not let this set through"):
        train(runs.RECIPE, copy)


def test_a_row_is_ruled_on_by_the_day_it_was_generated(tmp_path):
    """The answers are of 2026-11-01."""
    recipe, run = tell(tmp_path / "run", Told(terms="google/gemma-3/2026-04-01"), until="seal")
    assert stage.gate(recipe, run)["verdict"] == "allowed"
    recipe, run = tell(tmp_path / "late", Told(terms="deepseek/r1-weights/2026-11-24"), until="seal")
    with pytest.raises(RefusedError, match="generated on 2026-11-01, before the terms held"):
        stage.gate(recipe, run)
    assert not (run / "gate").exists()


# Waivers


def waived(place: Path, terms: str = LLAMA_3, use: Use | None = None, days: int = 30) -> str:
    use = use or Use(distribution="internal", purpose="research")
    expires = stage.today() + dt.timedelta(days=days)
    made = make_waiver(terms, use, by="A. Counsel", reason="order form 7 allows it", expires=expires)
    path = place / f"{terms.replace('/', '-')}-{use.distribution}.json"
    path.write_bytes(made.envelope.data)
    return str(path)


@pytest.fixture
def forbidden(tmp_path) -> tuple[Recipe, RunDir]:
    return tell(tmp_path / "run", Told(terms=LLAMA_3), until="seal")


def under(recipe: Recipe, *paths: str) -> Recipe:
    return recipe.model_copy(update={"waivers": paths})


def test_a_waiver_lets_through_what_it_is_for_and_is_named_everywhere(forbidden, tmp_path):
    recipe, run = forbidden
    with pytest.raises(RefusedError):
        stage.gate(recipe, run)
    recipe = under(recipe, waived(tmp_path))
    facts = stage.gate(recipe, run)
    assert facts["verdict"] == "waived"
    found = rulings_of(run.root)
    assert found is not None
    assert {one.verdict for one in found.rulings} == {Outcome.WAIVED}
    assert found.waivers[0].by == "A. Counsel"
    assert "order form 7" in found.rulings[0].reason
    assert "refused under our reading" in found.rulings[0].reason
    token = parse_token(TokenFile.model_validate_json((run / "gate" / "token.json").read_bytes()).token)
    assert token.predicate.waivers == [digest_file(recipe.waivers[0]).removeprefix("sha256:")]
    require_token(recipe, run, examples_of(run))


def test_a_waiver_that_expired_since_lets_nothing_be_trained(forbidden, tmp_path, monkeypatch):
    recipe, run = forbidden
    recipe = under(recipe, waived(tmp_path, days=0))
    stage.gate(recipe, run)
    require_token(recipe, run, examples_of(run))
    tomorrow = stage.today() + dt.timedelta(days=1)
    for module in ("token", "stage"):
        monkeypatch.setattr(f"limbeck.terms.{module}.today", lambda: tomorrow)
    with pytest.raises(RefusedError, match="expired after"):
        require_token(recipe, run, examples_of(run))
    with pytest.raises(RefusedError, match="expired after"):
        stage.gate(recipe, run)


def test_a_waiver_for_another_use_or_terms_or_by_another_key_lets_nothing_through(forbidden, tmp_path):
    recipe, run = forbidden
    published = waived(tmp_path, use=PUBLISHED)
    with pytest.raises(RefusedError, match="for another use"):
        stage.gate(under(recipe, published), run)
    with pytest.raises(RefusedError):
        stage.gate(under(recipe, waived(tmp_path, terms="meta/llama-2/2023-07-18")), run)
    good = Envelope.model_validate_json(Path(waived(tmp_path)).read_text())
    (tmp_path / "forged.json").write_bytes(sign(good.statement(), Ed25519PrivateKey.generate()).data)
    with pytest.raises(RefusedError, match="which signs the ledger"):
        stage.gate(under(recipe, str(tmp_path / "forged.json")), run)
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        stage.gate(under(recipe, str(tmp_path / "text.json")), run)


def test_waive_writes_what_run_and_check_take(tmp_path):
    told = values(tmp_path, openai("one", LLAMA_3))
    path = written(tmp_path, told)
    words = ("--terms", LLAMA_3, "--by", "A. Counsel", "--reason", "because")
    out = tmp_path / "waiver.json"
    made = call("terms", "waive", path, *words, "--expires", "2999-12-31", "--out", out)
    assert made.exit_code == 0, made.output
    path = written(tmp_path, told | {"waivers": ["waiver.json"]})
    checked = call("terms", "check", path, "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["verdict"] == "waived"
    assert "A. Counsel" in json.loads(checked.stdout)["reason"]
    past = call("terms", "waive", path, *words, "--expires", "2020-01-01", "--out", out)
    assert past.exit_code == 2
    assert call("terms", "waive", path, *words, "--expires", "2999-12-31", "--out", path).exit_code == 2


# Obligations


def test_notices_and_words_are_those_of_the_terms(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(terms=LLAMA_31), until="seal")
    recipe = recipe.model_copy(update={"use": PUBLISHED, "name": "Llama-asked"})
    stage.gate(recipe, run)
    found = rulings_of(run.root)
    assert found is not None
    text = notice(found.rulings)
    assert "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc." in text
    assert "Acceptable Use Policy" in text
    assert shown(found.obligations) == ["Built with Llama"]
    assert not name_problems("Llama-asked", found.obligations)
    assert name_problems("asked", found.obligations)
    assert notice(()) == ""
    with pytest.raises(RecipeError):
        stage.gate(recipe.model_copy(update={"name": "asked"}), run)


def test_two_licences_that_ask_for_two_names_cannot_both_be_kept():
    both = [o.model_copy(update={"value": v}) for o in find(LLAMA_31).obligations[:1] for v in ("Llama", "Ostrich")]
    assert "Ostrich" in name_problems("Llama-x", both)[0].found


# Answers that are there already


def answered(place: Path, teacher_dir: Path, **teacher) -> dict:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is the number {i}, after {i - 1}."} for i in range(30)]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return values(
        place,
        {"kind": "file", "path": str(place / "answers.jsonl"), "model": "some-model"} | teacher,
        prompts=[{"kind": "file", "path": str(place / "answers.jsonl")}],
        student={"kind": "pretrained", "model": str(teacher_dir)},
        evaluate={"held_out": 6},
        use={"distribution": "internal", "purpose": "classifier"},
    )


def test_ones_own_answers_pass_the_gate_under_declared_terms(tmp_path, teacher_dir):
    told = {"terms": "openai/api/2026-01-01", "route": "maker-api", "generated": "2026-02-01"}
    run = limbeck.run(Recipe.model_validate(answered(tmp_path, teacher_dir, **told)), tmp_path / "run", until="gate")
    found = rulings_of(run.root)
    assert found is not None
    (one,) = found.rulings
    assert (one.name, one.terms, one.day) == ("some-model", "openai/api/2026-01-01", dt.date(2026, 2, 1))
    assert one.rows == 30
    assert one.tokens == sum(e.supervised for e in read_examples(run.root / "examples").train)
    assert limbeck.ledger.verify(run.root).ok


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"terms": "openai/api/2026-01-01", "route": "maker-api"},
        {"terms": "openai/api/2026-01-01", "generated": "2026-02-01"},
        {"terms": "openai/api/2026-01-01", "route": "maker-api", "generated": "2025-12-31"},
        {"terms": "xai/api/2026-08-14", "route": "maker-api", "generated": "2026-10-01"},
    ],
)
def test_ones_own_answers_without_source_terms_or_day_are_refused(more, tmp_path, teacher_dir):
    with pytest.raises(RefusedError):
        limbeck.run(Recipe.model_validate(answered(tmp_path, teacher_dir, **more)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_rows_and_missing_answers_are_all_told(tmp_path, teacher_dir):
    told = answered(tmp_path, teacher_dir, terms=OWN_MODEL, route="self-hosted")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "completion": 3}\nnonsense\n')
    with pytest.raises(InputError) as caught:
        limbeck.run(Recipe.model_validate(told), tmp_path / "run")
    assert sum("answers.jsonl:" in p.where for p in caught.value.problems) >= 3
