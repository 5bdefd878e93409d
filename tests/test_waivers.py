"""Waivers let through what they are for, until their day; obligations are carried out in the terms' own words."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from pathlib import Path

import pytest
from command import call
from conftest import prompt_file, recipe_dict
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from test_gate import LLAMA_3, LLAMA_31, PUBLISHED, examples_of, openai, values, written
from told import Told, tell

import limbeck
from limbeck.errors import InputError, RecipeError, RefusedError
from limbeck.export.card import card_text
from limbeck.export.evidence import read_evidence
from limbeck.export.facts import read_facts, read_teachers
from limbeck.export.formats import DOCUMENTS
from limbeck.export.properties import use_properties
from limbeck.ledger.canonical import digest_file
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.recipe import Recipe, Use
from limbeck.report.report import render_report
from limbeck.rundir import RunDir
from limbeck.terms import stage
from limbeck.terms.gate import Outcome
from limbeck.terms.obligations import name_problems, notice, shown
from limbeck.terms.rulings import rulings_of
from limbeck.terms.terms import find
from limbeck.terms.token import TokenFile, parse_token, require_token
from limbeck.terms.waivers import make_waiver

# Waivers


def waived(
    place: Path, terms: str = LLAMA_3, use: Use | None = None, days: int = 30, reason: str = "order form 7 allows it"
) -> str:
    use = use or Use(distribution="internal", purpose="research")
    expires = stage.today() + dt.timedelta(days=days)
    made = make_waiver(terms, use, by="A. Counsel", reason=reason, expires=expires)
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


def test_card_and_report_name_waiver_and_obligations_and_foreign_words_stay_text(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(terms=LLAMA_3), until="seal")
    recipe = under(recipe, waived(tmp_path, reason="because <script>alert(1)</script> of order form 7"))
    stage.gate(recipe, run)
    evidence = read_evidence(recipe, run)
    for text in (card_text(evidence, None), render_report(evidence)):
        assert "<script" not in text
        assert "order form 7" in text
        assert "A. Counsel" in text
    recipe, run = tell(tmp_path / "llama", Told(terms=LLAMA_31), until="seal")
    recipe = recipe.model_copy(update={"use": PUBLISHED, "name": "Llama-asked"})
    stage.gate(recipe, run)
    evidence = read_evidence(recipe, run)
    card = card_text(evidence, None)
    assert card.split("# Llama-asked")[1].lstrip().startswith("**Built with Llama**")
    assert "Keep to the Acceptable Use Policy" in card
    assert "Keep to the Acceptable Use Policy" in render_report(evidence)


def test_exports_say_what_the_gate_said_and_the_register_only_where_no_gate_ruled(forbidden, finished_run, tmp_path):
    recipe, run = forbidden
    recipe = under(recipe, waived(tmp_path))
    stage.gate(recipe, run)
    evidence, finished = read_evidence(recipe, run), read_facts(finished_run)
    told = read_teachers(evidence, run)
    assert [(one.seen.terms, one.ruling.verdict) for one in told] == [(LLAMA_3, Outcome.WAIVED)]
    assert "order form 7" in told[0].ruling.reason
    alone = read_teachers(dataclasses.replace(evidence, rulings=None), run)
    assert [one.ruling.verdict for one in alone] == [Outcome.REFUSED]
    (maker,) = read_teachers(dataclasses.replace(evidence, rulings=None, teachers=tuple(
        seen._replace(route="maker-api") for seen in evidence.teachers)), run)  # fmt: skip
    assert maker.ruling.verdict is Outcome.UNKNOWN  # these terms are about weights of one's own
    seen = dataclasses.replace(finished.evidence, rulings=evidence.rulings)
    facts = dataclasses.replace(finished, evidence=seen, teachers=told)
    for one in DOCUMENTS:
        if one.name != "card":  # which is what lies in the run
            assert "A. Counsel let" in one.make(facts), one.name
            assert "refused" not in one.make(facts).replace("refused under", ""), one.name
            assert "A. Counsel" not in one.make(finished), one.name
    assert dict(use_properties(facts))["limbeck:gate:verdict"] == "waived"
    assert dict(use_properties(finished))["limbeck:gate:verdict"] == "allowed"


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


def test_what_the_licence_asks_lies_beside_the_weights_and_is_part_of_the_student(tmp_path, teacher_dir):
    told = recipe_dict(teacher_dir, prompt_file(tmp_path / "prompts.jsonl", 30)) | {"name": "Llama-tiny"}
    told["teacher"]["terms"] = LLAMA_31
    told["use"] = {"distribution": "public-weights"}
    told["train"]["epochs"] = 1
    run = limbeck.run(Recipe.model_validate(told), tmp_path / "run")
    assert "Llama 3.1 Community License, Copyright" in (run.student / "NOTICE").read_text()
    assert "**Built with Llama**" in (run.student / "README.md").read_text()
    assert limbeck.ledger.verify(run.root).ok
    (run.student / "NOTICE").write_text("none")
    assert [p.where for p in limbeck.ledger.verify(run.root).differences] == ["student/NOTICE"]


def test_two_licences_that_ask_for_two_names_cannot_both_be_kept():
    both = [o.model_copy(update={"value": v}) for o in find(LLAMA_31).obligations[:1] for v in ("Llama", "Ostrich")]
    assert "Ostrich" in name_problems("Llama-x", both)[0].found
