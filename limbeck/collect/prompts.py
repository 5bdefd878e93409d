"""The stage `prompts`: all sources of a recipe to prompts.parquet.

Equal prompts are kept once, from the first source that has them. Files are read twice, once for what is in
them and once for what is written, so that memory holds 32 bytes a prompt and not the prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableSet, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from limbeck.collect.contents import Wanted
from limbeck.collect.digests import DigestSet
from limbeck.collect.files import FileRow, iter_file_prompts
from limbeck.collect.journal import Journal, held, journal_path
from limbeck.collect.split import hold_out
from limbeck.collect.written.tally import Piece
from limbeck.errors import Problem, PromptError
from limbeck.recipe import DatasetPrompts, FilePrompts, Recipe, SelfPrompt
from limbeck.recipe.prompts import PromptSource, WrittenPrompts, rows_of
from limbeck.records import Digest, Message, Parent, Prompt, Split
from limbeck.rundir import RunDir
from limbeck.tables import write_records

__all__ = ["FileRow", "gather", "iter_file_prompts"]


@dataclass
class _Gathered:
    """One source and what was taken from it."""

    source: PromptSource
    name: str
    licence: str
    writer: str | None = None
    written: Sequence[Piece] = ()
    """The prompts of a source that is no file."""
    rows: int = 0
    kept: int = 0
    facts: dict[str, JsonValue] = field(default_factory=dict)

    def read(self) -> Iterator[tuple[Digest, tuple[Message, ...], Wanted, tuple[Parent, ...] | None]]:
        """The prompts in their order: id, messages, what they ask for beside words, and what they were made from."""
        if isinstance(self.source, FilePrompts | DatasetPrompts):
            yield from ((row.id, row.messages, row.wanted, None) for row in iter_file_prompts(self.source))
        else:
            for messages, rows, before in self.written:
                earlier = (Parent(id=one, source=self.name, licence=self.licence, kind="prompt") for one in before)
                yield Prompt.id_of(messages), messages, Wanted(), (*rows, *earlier) or None

    def take(self, known: MutableSet[Digest]) -> None:
        """Add the ids that are not known yet."""
        for prompt_id, *_ in self.read():
            self.rows += 1
            if prompt_id not in known:
                known.add(prompt_id)
                self.kept += 1

    def summary(self) -> dict[str, JsonValue]:
        return {
            "source": self.name,
            "licence": self.licence,
            "rows": self.rows,
            "kept": self.kept,
            "duplicates": self.rows - self.kept,
            **self.facts,
        }


def gather(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write prompts.parquet: the prompts of all sources in the recipe's order, each once, split by
    content.

    Raises `PromptError` with every wrong row, `ModelError` where the chat template has no user's turn to
    write, `InputError` where too few prompts come together to train and to evaluate, or where too few of
    those that the teacher writes are of use.
    """
    known = DigestSet()
    gathered = []
    for source in recipe.prompts:
        if isinstance(source, FilePrompts | DatasetPrompts):
            part = _Gathered(source, source.name, source.licence)
        elif isinstance(source, WrittenPrompts):
            part = _written(recipe, source, known, run)
        else:
            number = sum(isinstance(before.source, SelfPrompt) for before in gathered)
            part = _self_prompted(recipe, source, number, known, run)
        part.take(known)
        gathered.append(part)
    held_out = hold_out(known, recipe.evaluate.held_out)
    count = write_records(run / "prompts.parquet", _prompts(gathered, known, held_out), Prompt)
    return {
        "prompts": count,
        "train": count - len(held_out),
        "held_out": len(held_out),
        "duplicates": sum(part.rows - part.kept for part in gathered),
        "sources": [part.summary() for part in gathered],
    }


def _prompts(
    gathered: Sequence[_Gathered], open_ids: MutableSet[Digest], held_out: frozenset[Digest]
) -> Iterator[Prompt]:
    """Each prompt at its first place; empties `open_ids`. Raises `PromptError` where a file is no longer
    what it was.
    """
    for part in gathered:
        rows = 0
        for prompt_id, messages, wanted, parents in part.read():
            rows += 1
            if prompt_id not in open_ids:
                continue
            open_ids.remove(prompt_id)
            yield Prompt(
                id=prompt_id,
                messages=messages,
                source=part.name,
                licence=part.licence,
                split=Split.HELD_OUT if prompt_id in held_out else Split.TRAIN,
                writer=part.writer,
                tools=wanted.tools,
                json_schema=wanted.json_schema,
                parents=parents,
            )
        if rows != part.rows:
            raise _changed(part.name, f"{rows} rows", f"{part.rows} rows, as a moment before")
    if open_ids:
        raise _changed("prompts", f"{len(open_ids)} prompts gone", "the prompts of a moment before")


def _changed(where: str, found: str, expected: str) -> PromptError:
    remedy = "leave the file alone while it is read, and run the same command again"
    return PromptError("prompts changed while they were read", [Problem(where, found, expected, remedy)])


def _self_prompted(
    recipe: Recipe, source: SelfPrompt, number: int, known: Collection[Digest], run: RunDir
) -> _Gathered:
    """The prompts that the first teacher writes; `number` counts such sources from 0."""
    # torch and transformers, which files of prompts do not need
    from limbeck.collect.local import LocalTeacher
    from limbeck.collect.self_prompt import write_prompts
    from limbeck.collect.written.author import keep_here

    settings = recipe.teachers[0]
    assert settings.kind == "local"  # a recipe with another is refused
    teacher = LocalTeacher(settings, recipe.collect, recipe.seed)
    path = journal_path(recipe, run)
    run.progress.begin(f"prompts: {source.count:,} written by {settings.name}")
    with (
        held(path),
        Journal(path) as journal,
        run.progress.line("prompts", source.count, "prompts") as line,
    ):
        asked: list[Digest] = []
        tally = write_prompts(teacher, source, number, recipe.collect.concurrency, known, journal, line, asked)
        keep_here(journal, run, asked)
    name = teacher.identity.name
    facts: dict[str, JsonValue] = {
        "writer": name,
        "weights": teacher.identity.weights,
        "requests": len(asked),
        **tally.facts(),
    }
    return _Gathered(source, f"self-prompt:{name}", teacher.licence, name, tally.kept, facts=facts)


def _written(recipe: Recipe, source: WrittenPrompts, known: Collection[Digest], run: RunDir) -> _Gathered:
    """The prompts that a teacher writes when it is told to."""
    from limbeck.collect.written.kinds import make_kind
    from limbeck.collect.written.source import write_source
    from limbeck.collect.written.wording import wording_digest

    written = write_source(recipe, source, known, run)
    facts: dict[str, JsonValue] = {
        "writer": written.writer.name,
        "weights": written.writer.weights,
        "terms": written.writer.terms,
        "made_from": [{"source": rows.name, "licence": rows.licence} for _, rows in rows_of(source)],
        "wording": {name: wording_digest(name) for name in make_kind(source, recipe.seed).wordings},
        "requests": written.requests,
        **written.tally.facts(),
    }
    name = f"{source.kind}:{written.writer.name}"
    return _Gathered(source, name, written.licence, written.writer.name, written.tally.kept, facts=facts)
