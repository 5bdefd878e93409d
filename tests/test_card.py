"""Laws of the model card: what it says is in the records, and foreign text stays text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from told import FIGURES, Told, recipe_of, tell

from limbeck import models
from limbeck.errors import ModelError
from limbeck.export.card import card, card_text, front_matter
from limbeck.export.evidence import read_evidence
from limbeck.export.words import duration, markdown, number, percent, size, visible
from limbeck.ledger.canonical import digest_path
from limbeck.ledger.store import entry_digest
from limbeck.recipe import Recipe
from limbeck.rundir import RunDir

HUB = r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))"
"""How the Hugging Face hub finds the front matter (huggingface_hub, repocard.py)."""

HOSTILE = (
    "x\n---\nlicense: mit\n---\n| a | b |\r\n<script>alert(1)</script> *b* `c` [d](http://e.example) $$f$$ \u202eg\x00"
)


def head_of(text: str) -> dict:
    match = re.match(HUB, text)
    assert match
    return yaml.safe_load(match[2])


def body_of(text: str) -> str:
    return re.sub(HUB, "", text, count=1)


@pytest.fixture(autouse=True)
def known_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(ref: str) -> models.Source:
        if ref.startswith("hf:gone"):
            raise ModelError("a model cannot be had")
        return models.Source(ref, Path(), None, "sha256:" + "0" * 64, {"hf:odd/one@1": HOSTILE}.get(ref, "Apache-2.0"))

    monkeypatch.setattr(models, "resolve", resolve)


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    return tell(tmp_path_factory.mktemp("told") / "run")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, its head and rule left out."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = section[section.index("\n|") + 1 :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_front_matter_is_what_the_hub_reads(told_run):
    recipe, run = told_run
    card(recipe, run)
    head = head_of((run / "student" / "README.md").read_text(encoding="utf-8"))
    assert head == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "limbeck", "synthetic"],
    }


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        (None, {"license": "unknown"}),
        ("Qwen-1.0", {"license": "other", "license_name": "Qwen-1.0"}),
    ],
)
def test_licences_are_the_hubs_or_other_with_a_name(licence, fields):
    head = yaml.safe_load(front_matter(recipe_of(Told()), licence))
    assert {k: v for k, v in head.items() if k.startswith("license")} == fields


def test_a_base_model_from_the_hub_is_named():
    recipe = recipe_of(Told(teachers=("hf:some/model@abc",)))
    assert yaml.safe_load(front_matter(recipe, "MIT"))["base_model"] == "some/model"
    assert "base_model" not in yaml.safe_load(front_matter(recipe_of(Told()), "MIT"))


def test_a_model_that_is_gone_has_an_unknown_licence(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(teachers=("hf:gone/model@1",)))
    assert card(recipe, run)["licence"] == "unknown"
    assert head_of((run / "student" / "README.md").read_text(encoding="utf-8"))["license"] == "unknown"


def test_every_figure_comes_from_the_scores(told_run):
    text = card_text(read_evidence(*told_run), "Apache-2.0")
    table = {(name, subject): (value, ends) for name, subject, value, ends, _ in rows(text, "Scores")}
    labels = {"student": "student", "before": "student before training", "teacher": "teacher"}
    assert len(table) == len(FIGURES)
    for (name, subject), (value, low, high) in FIGURES.items():
        assert table[name, labels[subject]] == (number(value), f"{number(low)} to {number(high)}")


def test_what_was_not_scored_says_why_and_is_no_zero(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(unscored="the teacher's weights are not at hand"))
    text = card_text(read_evidence(recipe, run), None)
    for _, _, value, ends, _ in rows(text, "Scores"):
        assert value == "not scored"
        assert "not at hand" in ends
    assert "Could not be scored:" in text


def test_shares_and_counts_are_those_of_the_records(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(teachers=("./one", "./two")))
    evidence = read_evidence(recipe, run)
    learned = {t.name: t.supervised for t in evidence.teachers}
    table = {cells[0]: cells for cells in rows(card_text(evidence, None), "Teacher")}
    assert sum(t.share for t in evidence.teachers) == pytest.approx(1)
    for name, count in learned.items():
        assert table[name][5] == f"{count:,}"
        assert table[name][6] == percent(count / sum(learned.values())).replace("\xa0", " ")
    assert sum(d.answers for d in evidence.dropped) == sum(t.answers - t.kept for t in evidence.teachers)


def test_it_rests_on_the_latest_entry_of_each_stage(told_run):
    evidence = read_evidence(*told_run)
    table = rows(card_text(evidence, None), "Evidence")
    assert [cells[1] for cells in table] == [e.stage for e in evidence.entries]
    assert [cells[2] for cells in table] == [entry_digest(e) for e in evidence.entries]


def test_the_card_says_what_a_pruned_student_kept(told_run, tmp_path):
    for (recipe, run), kept, narrow in (
        (told_run, "20 of its 30 layers.", False),
        (
            tell(tmp_path / "narrow", Told(narrow=True)),
            "20 of its 30 layers, and in each 6 of 9 attention heads and 1,024 of 1,536 MLP neurons.",
            True,
        ),
    ):
        card(recipe, run)
        text = (run / "student" / "README.md").read_text(encoding="utf-8")
        assert f"with {kept}\n" in text
        assert ("Heads and neurons were kept by" in text) == narrow


def test_the_card_is_no_part_of_the_student(told_run):
    recipe, run = told_run
    before = digest_path(run / "student")
    card(recipe, run)
    assert digest_path(run / "student") == before
    assert not (run / "card.md").exists()
    assert {p.name for p in (run / "student").iterdir()} == {"README.md", "config.json"}


def test_hostile_text_stays_text(tmp_path):
    told = Told(
        teachers=("hf:odd/one@1",),
        licence=HOSTILE,
        source=HOSTILE,
        terms=HOSTILE,
        reason=HOSTILE,
        question=HOSTILE,
        answer=HOSTILE,
        unscored=HOSTILE,
    )
    recipe, run = tell(tmp_path / "run", told)
    card(recipe, run)
    text = (run / "student" / "README.md").read_text(encoding="utf-8")
    head = head_of(text)
    assert head["license"] == "other"
    names = {"license", "license_name", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"}
    assert set(head) == names
    body = body_of(text)
    assert "<" not in body.replace("&lt;", "")
    assert "\u202e" not in text
    assert "\x00" not in text
    assert not re.search(r"(?<!\\)\]\(", body), "a link"
    assert not re.search(r"[a-z]://", body), "a link by its address"
    assert [line for line in text.splitlines() if line == "---"] == ["---", "---"]
    for heading, columns in (("Teacher", 7), ("Data", 5), ("Scores", 5)):
        assert {len(cells) for cells in rows(text, heading)} == {columns}, heading


def test_a_run_that_recorded_little_still_has_a_whole_card(tmp_path):
    recipe, run = tell(tmp_path / "run", Told(facts=False, drops=False, intervals=False))
    text = card_text(read_evidence(recipe, run), None)
    assert "No answer was dropped." in text
    assert "none: a single prompt" in text
    assert "None" not in text


@pytest.mark.parametrize("text", ["plain", "a_b", "top-p 0.7", "sha256:abc", "1 + 1 = 2 (two)"])
def test_plain_text_is_left_alone(text):
    assert markdown(text) == text


def test_words():
    assert visible("a\x00\u202eb\x7f\n") == "a\u2400\\u202eb\u2421\n"
    assert visible("👩‍🚀 ünïcode مرحبا") == "👩‍🚀 ünïcode مرحبا"
    assert [number(x) for x in (0.53749, 12.36, 123.46, 5213.4)] == ["0.537", "12.36", "123.5", "5,213"]
    shares = [percent(x).replace("\xa0", " ") for x in (0, 0.00001, 0.314, 0.99999, 1)]
    assert shares == ["0.0 %", "below 0.1 %", "31.4 %", "above 99.9 %", "100.0 %"]
    assert [duration(s) for s in (0.42, 42.4, 192, 7500)] == ["0.4 s", "42 s", "3 min 12 s", "2 h 5 min"]
    assert [size(n) for n in (12, 4_200, 198_262_000)] == ["12 bytes", "4.2 kB", "198.3 MB"]
