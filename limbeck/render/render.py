"""The render stage: every kept completion becomes an example, or is left out and counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from limbeck.curate.filters import ended
from limbeck.errors import InputError, ModelError, Problem, StaleError
from limbeck.models import load_tokenizer, template_digest, tokenizer_digest
from limbeck.recipe import Recipe
from limbeck.records import Completion, Example, Split, Verdict
from limbeck.render.chat import NOT_FOUND, REFUSED, SPECIAL_TEXT, ChatRenderer, LeftOut, Said
from limbeck.render.examples import ExampleSet, make_example, make_set, write_examples
from limbeck.rundir import RunDir
from limbeck.tables import read_records

TOO_LONG = "too_long"
"""More tokens than train.max_length."""
NOTHING = "nothing_supervised"
"""No token was written by the teacher: an empty answer that was cut off."""

_REMEDIES = {
    SPECIAL_TEXT: "leave texts of special tokens out of the prompts",
    REFUSED: "take out of the prompts what the template refuses (often a system message)",
    NOT_FOUND: "use a teacher whose chat template leaves answers as they are",
    TOO_LONG: "raise train.max_length, or lower collect.max_tokens",
    NOTHING: "raise curate.min_characters and collect.max_tokens",
}


@dataclass
class _Tally:
    """What was left out, and what was rendered."""

    left_out: Counter[tuple[Split, str]] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    rendered: int = 0
    endless: int = 0

    def leave_out(self, completion: Completion, why: LeftOut) -> None:
        self.left_out[completion.split, why.reason] += 1
        self.first.setdefault(why.reason, f"{_row(completion)}: {why.detail}")

    def by_reason(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for (_, reason), count in self.left_out.items():
            total[reason] += count
        return {reason: total[reason] for reason in _REMEDIES if total[reason]}


def render(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Writes RUN/examples from the kept completions, in their order; returns counts.

    Raises:
        ModelError: a teacher has no usable chat template or tokenizer, or its template fails on the first
        answer.
        InputError: nothing is left to train on, or nothing to measure with.
        StaleError: completions and verdicts do not belong together.

    """
    tokenizers = {t.name: load_tokenizer(recipe.words_of(t)) for t in recipe.teachers}
    renderers = {name: ChatRenderer(tokenizer, name) for name, tokenizer in tokenizers.items()}
    tally, examples = _Tally(), []
    with run.progress.line("render", None, "answers") as line:
        for completion in _kept(run):
            example = _example(completion, renderers[completion.teacher], recipe.train.max_length, tally)
            line.advance()
            if example is not None:
                examples.append(example)
    made = make_set(
        examples,
        tokenizer=tokenizer_digest(tokenizers[recipe.teachers[0].name]),
        templates={name: template_digest(tokenizer) for name, tokenizer in tokenizers.items()},
        max_length=recipe.train.max_length,
    )
    _refuse_nothing(made, tally, run / "completions.parquet")
    write_examples(run / "examples", made)
    return _facts(made, tally)


def _kept(run: RunDir) -> Iterator[Completion]:
    """The completions with a verdict to keep them."""
    completions = read_records(run / "completions.parquet", Completion)
    verdicts = read_records(run / "verdicts.parquet", Verdict)
    ended = object()
    while True:
        completion, verdict = next(completions, ended), next(verdicts, ended)
        if completion is ended and verdict is ended:
            return
        there = verdict.completion if isinstance(verdict, Verdict) else "no verdict"
        here = completion.id if isinstance(completion, Completion) else "no completion"
        if there != here or not isinstance(completion, Completion) or not isinstance(verdict, Verdict):
            raise StaleError(
                "completions and verdicts do not belong together",
                [
                    Problem(
                        str(run / "verdicts.parquet"),
                        there,
                        f"{here} (completions.parquet)",
                        "run curate again",
                    ),
                ],
            )
        if verdict.keep:
            yield completion


def _example(completion: Completion, renderer: ChatRenderer, max_length: int, tally: _Tally) -> Example | None:
    stopped = ended(completion)
    said = Said(completion.text, tuple(completion.tool_calls or ()), tuple(completion.tools or ()))
    out = renderer.render(completion.messages, said, stopped=stopped, created=completion.created)
    if isinstance(out, LeftOut):
        if out.reason in (REFUSED, NOT_FOUND) and not tally.rendered:
            raise ModelError(
                "the chat template cannot render the first answer",
                [
                    Problem(
                        f"{renderer.name}: chat template, at {_row(completion)}",
                        out.detail,
                        "a template that renders the chat with the answer in it",
                        _REMEDIES[out.reason],
                    ),
                ],
            )
        tally.leave_out(completion, out)
        return None
    tally.rendered += 1
    if len(out.tokens_T) > max_length:
        tally.leave_out(completion, LeftOut(TOO_LONG, f"{len(out.tokens_T)} tokens, more than {max_length}"))
        return None
    if not out.mask_T.any():
        tally.leave_out(completion, LeftOut(NOTHING, f"an empty answer, finish reason {completion.finish_reason!r}"))
        return None
    tally.endless += stopped and not out.ended
    return make_example(
        out.tokens_T,
        out.mask_T,
        prompt_id=completion.prompt_id,
        completion=completion.id,
        teacher=completion.teacher,
        split=completion.split,
    )


def _refuse_nothing(made: ExampleSet, tally: _Tally, where: Path) -> None:
    problems = []
    for split in Split:
        reasons = {reason: tally.left_out[split, reason] for reason in _REMEDIES if tally.left_out[split, reason]}
        if not made.manifest.counts[split].examples:
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.items())
            problems.append(
                Problem(
                    f"{where}: split {split}",
                    f"0 of {sum(reasons.values())} kept answers rendered; left out: {counts or 'none'}",
                    "at least 1 example",
                    "; or ".join(_REMEDIES[reason] for reason in reasons) or "keep more in curate",
                )
            )
    if problems:
        raise InputError("no examples are left to go on with", problems)


def _facts(made: ExampleSet, tally: _Tally) -> dict[str, JsonValue]:
    """What the ledger gets to know. The teachers' shares are of what the student is trained on."""
    by_teacher: Counter[str] = Counter()
    for example in made.train:
        by_teacher[example.teacher] += example.supervised
    return {
        "examples": len(made.examples),
        "by_split": {split.value: count.model_dump() for split, count in made.manifest.counts.items()},
        "train_supervised_by_teacher": dict(sorted(by_teacher.items())),
        "longest": max(len(e.tokens_T) for e in made.examples),
        "left_out": dict(tally.by_reason()),
        "left_out_first": {reason: tally.first[reason] for reason in tally.by_reason()},
        "stopped_without_end_of_turn": tally.endless,
    }


def _row(completion: Completion) -> str:
    return f"prompt {completion.prompt_id[:19]}, sample {completion.sample}, teacher {completion.teacher}"
