"""What a RUN directory's records and ledger say, gathered once for everybody who writes about the run.

Nothing here is estimated: a figure is counted from the records, read from a ledger entry, or absent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from limbeck.evaluate.answers import Answers, read_answers
from limbeck.evaluate.scores import read_scores, score_of
from limbeck.export.ledger import LedgerTold, ledger_told
from limbeck.ledger.origins import ROW
from limbeck.ledger.signing.notes import notes
from limbeck.ledger.store import Ledger, entry_digest
from limbeck.recipe import FileTeacher, Recipe
from limbeck.records import Completion, Digest, Entry, Prompt, Score, Split, Verdict
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.terms.rulings import Rulings, rulings_of

T = TypeVar("T", bound=BaseModel)

EXAMPLES_OF_DROPPED = 2
"""Dropped answers shown for each filter."""


class MadeFrom(NamedTuple):
    """Rows that prompts were written from."""

    kind: str
    """What they were to the writer; `row` where an earlier version did not say."""
    source: str
    licence: str


class PromptSource(NamedTuple):
    """Where prompts came from."""

    source: str
    licence: str
    writer: str | None
    """The model that wrote them, if one did."""
    train: int
    held_out: int
    images: int = 0
    """In prompts to train on."""
    made_from: tuple[MadeFrom, ...] = ()
    """What a model wrote them from, outside of this run; earlier prompts are of the same source."""


class TeacherSeen(NamedTuple):
    """A teacher as the completions know it, and what the student learnt from it."""

    name: str
    model: str
    provider: str
    route: str
    terms: str
    weights: Digest | None
    answers: int
    kept: int
    supervised: int
    """Tokens of training examples that it wrote."""
    share: float
    """Of all supervised tokens of training examples."""
    file: str | None = None
    """The file that had its answers already, where it was not asked."""
    batched: int = 0
    """Answers that came by its provider's batch API."""
    batches: int = 0
    """Batches in which those came."""
    fingerprints: tuple[str, ...] = ()
    """All that its API said of the weights that answered, sorted."""


class DroppedAnswer(NamedTuple):
    """An answer that was not used."""

    prompt: str
    text: str
    reason: str


class Dropped(NamedTuple):
    """What one filter dropped."""

    filter: str
    answers: int
    examples: tuple[DroppedAnswer, ...]


class Size(BaseModel):
    """How large a model is, as the evaluation found it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    parameters: int
    layers: int
    bytes: int
    precision: str


class Speed(BaseModel):
    """Milliseconds a token to read, with a 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    value: float
    low: float | None
    high: float | None


class Step(BaseModel):
    """One optimiser step of RUN/training.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    epoch: float
    loss: float
    tokens: int


class Biased(BaseModel):
    """A term of the loss that was computed from a signal whose expectation is not the loss."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    term: str
    signal: str
    why: str

    def __str__(self) -> str:
        return f"{self.term} from a {self.signal.replace('_', '-')} signal: {self.why}"


class Training(BaseModel):
    """RUN/training.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    steps: tuple[Step, ...]
    loss: str | None = None
    biased: tuple[Biased, ...] = ()
    unit: str | None = None
    precision: str | None = None
    tokens: int | None = None
    seconds: float | None = None


class NoteSeen(NamedTuple):
    """A reviewer's note."""

    entry: int
    text: str
    by: str | None
    at: str
    """By the signer's clock, ISO 8601."""
    key: str
    signed: bool
    """Whether its signature holds."""


@dataclass(frozen=True)
class Evidence:
    """A run, as its records tell it."""

    recipe: Recipe
    entries: tuple[Entry, ...]
    digests: tuple[Digest, ...]
    """Of the entries, in the same order; the last is the ledger's head."""
    sources: tuple[PromptSource, ...]
    teachers: tuple[TeacherSeen, ...]
    dropped: tuple[Dropped, ...]
    scores: tuple[Score, ...]
    answers: tuple[Answers, ...]
    cut_short: frozenset[str]
    """Digests of the prompts of `answers` whose answer by the teacher ran into the most tokens it was allowed."""
    training: Training
    sizes: Mapping[str, Size]
    """By subject: `student`, `before`, `teacher:NAME`."""
    speeds: Mapping[str, Speed]
    """By subject: `student`, `before`, `teacher`."""
    notes: tuple[NoteSeen, ...]
    """Signed notes, oldest first."""
    ledger: LedgerTold
    rulings: Rulings | None
    """What the terms gate said; None where it was not asked."""

    def entry(self, stage: str) -> Entry | None:
        """The latest entry of a stage, or None where there is none yet."""
        return next((entry for entry in reversed(self.entries) if entry.stage == stage), None)

    def facts(self, stage: str) -> Mapping[str, JsonValue]:
        """What the latest entry of a stage says; empty where there is none."""
        entry = self.entry(stage)
        return entry.facts if entry else {}

    def count(self, stage: str, fact: str) -> int | None:
        """A fact that is a whole number, or None."""
        value = self.facts(stage).get(fact)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def counts(self, stage: str, fact: str) -> dict[str, int]:
        """A fact that counts by name; empty where there is none."""
        value = self.facts(stage).get(fact)
        return {k: v for k, v in value.items() if isinstance(v, int)} if isinstance(value, dict) else {}

    def score(self, name: str, subject: str) -> Score | None:
        """The score with that name and subject, or None."""
        return score_of(self.scores, name, subject)

    @property
    def latest(self) -> tuple[tuple[Entry, Digest], ...]:
        """The latest entry of each stage with its digest, in the order in which they were written."""
        last = {e.stage: (e, digest) for e, digest in zip(self.entries, self.digests, strict=True)}
        return tuple(sorted(last.values(), key=lambda pair: pair[0].index))

    @property
    def prompts(self) -> tuple[int, int]:
        """Prompts to train on, and prompts held out."""
        return sum(s.train for s in self.sources), sum(s.held_out for s in self.sources)

    @property
    def supervised(self) -> int:
        """Tokens of training examples that teachers wrote."""
        return sum(t.supervised for t in self.teachers)


