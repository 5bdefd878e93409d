"""Checks that follow each record to its parents: prompt, raw answer, verdict, example, score. Needs no torch.

    raw answer in the journal <-- Completion --> Prompt
                                  Completion <-- Verdict (one each, in order)
                    kept, same split and teacher <-- Example

Files are given by name once they are known to lie in RUN; what they hold is not believed.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import TypeAdapter, ValidationError

from limbeck.errors import LimbeckError, Problem
from limbeck.ledger.canonical import digest_bytes, digest_json
from limbeck.ledger.raw_answers import RawAnswers
from limbeck.records import Completion, Prompt, Score, Verdict
from limbeck.rundir import RunDir
from limbeck.tables import read_records

_UNREADABLE = (pa.ArrowException, sqlite3.DatabaseError, OSError, ValueError, KeyError, TypeError, IndexError)
"""What readers raise on bytes that somebody changed."""

_REMEDY = "put back the files as the run wrote them, or run the same recipe again"


class _Answer(NamedTuple):
    """What the records after a completion are held against."""

    prompt_id: str
    teacher: str
    split: str


@dataclass
class _Known:
    """What has been read so far; None where the file is missing or cannot be read."""

    prompts: dict[str, Prompt] | None = None
    answers: dict[str, _Answer] | None = None
    kept: set[str] | None = None
    notes: list[str] = field(default_factory=list)


def record_differences(root: Path, present: frozenset[str]) -> tuple[list[Problem], list[str]]:
    """Every record that does not fit its parents, and notes on what could not be compared. `present` names
    the files and directories of RUN that may be read.
    """
    known, problems = _Known(), []
    for name, check in _CHECKS.items():
        if name in present:
            problems += _guarded(name, lambda check=check: list(check(root, known, present)))
    return problems, known.notes


def _guarded(name: str, check: Callable[[], list[Problem]]) -> list[Problem]:
    """A file that cannot be read is a difference of its own and ends no other check."""
    try:
        return check()
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:8])
        return [Problem(name, f"a row of another shape: {found}", "the records of its stage", _REMEDY)]
    except LimbeckError as error:
        return list(error.problems)
    except _UNREADABLE as error:
        return [Problem(name, f"cannot be read: {type(error).__name__}: {error}", "the records of its stage", _REMEDY)]


def _prompts(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    seen: dict[str, Prompt] = {}
    for row, prompt in enumerate(read_records(root / "prompts.parquet", Prompt)):
        where = f"prompts.parquet: row {row}"
        if (due := Prompt.id_of(prompt.messages)) != prompt.id:
            yield Problem(f"{where}: id", prompt.id, f"{due}, the digest of its messages", _REMEDY)
        if prompt.id in seen:
            yield Problem(f"{where}: id", f"{prompt.id} a second time", "each prompt once", _REMEDY)
        seen[prompt.id] = prompt
    known.prompts = seen


def _completions(root: Path, known: _Known, present: frozenset[str]) -> Iterator[Problem]:
    answers: dict[str, _Answer] = {}
    keys: Counter[tuple[str, int, str]] = Counter()
    terms = _terms(root, known) if "recipe.yaml" in present else None
    for row, completion in enumerate(read_records(root / "completions.parquet", Completion)):
        where = f"completions.parquet: row {row}"
        key = (completion.prompt_id, completion.sample, completion.teacher)
        keys[key] += 1
        if keys[key] > 1:
            yield Problem(where, f"{key} a second time", "one answer a prompt, sample and teacher", _REMEDY)
        yield from _against_prompt(where, completion, known.prompts)
        if terms is not None and terms.get(completion.teacher) != completion.terms:
            due = terms.get(completion.teacher, f"a teacher of the recipe: {', '.join(sorted(terms))}")
            yield Problem(f"{where}: terms of {completion.teacher}", completion.terms, due, _REMEDY)
        answers[completion.id] = _Answer(completion.prompt_id, completion.teacher, completion.split)
    known.answers = answers


def _journal(root: Path, known: _Known, present: frozenset[str]) -> Iterator[Problem]:
    """Every completion against the raw answer that it was read from."""
    if "completions.parquet" not in present:
        return
    with RawAnswers(root / "journal.db") as raw:
        for row, completion in enumerate(read_records(root / "completions.parquet", Completion)):
            yield from raw.differences(f"completions.parquet: row {row}", completion)
        if raw.unread:
            known.notes.append(f"raw answers of a form that only their digest was compared of: {raw.unread}")


def _against_prompt(where: str, completion: Completion, prompts: dict[str, Prompt] | None) -> Iterator[Problem]:
    if prompts is None:
        return
    prompt = prompts.get(completion.prompt_id)
    if prompt is None:
        yield Problem(f"{where}: prompt_id", completion.prompt_id, "a prompt of prompts.parquet", _REMEDY)
        return
    if completion.messages != prompt.messages:
        yield Problem(
            f"{where}: messages",
            Prompt.id_of(completion.messages),
            f"those of its prompt, {prompt.id}",
            _REMEDY,
        )
    if completion.split != prompt.split:
        yield Problem(f"{where}: split", completion.split, f"{prompt.split}, as its prompt", _REMEDY)


def _terms(root: Path, known: _Known) -> dict[str, str] | None:
    """The terms of each teacher, by the recipe; None where another version of limbeck wrote it."""
    try:
        return {teacher.name: teacher.terms for teacher in RunDir(root).recipe().teachers}
    except (ValueError, OSError, RecursionError, yaml.YAMLError, LimbeckError):
        known.notes.append("recipe.yaml is not a recipe of this version; terms were not compared")
        return None


def _verdicts(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    kept: set[str] = set()
    due = iter(known.answers) if known.answers is not None else None
    verdicts = read_records(root / "verdicts.parquet", Verdict)
    for row, (verdict, answer) in enumerate(zip_longest(verdicts, due) if due else ((v, None) for v in verdicts)):
        where = f"verdicts.parquet: row {row}"
        if verdict is None or (due is not None and verdict.completion != answer):
            found = verdict.completion if verdict else "no verdict"
            yield Problem(where, found, f"{answer or 'nothing more'}, as completions.parquet", _REMEDY)
        if verdict is None:
            continue
        if verdict.keep == bool(verdict.filter):
            yield Problem(f"{where}: filter", repr(verdict.filter), "a filter if dropped, none if kept", _REMEDY)
        if verdict.keep:
            kept.add(verdict.completion)
    known.kept = kept


def _examples(root: Path, known: _Known, _: frozenset[str]) -> Iterator[Problem]:
    counts: dict[str, Counter[str]] = {}
    for place, row in enumerate(_example_rows(root / "examples" / "examples.parquet")):
        where = f"examples: row {place}"
        tokens, mask = np.asarray(row["tokens"], "<i4"), np.asarray(row["mask"], bool)
        due = digest_json([row["completion"], digest_bytes(tokens.tobytes()), digest_bytes(mask.tobytes())])
        if due != row["id"]:
            yield Problem(f"{where}: id", row["id"], f"{due}, the digest of its parent, tokens and mask", _REMEDY)
        if known.kept is not None and row["completion"] not in known.kept:
            yield Problem(f"{where}: parent", row["completion"], "a completion with a verdict to keep it", _REMEDY)
        parent = known.answers.get(row["completion"]) if known.answers is not None else None
        for name in _Answer._fields if parent else ():
            if row[name] != getattr(parent, name):
                yield Problem(f"{where}: {name}", row[name], f"{getattr(parent, name)}, as its completion", _REMEDY)
        counts.setdefault(row["split"], Counter()).update(examples=1, tokens=len(tokens), supervised=int(mask.sum()))
    manifest = json.loads((root / "examples" / "manifest.json").read_text(encoding="utf-8"))
    for split, said in manifest["counts"].items():
        found = dict(counts.get(split, Counter(examples=0, tokens=0, supervised=0)))
        if found != said:
            yield Problem(f"examples: split {split}", str(found), f"{said}, as its manifest", _REMEDY)


def _example_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read here and not by `limbeck.render`, so that the two must agree."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _scores(root: Path, _: _Known, __: frozenset[str]) -> Iterator[Problem]:
    scores = TypeAdapter(list[Score]).validate_json((root / "scores.json").read_bytes())
    for place, score in enumerate(scores):
        if (score.value is None) == (score.unscored is None):
            yield Problem(
                f"scores.json: {place}: {score.name} of {score.subject}",
                f"{score.value}, {score.unscored}",
                "a value, or the reason why there is none",
                _REMEDY,
            )


_CHECKS: dict[str, Callable[[Path, _Known, frozenset[str]], Iterator[Problem]]] = {
    "prompts.parquet": _prompts,
    "completions.parquet": _completions,
    "verdicts.parquet": _verdicts,
    "examples": _examples,
    "journal.db": _journal,
    "scores.json": _scores,
}
"""In the order in which a check needs what an earlier one read."""
