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
from told import Told, tell

import limbeck
from limbeck.collect.collect import collect
from limbeck.errors import InputError, RecipeError, RefusedError
from limbeck.ledger.signing.envelope import sign
from limbeck.recipe import Recipe, Use, teachers
from limbeck.render.examples import ExampleSet, read_examples, write_examples
from limbeck.rundir import RunDir
from limbeck.terms import stage
from limbeck.terms.gate import Outcome
from limbeck.terms.rulings import rulings_of
from limbeck.terms.terms import OWN_MODEL, register
from limbeck.terms.token import TokenFile, require_token

TODAY = dt.date(2026, 11, 24)
PUBLISHED = Use(distribution="public-weights", purpose="general-assistant", commercial=True)
KEPT = Use(distribution="internal", purpose="classifier", commercial=True)
LLAMA_3, LLAMA_31 = "meta/llama-3/2024-04-18", "meta/llama-3.1/2024-07-23"

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
    refused = " ".join(call("run", there, "--out", tmp_path / "run").output.split())
    assert "the route does not match" in refused
    assert "route maker-api, and these terms are about self-hosted" in refused
    assert "refused under" not in refused  # no clause was looked at


def test_a_known_host_is_under_its_own_holders_terms_whatever_a_recipe_says(tmp_path):
    deepseek = "deepseek/api/2026-04-29"
    day = ("--day", "2026-11-24")

    def verdict(url: str, terms: str, **more: str) -> tuple[str, str]:
        path = written(tmp_path, values(tmp_path, openai("one", terms, url) | more))
        told = json.loads(call("terms", "check", path, *day, "--json").stdout)
        return told["verdict"], told["reason"]

    assert verdict("https://api.deepseek.com/v1", deepseek)[0] == "allowed"
    said, why = verdict("https://api.openai.com/v1", deepseek)
    assert said == "unknown"
    assert "api.openai.com is under terms of openai" in why
    # Neither does a declared route turn an API into weights of one's own, nor weights into an API.
    said, why = verdict("https://api.openai.com/v1", OWN_MODEL, route="self-hosted")
    assert said == "unknown"
    assert "openai" in why
    said, why = verdict("https://openrouter.ai/api/v1", deepseek, route="maker-api")
    assert said == "unknown"
    assert "openrouter" in why
    # Of a host that nobody knows, the recipe's word is all there is.
    assert verdict("https://llm.example.com/v1", deepseek, route="maker-api")[0] == "allowed"
    refused = call(
        "run",
        written(tmp_path, values(tmp_path, openai("one", deepseek, "https://api.x.ai/v1"))),
        "--out",
        tmp_path / "run",
    )
    assert refused.exit_code == 1
    assert "api.x.ai is under terms of xai" in " ".join(refused.output.split())


def test_every_known_host_is_one_of_a_holder_in_the_register():
    holders = {terms_id.partition("/")[0] for terms_id in register()}
    assert {*teachers._MAKERS.values(), *teachers._ROUTERS.values()} <= holders


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


@pytest.mark.parametrize("ahead", [0, 1])
def test_answers_that_are_there_were_not_generated_on_a_day_to_come(ahead, tmp_path, teacher_dir):
    day = stage.today() + dt.timedelta(days=ahead)
    terms = {"terms": "deepseek/api/2026-04-29", "route": "maker-api", "generated": str(day)}
    told = answered(tmp_path, teacher_dir, **terms)
    told["prompts"][0] |= {"terms": "deepseek/api/2026-04-29", "generated": str(day)}
    checked = call("terms", "check", written(tmp_path, told), "--json")
    assert checked.exit_code == ahead, checked.output
    verdicts = {(one["role"], one["verdict"]) for one in json.loads(checked.stdout)["teachers"]}
    due = "unknown" if ahead else "allowed"
    assert verdicts == {("answer", due), ("prompt", due)}
    own = answered(tmp_path, teacher_dir, **terms | {"terms": "own-model", "route": "self-hosted"})
    assert call("terms", "check", written(tmp_path, own)).exit_code == 0


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


def test_collecting_asks_of_what_the_journal_lacks_and_of_nothing_else(tmp_path, teacher_dir):
    told = answered(tmp_path, teacher_dir, terms=OWN_MODEL, route="self-hosted")
    run = RunDir(limbeck.run(Recipe.model_validate(told), tmp_path / "run", until="prompts").root)
    told["teacher"][0]["terms"] = LLAMA_3
    refused = Recipe.model_validate(told)
    with pytest.raises(RefusedError):
        collect(refused, run)
    assert not (run / "completions.parquet").exists()
    told["teacher"][0]["terms"] = OWN_MODEL
    assert collect(Recipe.model_validate(told), run)["generated"] == 30
    assert collect(refused, run)["generated"] == 0


def test_wrong_rows_and_missing_answers_are_all_told(tmp_path, teacher_dir):
    told = answered(tmp_path, teacher_dir, terms=OWN_MODEL, route="self-hosted")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "completion": 3}\nnonsense\n')
    with pytest.raises(InputError) as caught:
        limbeck.run(Recipe.model_validate(told), tmp_path / "run")
    assert sum("answers.jsonl:" in p.where for p in caught.value.problems) >= 3