def read_evidence(recipe: Recipe, run: RunDir) -> Evidence:
    """Read a RUN directory as far as the evaluation has come."""
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        entries = tuple(ledger.entries())
        told = ledger_told(ledger, entries)
    facts = next((e.facts for e in reversed(entries) if e.stage == "evaluate"), {})
    answers = tuple(read_answers(run / "answers.json")) if (run / "answers.json").exists() else ()
    teachers, dropped, cut_short = _answers(recipe, run, {(a.prompt_id, a.teacher_name, a.teacher) for a in answers})
    return Evidence(
        recipe=recipe,
        entries=entries,
        digests=tuple(entry_digest(entry) for entry in entries),
        sources=_sources(run),
        teachers=teachers,
        dropped=dropped,
        scores=tuple(read_scores(run / "scores.json")),
        answers=answers,
        cut_short=cut_short,
        training=Training.model_validate_json((run / "training.json").read_bytes()),
        sizes=_typed(facts.get("models"), Size),
        speeds=_typed(facts.get("reading_ms_a_token"), Speed),
        notes=_notes(entries),
        ledger=told,
        rulings=rulings_of(run.root),
    )


def _notes(entries: tuple[Entry, ...]) -> tuple[NoteSeen, ...]:
    return tuple(
        NoteSeen(
            one.entry.index,
            one.statement.predicate.text,
            one.statement.predicate.by,
            one.statement.predicate.at,
            one.envelope.keyid,
            one.envelope.signed(),
        )
        for one in notes(entries)
    )


def _sources(run: RunDir) -> tuple[PromptSource, ...]:
    counts: dict[tuple[str, str, str | None], Counter[Split]] = {}
    images: Counter[tuple[str, str, str | None]] = Counter()
    parents: dict[tuple[str, str, str | None], dict[MadeFrom, None]] = {}
    for prompt in read_records(run / "prompts.parquet", Prompt):
        key = (prompt.source, prompt.licence, prompt.writer)
        counts.setdefault(key, Counter())[prompt.split] += 1
        images[key] += sum(message.images for message in prompt.messages) * (prompt.split is Split.TRAIN)
        rows = (MadeFrom(p.kind or ROW, p.source, p.licence) for p in prompt.parents or () if p.kind != "prompt")
        parents.setdefault(key, {}).update(dict.fromkeys(rows))
    return tuple(
        PromptSource(*key, n[Split.TRAIN], n[Split.HELD_OUT], images[key], tuple(parents[key]))
        for key, n in counts.items()
    )


def _answers(
    recipe: Recipe, run: RunDir, side_by_side: Set[tuple[Digest, str, str]]
) -> tuple[tuple[TeacherSeen, ...], tuple[Dropped, ...], frozenset[str]]:
    """Who answered and how much of it was used; what was dropped, most often dropped first; and the prompts of those
    side by side (prompt, teacher, answer) that were cut off.
    """
    cut_short: set[str] = set()
    verdicts = {v.completion: v for v in read_records(run / "verdicts.parquet", Verdict)}
    supervised: Counter[str] = Counter()
    for example in read_examples(run / "examples").train:
        supervised[example.teacher] += example.supervised
    identities: dict[str, Completion] = {}
    answers: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    batches: dict[str, Counter[str]] = {}
    fingerprints: dict[str, set[str]] = {}
    shown: dict[str, list[DroppedAnswer]] = {}
    for completion in read_records(run / "completions.parquet", Completion):
        identities.setdefault(completion.teacher, completion)
        answers[completion.teacher] += 1
        said = (completion.prompt_id, completion.teacher, completion.text)
        if completion.finish_reason == "length" and said in side_by_side:
            cut_short.add(completion.prompt_id)
        if completion.batch is not None:
            batches.setdefault(completion.teacher, Counter())[completion.batch] += 1
        if completion.fingerprint is not None:
            fingerprints.setdefault(completion.teacher, set()).add(completion.fingerprint)
        verdict = verdicts[completion.id]
        kept[completion.teacher] += verdict.keep
        if not verdict.keep:
            drops[verdict.filter] += 1
            if drops[verdict.filter] <= EXAMPLES_OF_DROPPED:
                asked = completion.messages[-1].content if completion.messages else ""
                one = DroppedAnswer(asked, completion.text, verdict.reason)
                shown.setdefault(verdict.filter, []).append(one)
    total = supervised.total()
    files = {t.name: t.path for t in recipe.teachers if isinstance(t, FileTeacher)}
    teachers = tuple(
        TeacherSeen(
            name=name,
            model=one.model,
            provider=one.provider,
            route=one.route,
            terms=one.terms,
            weights=one.weights,
            answers=answers[name],
            kept=kept[name],
            supervised=supervised[name],
            share=supervised[name] / total if total else 0.0,
            file=files.get(name),
            batched=batches[name].total() if name in batches else 0,
            batches=len(batches.get(name, ())),
            fingerprints=tuple(sorted(fingerprints.get(name, ()))),
        )
        for name, one in identities.items()
    )
    dropped = tuple(Dropped(name, n, tuple(shown[name])) for name, n in drops.most_common())
    return teachers, dropped, frozenset(cut_short)


def _typed(value: JsonValue, kind: type[T]) -> dict[str, T]:
    """The members of a JSON object that have this shape."""
    found: dict[str, T] = {}
    for name, inner in value.items() if isinstance(value, dict) else ():
        try:
            found[name] = kind.model_validate(inner)
        except ValidationError:
            continue
    return found
