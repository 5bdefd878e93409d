"""Where a run stands, as text and as JSON: what it wrote so far, read without holding it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.cli.edge import printable
from limbeck.export.ledger import LedgerTold, ledger_told
from limbeck.export.words import from_the_words
from limbeck.ledger.staleness import stale_stages
from limbeck.ledger.store import Ledger
from limbeck.recipe import DatasetPrompts, EndpointTeacher, FilePrompts, Recipe
from limbeck.records import Entry, Score
from limbeck.run import STAGES
from limbeck.rundir import RunDir
from limbeck.terms.rulings import rulings_of


class StageState(NamedTuple):
    """One stage: its latest entry, or none."""

    stage: str
    done: bool
    """It has an entry, and nothing shows that it has to be done again."""
    stale: bool
    """It has an entry, but something it rests on has been made anew since."""
    started: str | None
    finished: str | None
    """ISO 8601, UTC."""
    seconds: float | None
    facts: dict[str, JsonValue]


class Share(NamedTuple):
    """How much of what the student learns from one teacher wrote, held-out examples left out."""

    teacher: str
    examples: int
    supervised_tokens: int
    share: float
    """Of all supervised tokens."""


class Collecting(NamedTuple):
    """What the journal holds as long as the stage has no entry: it goes on, was stopped by a cap, or was killed."""

    journal: str
    answers: int
    """To prompts, in the journal; those to other recipes included where it is shared."""
    for_prompts: int
    """What a teacher wrote, in the journal too, so that there are prompts. As long as the stage `prompts` has no entry,
    all that is there."""
    requests: dict[str, int]
    """Sent for this recipe, by outcome."""
    spent_dollars: float | None
    """At most, for this recipe, whatever its cap was; None where no prices are known."""
    waste: dict[str, JsonValue]
    """Of the requests: those that brought nothing, by kind, with their count and US dollars at most. Which answers are
    of no use is known when all is collected."""


@dataclass(frozen=True)
class Standing:
    """What a run has come to so far. What a stale stage made is left out."""

    run: str
    name: str
    stages: tuple[StageState, ...]
    scores: tuple[Score, ...]
    shares: tuple[Share, ...]
    collecting: Collecting | None
    """None where collecting has not begun, or is done: then the facts of its stage say it."""
    ledger: LedgerTold | None
    """None where nothing was recorded yet."""
    student: str | None
    report: str | None

    def to_json(self) -> str:
        """All of it as JSON text."""
        values = asdict(self) | {
            "stages": [stage._asdict() for stage in self.stages],
            "scores": [score.model_dump(mode="json") for score in self.scores],
            "shares": [share._asdict() for share in self.shares],
            "collecting": None if self.collecting is None else self.collecting._asdict(),
            "ledger": None if self.ledger is None else self.ledger._asdict() | {"trust": self.ledger.trust},
        }
        return json.dumps(values, ensure_ascii=False, indent=2)


def standing(root: str | os.PathLike[str]) -> Standing:
    """Read where a run stands, as its ledger says; no file is compared with it.

    Raises:
        RunDirError: not a RUN directory.
        VerificationError: its ledger was changed after it was written.

    """
    from limbeck.run import open_result

    run = RunDir(root)
    recipe = run.recipe()
    entries: list[Entry] = []
    told = None
    if (run / "ledger.db").exists():
        with Ledger(run / "ledger.db", read_only=True) as ledger:
            entries = ledger.entries()
            told = ledger_told(ledger, entries) if entries else None
    latest = {entry.stage: entry for entry in entries}
    stale = stale_stages(entries)
    done = latest.keys() - stale
    result = open_result(run.root)
    return Standing(
        run=os.fspath(root),
        name=recipe.name,
        stages=tuple(_state(stage.name, latest.get(stage.name), stage.name in stale) for stage in STAGES),
        scores=result.scores if "evaluate" in done else (),
        shares=_shares(run) if "render" in done else (),
        collecting=None if "collect" in done else _collecting(recipe, run, latest.get("prompts")),
        ledger=told,
        student=os.fspath(result.student) if "train" in done and result.student.exists() else None,
        report=os.fspath(result.report) if "report" in done and result.report.exists() else None,
    )


def _collecting(recipe: Recipe, run: RunDir, prompts: Entry | None) -> Collecting | None:
    from limbeck.collect.endpoints.account import by_kind, lost_of, wasted_by
    from limbeck.collect.endpoints.prices import dollars
    from limbeck.collect.glance import glance
    from limbeck.collect.journal import journal_path

    path = journal_path(recipe, run)
    if (seen := glance(path, recipe.account)) is None:
        return None
    endpoints = [teacher for teacher in recipe.teachers if isinstance(teacher, EndpointTeacher)]
    priced = seen.cost or (endpoints and all(teacher.price for teacher in endpoints))
    requests = {outcome: one.requests for outcome, one in seen.outcomes.items()}
    spent, waste = dollars(seen.cost) if priced else None, by_kind(wasted_by(lost_of(seen.outcomes)))
    for_prompts = _for_prompts(recipe, prompts, seen.answers)
    return Collecting(os.fspath(path), seen.answers - for_prompts, for_prompts, requests, spent, waste)


def _for_prompts(recipe: Recipe, prompts: Entry | None, there: int) -> int:
    """How many of the answers that are there were written for prompts: nothing else is asked before those are done."""
    if all(isinstance(source, FilePrompts | DatasetPrompts) for source in recipe.prompts):
        return 0
    if prompts is None:
        return there
    counts = [asked for told in _sources_of(prompts.facts) if isinstance(asked := _asked_of(told), int)]
    return min(there, sum(counts))


def _shares(run: RunDir) -> tuple[Share, ...]:
    """Counted from the examples themselves, not from what a stage said about them."""
    from limbeck.render.examples import read_examples

    if not (run / "examples").is_dir():
        return ()
    rows: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for example in read_examples(run / "examples").train:
        rows[example.teacher] += 1
        tokens[example.teacher] += example.supervised
    total = tokens.total()
    return tuple(
        Share(teacher, rows[teacher], tokens[teacher], tokens[teacher] / total if total else 0.0)
        for teacher in sorted(tokens, key=lambda name: (-tokens[name], name))
    )


def _state(stage: str, entry: Entry | None, stale: bool) -> StageState:
    if entry is None:
        return StageState(stage, False, False, None, None, None, {})
    started, finished = entry.started.isoformat(), entry.finished.isoformat()
    seconds = (entry.finished - entry.started).total_seconds()
    return StageState(stage, not stale, stale, started, finished, seconds, entry.facts)


def as_text(result: Standing, *, facts: bool) -> str:
    """For a person at a terminal."""
    parts = [f"{result.name}   {result.run}", _table([_stage_row(stage) for stage in result.stages])]
    if facts:
        rows = [row for stage in result.stages if stage.done for row in _fact_rows(stage)]
        parts += [_table(rows)] if rows else []
    if result.shares:
        parts.append(
            _table(
                [
                    ("teacher", "examples", "supervised tokens", "share"),
                    *(
                        (s.teacher, f"{s.examples:,}", f"{s.supervised_tokens:,}", f"{100 * s.share:.1f} %")
                        for s in result.shares
                    ),
                ]
            )
        )
    if result.scores:
        parts.append(
            _table([("score", "subject", "value", "95 % interval", "n", "unit"), *map(_score_row, result.scores)])
        )
    if written := _written_rows(result):
        parts.append(_table(written))
    if words := from_the_words(next((s.facts for s in result.stages if s.stage == "annotate" and s.done), {})):
        words = words.replace("\N{NO-BREAK SPACE}", " ")
        parts.append(f"note: {words[0].lower()}{words[1:]}")
    if ruled := _gate_rows(result):
        parts.append(_table(ruled))
    if result.collecting:
        parts.append(_table(_collecting_rows(result.collecting)))
    if money := _money_rows(result):
        parts.append(_table(money))
    if result.ledger:
        parts.append(_table(_ledger_rows(result.ledger)))
    places = [(word, path) for word, path in (("student", result.student), ("report", result.report)) if path]
    if places:
        parts.append(_table(places))
    return printable("\n\n".join(parts))


def _written_rows(result: Standing) -> list[tuple[str, ...]]:
    """What became of the prompts that models wrote; nothing where none did."""
    facts = next((s.facts for s in result.stages if s.stage == "prompts" and s.done), {})
    rows: list[tuple[str, ...]] = [("written prompts", "asked", "candidates", "kept", "dropped")]
    for told in _sources_of(facts):
        if not isinstance(dropped := told.get("dropped"), dict):
            continue
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none"
        counts = (_asked_of(told), told.get("candidates"), told.get("kept"))
        rows.append((str(told.get("source")), *map(str, counts), reasons))
    return rows if len(rows) > 1 else []


def _sources_of(facts: dict[str, JsonValue]) -> list[dict[str, JsonValue]]:
    """What the stage `prompts` said of each source."""
    sources = facts.get("sources")
    return [told for told in sources if isinstance(told, dict)] if isinstance(sources, list) else []


def _asked_of(told: dict[str, JsonValue]) -> JsonValue:
    """Requests to the teacher that wrote a source; earlier versions told candidates alone."""
    return told.get("requests", told.get("candidates"))


def _gate_rows(result: Standing) -> list[tuple[str, ...]]:
    """What the terms gate said of the set, with its waivers; nothing where it was not asked, or has to be again."""
    facts = next((s.facts for s in result.stages if s.stage == "gate" and s.done), {})
    if not isinstance(verdict := facts.get("verdict"), str):
        return []
    sources = facts.get("sources")
    told = f"{facts.get('rows')} examples, {sources} {'source' if sources == 1 else 'sources'} of tokens"
    told += f", {facts.get('waived')} let through by waivers" if facts.get("waived") else ""
    told += f", obligations of the student: {facts.get('obligations') or 'none'}"
    rows = [("terms gate", verdict, f"{told}; all in {result.run}/gate/rulings.json")]
    found = rulings_of(result.run)
    return rows + [("", "waiver", waiver.words) for waiver in (found.waivers if found else ())]


def _collecting_rows(told: Collecting) -> list[tuple[str, ...]]:
    from limbeck.collect.journal import KILLED

    there = [("answers to prompts", told.answers), ("written for prompts", told.for_prompts)]
    shown = [(name, f"{count:,} in {told.journal}") for name, count in there if count] or [("answers", "none yet")]
    rows: list[tuple[str, ...]] = [("" if n else "not all collected", *row) for n, row in enumerate(shown)]
    for outcome, count in sorted(told.requests.items()):
        # Seen from outside, what is under way and what a kill left are the same.
        rows.append(("", f"requests: {'under way or killed' if outcome == KILLED else outcome}", f"{count:,}"))
    if told.requests:
        rows.append(("", "US dollars at most", _dollars(told.spent_dollars)))
    known = told.spent_dollars is not None
    for kind, one in told.waste.items():
        if isinstance(one, dict):
            money = _dollars(one.get("dollars_at_most") if known else None)
            rows.append(("", f"wasted: {kind}", f"{one.get('count')}, US dollars at most: {money}"))
    return rows


def _ledger_rows(told: LedgerTold) -> list[tuple[str, ...]]:
    rows = [("ledger", "entries", f"{told.entries:,}, {told.trust}"), ("", "head", told.head)]
    root = "root now" if told.signed is None else "root at the last checkpoint"
    rows.append(("", root, f"sha256:{told.root} over {told.size:,} leaves"))
    return rows + [("", "signed by", key) for key in told.keys]


def _money_rows(result: Standing) -> list[tuple[str, ...]]:
    """What collecting cost and what of it bought nothing, where an endpoint was asked."""
    facts = next((s.facts for s in result.stages if s.stage == "collect" and s.done), {})
    money = facts.get("money")
    waste = money.get("waste") if isinstance(money, dict) else None
    if not isinstance(money, dict) or not isinstance(waste, dict):
        return []
    prices = money.get("prices")
    known = isinstance(prices, dict) and "unknown" not in prices.values()
    spent = _dollars(money.get("spent_dollars") if known else None)
    rows = [("money", "requests or answers", "US dollars at most"), ("spent", "", spent)]
    if money.get("answers_in_batches"):
        rows.append(("in provider's batches", f"{money['answers_in_batches']}, in {money.get('batches')}", "as above"))
    rows += [
        (f"wasted: {kind}", str(told.get("count")), _dollars(told.get("dollars_at_most") if known else None))
        for kind, told in waste.items()
        if isinstance(told, dict)
    ]
    kept = money.get("kept_cut_off")
    if isinstance(kept, dict) and kept.get("answers"):
        rows.append(("cut off, and kept", str(kept["answers"]), _dollars(kept.get("dollars") if known else None)))
    return rows


def _dollars(value: JsonValue) -> str:
    return f"{value:,.6f}" if isinstance(value, int | float) else "unknown"


def _stage_row(state: StageState) -> tuple[str, ...]:
    if state.stale:
        return (state.stage, "to be done again: what it read has been made anew since")
    if not state.done or state.finished is None:
        return (state.stage, "not done yet")
    return (state.stage, f"done {state.finished[:19].replace('T', ' ')}Z", f"{state.seconds:,.1f} s")


def _fact_rows(state: StageState) -> list[tuple[str, ...]]:
    """Facts a line can hold; the rest, and the digest of every file, is in the JSON."""
    told = [(key, _brief(value)) for key, value in sorted(state.facts.items()) if key not in ("manifests", "gate")]
    return [(state.stage if not place else "", key, text) for place, (key, text) in enumerate(told)]


def _brief(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text)} characters; --json shows all)"


def _score_row(score: Score) -> tuple[str, ...]:
    if score.value is None:
        return (score.name, score.subject, "not scored", score.unscored or "", str(score.n), score.unit)
    interval = "" if score.low is None or score.high is None else f"{score.low:.4g} to {score.high:.4g}"
    return (score.name, score.subject, f"{score.value:.4g}", interval, str(score.n), score.unit)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths: dict[int, int] = {}
    for row in rows:
        for place, cell in enumerate(row[:-1]):
            widths[place] = max(widths.get(place, 0), len(cell))
    return "\n".join(
        "  ".join([*(cell.ljust(widths[place]) for place, cell in enumerate(row[:-1])), row[-1]]).rstrip()
        for row in rows
    )
