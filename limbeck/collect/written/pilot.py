"""What having prompts written takes: the most that it can, and what the first requests of a source took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from limbeck.collect.journal import Journal, held
from limbeck.collect.shards import merge_shards
from limbeck.collect.written.author import Author
from limbeck.collect.written.kinds import make_kind
from limbeck.collect.written.source import Spent, sift
from limbeck.collect.written.tally import TRIES, Shown, Tally
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.records import Prompt, Split
from limbeck.rundir import RunDir

if TYPE_CHECKING:
    from limbeck.collect.endpoints.teacher import Endpoint


class Most(NamedTuple):
    """The most that writing a source's prompts can take."""

    requests: int
    prompt: int | None
    """Tokens; None where requests repeat what was written before, the length of which nobody knows."""
    completion: int
    """Tokens."""


class Tried(NamedTuple):
    """What one of the first requests took, with all that followed from it, and how many prompts came of it."""

    spent: Spent
    kept: int


def most(recipe: Recipe, source: WrittenPrompts, teacher: Endpoint) -> Most:
    """The most, for the teacher that writes. A source is given up after `TRIES` candidates for each prompt, each
    request makes one candidate or more, and at the end of each round a wave may have been written for a single one.
    """
    kind = make_kind(source, recipe.seed)
    each = 2 * (source.turns - 1) if source.kind == "multi-turn" else 1
    tasks = TRIES * source.count + kind.rounds * (kind.wave - 1)
    requests, prompt = tasks * each, None
    if kind.rounds == 1 and each == 1:
        prompt = 0
        for number in range(tasks):
            if (task := kind.task((), number)) is None:
                break
            chat = {"messages": task.instruction, "source": "instruction", "licence": "unknown", "split": Split.TRAIN}
            asked = teacher.request(Prompt(id=Prompt.id_of(task.instruction), **chat), task.number)
            prompt += teacher.bound(teacher.wire(asked)).prompt
    return Most(requests, prompt, requests * source.max_tokens)


def try_out(recipe: Recipe, source: WrittenPrompts, count: int, path: Path, progress: Progress) -> list[Tried]:
    """Send the first `count` requests of a source and sift what is written: as many as a run sends at once at first, so
    that a run asks for all of them too. The answers lie in the journal at `path`.

    Raises what asking a teacher raises: the cap, an endpoint that does not answer.
    """
    kind = make_kind(source, recipe.seed)
    tasks = [task for number in range(min(count, kind.wave)) if (task := kind.task((), number)) is not None]
    with (
        held(path),
        Journal(path) as journal,
        progress.line("pilot", len(tasks), f"requests for {source.kind}") as line,
    ):
        journal.close_open()
        merge_shards(journal)
        shown = Shown(line, by_answers=True)
        author = Author(source, recipe, RunDir(path.parent, progress), journal, shown)
        tally = Tally(f"{source.kind} by {author.identity.name}", source.count, shown)
        return [Tried(spent, kept) for spent, kept in sift(source, tasks, author, tally)]
