"""What documents tell of how answers came (in batches, out of files with declared days), and of the ledger."""

from __future__ import annotations

import json
import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest
import tiny
from command import call
from conftest import recipe_dict
from markupsafe import Markup

import limbeck
from limbeck.export.eu_summary import eu_summary
from limbeck.export.evidence import read_evidence
from limbeck.export.facts import Facts, read_facts
from limbeck.export.formats import DOCUMENTS
from limbeck.ledger.signing.checkpoints import checkpoints
from limbeck.ledger.store import Ledger, entry_digest
from limbeck.recipe import Recipe
from limbeck.records import Completion
from limbeck.report import view
from limbeck.report.report import render_report
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.testing import Model, Server, Settings

MAKE = {one.name: one.make for one in DOCUMENTS}
DAY = "2026-05-20"
SAID = "Certainly, as everybody knows who can add."


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of two teachers: one asked by its provider's batch API, the answers of the other there already. And how
    many batches the server was given.
    """
    place = tmp_path_factory.mktemp("mixed")
    rows = [{"prompt": f"What is {n} and {n + 1}?", "completion": f"{2 * n + 1}. {SAID}"} for n in range(20)]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    student = tiny.save(place / "student", layers=2)
    settings = Settings(words=8, batch_seconds=0.05, models={"toy": Model(input=Decimal(1), output=Decimal(2))})
    with Server(settings) as server:
        told = recipe_dict(student, place / "answers.jsonl") | {
            "teacher": [
                {"kind": "openai", "base_url": f"{server.url}/v1", "model": "toy", "route": "maker-api",
                 "terms": "deepseek/api/2026-04-29", "price": {"input": 1, "output": 2}},
                {"kind": "file", "path": str(place / "answers.jsonl"), "model": "elsewhere", "route": "maker-api",
                 "terms": "deepseek/api/2026-04-29", "generated": DAY},
            ],
            "collect": {"max_tokens": 20, "temperature": 0.83, "batch": {"rows": 8, "poll": 0.05}},
            "student": {"kind": "pretrained", "model": str(student)},
            "signal": {"kind": "text"},
            "train": {"loss": "cross_entropy", "precision": "float32"},
            "evaluate": {"held_out": 4, "answers": 1, "answer_tokens": 4},
        }  # fmt: skip
        run = limbeck.run(Recipe.model_validate(told), place / "run")
        return run.root, len({charge.batch for charge in server.bill.charges})


@pytest.fixture(scope="module")
def facts(mixed: tuple[Path, int]) -> Facts:
    return read_facts(mixed[0])


def text_of(name: str, facts: Facts) -> str:
    """As a reader of the format has it."""
    made = MAKE[name](facts)
    return made.replace("\\", "") if name.endswith(("card", "summary")) else made


def test_batches_are_counted_as_the_provider_counted_them(facts, mixed):
    asked, there = facts.evidence.teachers
    assert (asked.batches, asked.batched) == (mixed[1], 20)
    assert (there.batches, there.batched, Path(there.file or "").name) == (0, 0, "answers.jsonl")


@pytest.mark.parametrize("name", sorted(MAKE))
def test_every_document_tells_batches_and_files_and_the_day_that_was_declared(facts, mixed, finished_run, name):
    text = text_of(name, facts)
    assert f"all answers by its batch API, in {mixed[1]} batches" in text
    assert "answers of the file answers.jsonl; as declared, route maker-api" in text
    if name != "card":  # which names days under Terms
        assert f"on {DAY}" in text
    assert "batch API" not in text_of(name, read_facts(finished_run))


@pytest.mark.parametrize("name", sorted(MAKE))
def test_nothing_says_that_answers_of_a_file_were_drawn_here(facts, name):
    text = text_of(name, facts)
    assert "All but those of elsewhere were drawn at temperature 0.83" in text
    assert text.count("0.83") == text.count("were drawn at temperature 0.83")
    assert "how they were drawn is not recorded" in text


@pytest.mark.parametrize("name", sorted(MAKE))
def test_no_document_says_in_which_directory_prompts_lay(facts, name):
    (source,) = facts.evidence.sources
    assert Path(source.source).is_absolute()
    assert source.source not in text_of(name, facts)
    assert Path(source.source).name in text_of(name, facts)


def test_the_card_names_root_and_signer_and_its_command_checks_the_run(mixed):
    run, _ = mixed
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        entries = ledger.entries()
    last = list(checkpoints(entries))[-1]
    card = (run / "student" / "README.md").read_text(encoding="utf-8")
    assert f"sha256:{last.statement.root.hex()}" in card
    told = re.search(r"^limbeck (ledger verify RUN --key \w+ --head \S+)$", card, re.MULTILINE)
    assert told
    words = shlex.split(told[1].replace("RUN", str(run)))
    assert words[words.index("--key") + 1] == last.envelope.keyid
    assert words[words.index("--head") + 1] in {entry_digest(entry) for entry in entries}
    assert call(*words).exit_code == 0
    words[words.index("--key") + 1] = "0" * 64
    assert call(*words).exit_code == 1


def test_show_names_root_signer_and_batches(mixed, facts):
    shown = json.loads(call("show", mixed[0], "--json").stdout)["ledger"]
    assert (shown["root"], shown["keys"]) == (facts.ledger.root, list(facts.ledger.keys))
    text = call("show", mixed[0]).stdout
    assert facts.ledger.root in text
    assert re.search(rf"in provider's batches\s+20, in {mixed[1]}\b", text)


def test_the_summary_names_each_file_once_and_repeats_no_stop(facts, finished_run):
    text = eu_summary(facts)
    (source,) = facts.evidence.sources
    assert text.count(f"{source.train} prompts to train on") == 1
    assert str(facts.run.root.parent) not in text
    for told in (text, eu_summary(read_facts(finished_run))):
        assert ".." not in told
        assert ";;" not in told
    made = text.partition("### 2.5")[2].partition("### 2.6")[0]
    assert "whether the answers of answers.jsonl were made by the provider or on its behalf" in made


def test_the_report_tells_batches_files_and_what_is_known_of_the_student_alone(facts, mixed):
    run = RunDir(mixed[0])
    page = Markup(render_report(read_evidence(run.recipe(), run))).striptags()
    assert f"all answers by its batch API, in {mixed[1]} batches" in page
    assert "answers of the file answers.jsonl" in page
    assert facts.ledger.root in page
    rows = {row.label: (row.teacher, row.student) for row in view.sizes(facts.evidence)}
    assert rows["Parameters"] == ("not known", f"{facts.evidence.sizes['student'].parameters:,}")
    assert "How large the student is was not recorded" not in page
    assert "agreement with itself" not in page


def test_a_teachers_answer_that_was_cut_off_is_said_to_be(finished_run):
    run = RunDir(finished_run)
    evidence = read_evidence(run.recipe(), run)
    ends = {(c.prompt_id, c.text): c.finish_reason for c in read_records(run / "completions.parquet", Completion)}
    due = {a.prompt_id for a in evidence.answers if ends[a.prompt_id, a.teacher] == "length"}
    assert evidence.cut_short == due
    page = render_report(evidence)
    assert page.count("Stopped by the most tokens it was allowed.") == len(due) > 0


def test_spdx_claims_no_profile_whose_name_its_context_reads_otherwise(facts):
    """In SPDX's context `extension` is the property Core/extension, so as a profile it is no ProfileIdentifierType."""
    graph = json.loads(MAKE["spdx"](facts))["@graph"]
    (document,) = (e for e in graph if e["type"] == "SpdxDocument")
    properties = {key for element in graph for key in element}
    assert not properties & set(document["profileConformance"])


def test_spdx_says_who_prompts_and_answers_are_from_only_as_far_as_it_is_known(facts):
    graph = {e.get("spdxId"): e for e in json.loads(MAKE["spdx"](facts))["@graph"]}
    by = {e["name"]: [graph[o]["name"] for o in e["originatedBy"]] for e in graph.values() if "originatedBy" in e}
    assert by["answers of toy"] == by["answers of elsewhere"] == ["DeepSeek"]
    (prompts,) = (who for name, who in by.items() if name.startswith("prompts"))
    assert prompts == ["unknown"]
