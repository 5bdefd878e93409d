"""The curate stage: every completion passes through the filters and gets exactly one verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from pydantic import JsonValue

from limbeck.collect.rows import shown
from limbeck.curate.filters import ALWAYS, Filter, make_filters
from limbeck.errors import InputError, Problem
from limbeck.recipe import Recipe
from limbeck.records import Completion, Split, Verdict
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records


def curate(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Writes RUN/verdicts.parquet, one verdict a completion in their order; returns counts.

    Raises:
        InputError: no answer to a training prompt, or none to a held-out prompt, was kept. Nothing is
        written.

    """
    filters = make_filters(recipe.curate, _tool_templates(recipe))
    tally = Tally()
    with run.progress.line("curate", None, "answers") as line:

        def verdicts() -> Iterator[Verdict]:
            for completion in read_records(run / "completions.parquet", Completion):
                verdict = judge(completion, filters)
                tally.add(completion, verdict)
                line.advance()
                yield verdict
            # Raised before the file takes its name, so that no half result is left.
            tally.refuse_nothing(filters, str(run / "completions.parquet"))

        write_records(run / "verdicts.parquet", verdicts(), Verdict)
    return tally.facts(filters)


def _tool_templates(recipe: Recipe) -> Callable[[str], str | None]:
    """Says why the template that renders a teacher's answers is nothing for tools."""

    @cache
    def cannot(teacher: str) -> str | None:
        from limbeck.models import load_tokenizer  # only where an answer has tools: it takes seconds
        from limbeck.models.speech import cannot_call

        found = next(t for t in recipe.teachers if t.name == teacher)
        return cannot_call(load_tokenizer(recipe.words_of(found)))

    return cannot


def judge(completion: Completion, filters: Iterable[Filter]) -> Verdict:
    """Folds the filters over one completion: the first that drops it names itself in the verdict."""
    where = (completion.prompt_id, completion.sample, completion.teacher, completion.id)
    for each in filters:
        reason = each.judge(completion)
        if reason is not None:
            return Verdict(*where, keep=False, filter=each.name, reason=reason)
    return Verdict(*where, keep=True, filter="", reason="")


@dataclass
class Tally:
    """Counts completions by split and by the filter that dropped them; those kept stand under the empty
    name.
    """

    counts: Counter[tuple[Split, str]] = field(default_factory=Counter)
    teachers: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[Split, str], str] = field(default_factory=dict)
    """Why a filter dropped the first answer of a split that it dropped."""

    def add(self, completion: Completion, verdict: Verdict) -> None:
        """Count one."""
        self.counts[completion.split, verdict.filter] += 1
        self.first.setdefault((completion.split, verdict.filter), verdict.reason)
        self.teachers[completion.teacher] += verdict.keep

    def facts(self, filters: Sequence[Filter]) -> dict[str, JsonValue]:
        """What the ledger gets to know."""
        return {
            "completions": self.counts.total(),
            "kept": sum(self.counts[split, ""] for split in Split),
            "kept_by_split": {split.value: self.counts[split, ""] for split in Split},
            "kept_by_teacher": dict(sorted(self.teachers.items())),
            "dropped": {f.name: count for f in filters if (count := self._of(f)) or not isinstance(f, ALWAYS)},
        }

    def _of(self, each: Filter) -> int:
        return sum(self.counts[split, each.name] for split in Split)

    def refuse_nothing(self, filters: Sequence[Filter], where: str) -> None:
        """Raises `InputError`, naming every split of which nothing was kept."""
        problems = [self._problem(split, filters, where) for split in Split if not self.counts[split, ""]]
        if problems:
            raise InputError("no answers are left to go on with", problems)

    def _problem(self, split: Split, filters: Sequence[Filter], where: str) -> Problem:
        dropped = {f: self.counts[split, f.name] for f in filters if self.counts[split, f.name]}
        if not dropped:
            return Problem(
                f"{where}: split {split}",
                "no answers to prompts of this split",
                "at least 1",
                "give more prompts, or another split of them",
            )
        by_count = sorted(dropped, key=lambda f: -dropped[f])
        counts = ", ".join(f"{f.name} {dropped[f]}" for f in by_count)
        first = ", ".join(f"{f.name}: {shown(self.first[split, f.name], 160)}" for f in by_count)
        return Problem(
            f"{where}: split {split}",
            f"0 of {sum(dropped.values())} answers kept; dropped by {counts}; the first: {first}",
            "at least 1 kept answer",
            "; or ".join(f.loosen for f in by_count),
        )
