"""The report stage: RUN's records, scores and ledger to RUN/report.html, one file that loads nothing.

Foreign text (prompts, answers, names, reasons, paths) reaches the page through the template engine's
escaping only. The same run gives the same bytes.
"""

from __future__ import annotations

from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import JsonValue

from limbeck import __version__
from limbeck.export.evidence import Evidence, read_evidence
from limbeck.export.teachers import drawn, owner, reached
from limbeck.export.words import duration, interval, number, one_line, percent, several, short, visible
from limbeck.recipe import Recipe
from limbeck.report import view
from limbeck.report.sentences import in_plain_words, keeps, names
from limbeck.rundir import RunDir, atomic

SECTIONS = (
    ("words", "In plain words"),
    ("matters", "Why it matters"),
    ("points", "Key points"),
    ("sides", "Sides"),
    ("noise", "Noise level"),
    ("forecast", "Forecast"),
    ("timeline", "Timeline"),
    ("discussion", "Discussion"),
)
"""Anchor and heading of each section; each has a template of its own."""


def report(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write RUN/report.html; returns the digests of the ledger entries its claims rest on."""
    with run.progress.line("report", 1, "reports") as line:
        evidence = read_evidence(recipe, run)
        page = render_report(evidence)
        with atomic(run / "report.html") as half:
            half.write_text(page, encoding="utf-8")
        line.advance()
    entries: list[JsonValue] = list(evidence.digests)
    return {"entries": entries, "sections": len(SECTIONS), "bytes": len(page.encode())}


def render_report(evidence: Evidence) -> str:
    """The whole page."""
    return _environment().get_template("report.html.jinja").render(
        version=__version__,
        sections=SECTIONS,
        evidence=evidence,
        recipe=evidence.recipe,
        teachers=names(evidence),
        paragraphs=in_plain_words(evidence),
        keeps=keeps(evidence),
        strip=view.strip(evidence),
        sizes=view.sizes(evidence),
        compared=all(view.pair(evidence)),
        how_drawn=drawn(evidence),
        teacher_scored=any(s.subject == "teacher" and s.name == "kl_forward" and s.value is not None
                           for s in evidence.scores),
        speeds=view.speeds(evidence),
        cost=view.cost(evidence),
        figures=view.figures(evidence),
        curve=view.curve(evidence),
        curve_caption=view.curve_caption(evidence),
        drops=view.drops(evidence),
        collected=sum(t.answers for t in evidence.teachers),
        scores=view.scores(evidence),
        held_out=max((score.n for score in evidence.scores), default=0),
        use=view.use(evidence),
        uses=view.uses(evidence),
        forecast=view.forecast(evidence),
        start=view.start(evidence),
        start_licence=view.start_licence(evidence),
        resamples=view.resamples(evidence),
        seed=evidence.scores[0].seed if evidence.scores else None,
        precision=view.precision(evidence),
        timeline=view.timeline(evidence),
    )  # fmt: skip


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("limbeck.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "cut": _cut, "day": _day, "duration": duration, "interval": interval, "line": one_line,
        "moment": _moment, "number": number, "percent": percent, "reached": reached, "owner": owner,
        "several": several, "short": short, "visible": visible,
    }  # fmt: skip
    return made


def _cut(text: str, limit: int) -> str:
    """The beginning of a long text, and how much there is more."""
    more = len(text) - limit
    return text if more <= 80 else f"{text[:limit].rstrip()} … ({more:,} characters more)"


def _day(when: datetime) -> str:
    utc = when.astimezone(UTC)
    return f"{utc.day} {utc:%B %Y}"


def _moment(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
