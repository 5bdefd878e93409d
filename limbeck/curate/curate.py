"""The curate stage: every completion passes through the filters and gets exactly one verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from limbeck.curate.filters import Filter, make_filters
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
    filters = make_filters(recipe.curate)
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

    def add(self, completion: Completion, verdict: Verdict) -> None:
        """Count one."""
        self.counts[completion.split, verdict.filter] += 1
        self.teachers[completion.teacher] += verdict.keep

    def facts(self, filters: Sequence[Filter]) -> dict[str, JsonValue]:
        """What the ledger gets to know."""
        return {
            "completions": self.counts.total(),
            "kept": sum(self.counts[split, ""] for split in Split),
            "kept_by_split": {split.value: self.counts[split, ""] for split in Split},
            "kept_by_teacher": dict(sorted(self.teachers.items())),
            "dropped": {f.name: sum(self.counts[split, f.name] for split in Split) for f in filters},
        }

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
        return Problem(
            f"{where}: split {split}",
            f"0 of {sum(dropped.values())} answers kept; dropped by {counts}",
            "at least 1 kept answer",
            "; or ".join(f.loosen for f in by_count),
        )
