"""Laws of the report: whole, self-contained, true to the records, and safe whatever a model or a prompt file
wrote."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
from told import FIGURES, Told, tell

from limbeck.export.evidence import Step, read_evidence
from limbeck.export.words import number, percent
from limbeck.ledger.canonical import canonical
from limbeck.recipe import Recipe
from limbeck.report.figures import loss_curve, running_mean
from limbeck.report.report import render_report, report
from limbeck.report.sentences import in_plain_words, of_hundred, rough
from limbeck.rundir import RunDir

HEADINGS = [
    "In plain words",
    "Why it matters",
    "Key points",
    "Sides",
    "Noise level",
    "Forecast",
    "Timeline",
    "Discussion",
]
VOID = {"meta", "br", "link", "img", "input", "hr"}
SVG_CLOSED = {"path", "use", "rect"}

ATTACK = (
    "</p><script>alert(1)</script><img src=http://e.example/x onerror=go()> \"quoted' {{ 7*7 }} {% raw %} \u202etxt\x00"
)


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._heading: str | None = None
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, tag
        if tag == "h2":
            self.sections[self._heading or ""] = ""
        if tag == "section":
            self._heading = None

    def handle_data(self, data):
        if self._heading is None or "style" in self._open:
            return
        if "h2" in self._open:
            self._heading += data
        else:
            self.sections[self._heading] += data

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in names]


def page_of(recipe: Recipe, run: RunDir) -> tuple[str, Page]:
    report(recipe, run)
    text = (run / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    return tell(tmp_path_factory.mktemp("told") / "run", until="card")


@pytest.fixture(scope="module")
def page(told_run) -> tuple[str, Page]:
    return page_of(*told_run)


SPARSE = {
    "plain": Told(),
    "little recorded": Told(facts=False, drops=False, intervals=False),
    "nothing scored": Told(unscored="the teacher's weights are not at hand"),
    "two teachers": Told(teachers=("./one", "./two")),
}


@pytest.mark.parametrize("told", SPARSE.values(), ids=SPARSE.keys())
def test_all_eight_headings_in_order_and_none_empty(told, tmp_path):
    _, page = page_of(*tell(tmp_path / "run", told))
    assert list(page.sections) == HEADINGS
    for heading, text in page.sections.items():
        assert len(text.split()) >= 20, heading


def test_a_run_with_next_to_nothing_in_it_still_has_a_whole_report(tmp_path):
    root = runs.make_run(tmp_path / "run", until="card")
    _, page = page_of(runs.RECIPE, RunDir(root))
    assert list(page.sections) == HEADINGS
    assert "There is no curve" in page.sections["Key points"]
    assert "no held-out answers" in page.sections["Noise level"]


def test_nothing_is_loaded_and_nothing_runs(page):
    text, parsed = page
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(value.startswith("#") for value in parsed.values("src", "href", "xlink:href", "action", "srcset"))
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith("on")]


def test_every_link_inside_leads_somewhere_and_ids_are_unique(page):
    _, parsed = page
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in parsed.values("href") if value.startswith("#")} <= set(ids)


def test_every_entry_has_an_anchor_and_its_whole_digest(told_run, page):
    text, parsed = page
    evidence = read_evidence(*told_run)
    for entry, digest in zip(evidence.entries, evidence.digests, strict=True):
        assert f"entry-{entry.index}" in parsed.values("id")
        assert digest in text
    linked = {value for value in parsed.values("href") if value.startswith("#entry-")}
    assert linked == {f"#entry-{i}" for i in range(len(evidence.entries))}


def test_every_claim_names_an_entry_that_exists(told_run):
    evidence = read_evidence(*told_run)
    stages = {sentence.stage for paragraph in in_plain_words(evidence) for sentence in paragraph}
    assert {s for s in stages if s} <= {entry.stage for entry in evidence.entries}


@pytest.mark.parametrize("field", ["question", "answer", "reason", "source", "licence", "terms", "unscored"])
def test_hostile_text_stays_text(field, page, tmp_path):
    """The page has exactly the elements it would have had without it, and the attack is readable in it."""
    calm = {"unscored": "quiet", "terms": "nobody's"}.get(field, getattr(Told(), field))
    _, without = page_of(*tell(tmp_path / "calm", Told(**{field: calm})))
    text, parsed = page_of(*tell(tmp_path / "attacked", Told(**{field: ATTACK})))
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in without.tags]
    assert "<script" not in text.lower()
    assert "alert(1)</script>" in " ".join(parsed.sections.values())
    assert "{{ 7*7 }}" in " ".join(parsed.sections.values())
    assert "\u202e" not in text
    assert "\x00" not in text


def test_a_hostile_model_name_and_hostile_facts_stay_text(tmp_path, monkeypatch):
    told = Told(teachers=(ATTACK,))
    monkeypatch.setattr("told.facts", lambda _: {"collect": {ATTACK: ATTACK, "x": {ATTACK: 3}}})
    text, parsed = page_of(*tell(tmp_path / "run", told))
    assert "<script" not in text.lower()
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}
    assert "alert(1)</script>" in parsed.sections["Timeline"]


def test_a_very_long_word_is_cut_and_counted(tmp_path):
    text, _ = page_of(*tell(tmp_path / "run", Told(answer="x" * 50_000)))
    assert "characters more)" in text
    assert "x" * 5000 not in text


def test_the_same_run_gives_the_same_bytes(told_run, page):
    recipe, run = told_run
    first = (run / "report.html").read_bytes()
    facts = report(recipe, run)
    assert (run / "report.html").read_bytes() == first
    assert facts["bytes"] == len(first)
    canonical(facts)


def test_all_figures_of_the_scores_stand_under_noise_level(page):
    _, parsed = page
    for (name, _), (value, low, high) in FIGURES.items():
        assert name in parsed.sections["Noise level"]
        for figure in (number(value), f"{number(low)} to {number(high)}"):
            assert figure in parsed.sections["Noise level"], (name, figure)


def test_in_plain_words_says_what_the_figures_say(told_run):
    text = " ".join(s.text for p in in_plain_words(read_evidence(*told_run)) for s in p)
    assert "54 of 100 places" in text
    assert "before training it was 3 of 100" in text
    assert "20 of the teacher's 30 layers" in text
    assert "3.4 times less likely" in text  # exp(1.2345) = 3.437
    assert "6.5 equally likely" in text


def test_heads_and_neurons_that_went_are_told(tmp_path):
    evidence = read_evidence(*tell(tmp_path / "run", Told(narrow=True)))
    kept = "30 layers, and in each 6 of 9 attention heads and 1,024 of 1,536 MLP neurons"
    text = " ".join(s.text for p in in_plain_words(evidence) for s in p)
    share = percent(99_123_456 / 134_515_008)
    assert f"The student kept 20 of the teacher's {kept}; that is {share} of the teacher's weights" in text
    page = Page(render_report(evidence))
    assert f"20 of its {kept}" in page.sections["Sides"]
    rows = page.sections["Why it matters"]
    assert re.search(r"MLP neurons.*1,536.*1,024.*66\.7\s%", rows, re.DOTALL)
    assert "Key-value heads" not in rows, "all of them stayed"


def test_what_was_not_scored_says_so_and_shows_no_zero(tmp_path):
    evidence = read_evidence(*tell(tmp_path / "run", Told(unscored="no weights at hand")))
    text = " ".join(s.text for p in in_plain_words(evidence) for s in p)
    assert text.count("was not measured: no weights at hand.") == 3
    page = Page(render_report(evidence))
    assert "0 of 100" not in page.sections["In plain words"]
    assert "Nothing was scored" in page.sections["Key points"]


def test_shares_of_teachers_are_those_of_supervised_training_tokens(tmp_path):
    evidence = read_evidence(*tell(tmp_path / "run", Told(teachers=("./one", "./two"))))
    one, two = evidence.teachers
    assert one.supervised != two.supervised
    text = " ".join(Page(render_report(evidence)).sections["Key points"].split())
    for t in (one, two):
        share = 100 * t.supervised / (one.supervised + two.supervised)
        assert f"{t.name}: {share:.1f} % of supervised tokens ({t.supervised:,} of" in text


def test_nobody_is_told_more_than_was_shown(page):
    """What a verdict is worth, and the limits of the ledger, in words."""
    text = " ".join(" ".join(page[1].sections.values()).split())
    assert "illegal" not in text
    assert "clean" not in text
    for said in ("unsigned and unanchored", "honest or complete", "no legal advice", "No signed notes"):
        assert said in text


def test_a_run_that_no_gate_ruled_on_says_so(tmp_path):
    _, page = page_of(*tell(tmp_path / "run", Told(terms="nobody's")))
    text = " ".join(" ".join(page.sections.values()).split())
    assert "there is no verdict" in text
    assert "No terms gate decided on this run" in text


def test_a_stage_done_again_shows_both_entries(told_run, tmp_path):
    recipe, run = told_run
    root = shutil.copytree(run.root, tmp_path / "run")
    with runs.Ledger(root / "ledger.db") as ledger:
        last = ledger.last("train")
        assert last
        ledger.append(
            stage="train",
            started=last.started,
            inputs=last.inputs,
            outputs=last.outputs,
            recipe=last.recipe,
            facts={"steps": 3},
        )
    _, parsed = page_of(recipe, RunDir(root))
    assert parsed.sections["Timeline"].count("Done again later.") == 1
    assert "#entry-10" in parsed.values("href")
    assert "#entry-8" not in parsed.values("href")


def test_curves_need_two_finite_losses_and_never_grow_with_the_run():
    def steps(losses) -> list[Step]:
        return [Step(step=i, epoch=0, loss=loss, tokens=10 * i) for i, loss in enumerate(losses)]

    assert loss_curve([], "x") is None
    assert loss_curve(steps([1.0]), "x") is None
    assert loss_curve(steps([1.0, float("nan")]), "x") is None
    assert loss_curve(steps([2.0, 1.0]), "x") is not None
    long = loss_curve(steps(np.linspace(3, 1, 20_000)), "x")
    assert long is not None
    assert len(long) < 60_000


def test_a_running_mean_keeps_lines_and_begins_where_the_values_do():
    line = np.linspace(3.0, 1.0, 41)
    assert running_mean(line, 5) == pytest.approx(line)
    noisy = np.random.default_rng(0).normal(size=41)
    slow = [noisy[i - min(5, i, 40 - i) : i + min(5, i, 40 - i) + 1].mean() for i in range(41)]
    assert running_mean(noisy, 5) == pytest.approx(slow)


def test_a_figures_label_is_escaped():
    steps = [Step(step=i, epoch=0, loss=1.0 + i, tokens=i) for i in range(3)]
    assert "<b>" not in str(loss_curve(steps, '"><b>'))


def test_rounding_never_says_none_or_all_of_what_is_not():
    assert [of_hundred(x) for x in (0.0, 0.001, 0.5432, 0.999, 1.0)] == [
        "0 of 100",
        "fewer than 1 of 100",
        "54 of 100",
        "more than 99 of 100",
        "100 of 100",
    ]
    assert [rough(x) for x in (0, 3.437, 0.0123, 42.4, 4212.0, 9.96)] == ["0", "3.4", "0.012", "42", "4,200", "10.0"]


def test_the_report_needs_no_torch(tmp_path: Path):
    import subprocess
    import sys

    code = "import sys, limbeck.report.report; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_signed_notes_stand_under_discussion_and_stay_text(told_run, tmp_path):
    from limbeck.ledger.signing.notes import sign_note

    recipe, run = told_run
    root = shutil.copytree(run.root, tmp_path / "run")
    with runs.Ledger(root / "ledger.db") as ledger:
        sign_note(ledger, "Row 3 <script>alert(1)</script> is odd.", "A <b>reader</b>", recipe)
        sign_note(ledger, "It is not, I looked.", None, recipe)
    report(recipe, RunDir(root))
    page = (root / "report.html").read_text(encoding="utf-8")
    text = " ".join(Page(page).sections["Discussion"].split())
    assert "Row 3 <script>alert(1)</script> is odd." in text
    assert text.index("A <b>reader</b>") < text.index("is odd.") < text.index("It is not, I looked.")
    assert "<script" not in page
    assert "No signed notes" not in text
    assert text.count("Signed by key") == 2
