"""Asks a teacher to write: every request journaled, paced and capped as the requests for answers are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Parsed, Request, Writing, make_teacher
from limbeck.collect.written.kinds import Task
from limbeck.collect.written.tally import Shown
from limbeck.errors import InputError
from limbeck.progress import TokenCount
from limbeck.recipe import Recipe
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.records import Digest, Prompt, Split
from limbeck.rundir import RunDir

if TYPE_CHECKING:
    from limbeck.collect.endpoints.teacher import Endpoint


class Author:
    """A teacher that writes prompts. What it costs counts under the recipe's cap, as its answers do."""

    def __init__(self, source: WrittenPrompts, recipe: Recipe, run: RunDir, journal: Journal, line: Shown):
        (settings,) = [t for t in recipe.teachers if t.name == (source.by or recipe.teachers[0].name)]
        told = {"max_tokens": source.max_tokens, "temperature": source.temperature, "top_p": source.top_p}
        collect = recipe.collect.model_copy(update=told)
        self._teacher: Writing | Endpoint = make_teacher(settings, collect, recipe.seed)
        self._recipe, self._run, self._journal, self._line = recipe, run, journal, line
        self._wrote = TokenCount(line)
        self.identity, self._kind = self._teacher.identity, source.kind
        self.asked: list[Digest] = []
        """Keys of its requests in the journal."""

    @property
    def licence(self) -> str | None:
        """The licence of its weights where they are here; terms stand for it where they are not."""
        from limbeck.recipe import LocalTeacher

        if not any(isinstance(t, LocalTeacher) and t.name == self.identity.name for t in self._recipe.teachers):
            return None
        from limbeck.collect.local import LocalTeacher as Local

        return self._teacher.licence if isinstance(self._teacher, Local) else None

    def write(self, tasks: Sequence[Task]) -> list[Parsed]:
        """What it wrote for each. Raises `RefusedError` at the cap, and what the endpoint or the journal raises; what
        was written by then is journaled.
        """
        requests = [self._request(task) for task in tasks]
        if lacking := self._lacking(requests):
            self._ask(lacking)
        self.asked += [request.key for request in requests]
        return [self._teacher.parse(request, self._journal.get(request.key).raw) for request in requests]

    def _named(self, error: InputError) -> InputError:
        """With the key of this source, where a teacher that was given its settings names that of answers."""
        named = {"collect.max_tokens": f"max_tokens of {self._kind}"}
        return type(error)(error.summary, [p._replace(where=named.get(p.where, p.where)) for p in error.problems])

    def _lacking(self, requests: Sequence[Request]) -> list[Request]:
        missing = set(self._journal.missing(request.key for request in requests))
        return [request for request in requests if request.key in missing]

    def _request(self, task: Task) -> Request:
        name = Prompt.id_of(task.instruction)
        prompt = Prompt(id=name, messages=task.instruction, source="instruction", licence="unknown", split=Split.TRAIN)
        return self._teacher.request(prompt, task.number)

    def _ask(self, requests: Sequence[Request]) -> None:
        if self._teacher.identity.kind == "local":
            try:
                for group in self._teacher.answer([requests], self._wrote):  # pyright: ignore[reportAttributeAccessIssue]
                    self._journal.put_group(group)
                    self._line.advance(len(group))
            except InputError as error:
                raise self._named(error) from None
            return
        from limbeck.collect.endpoints.stage import ask_endpoint

        found = ask_endpoint(
            self._teacher,  # pyright: ignore[reportArgumentType]
            lambda _line: iter([self._lacking(requests)]),
            self._recipe,
            self._journal,
            self._line,
            account=self._recipe.account,
            offline=self._run.offline,
        )
        if found.stopped is not None:
            raise found.stopped


def keep_here(journal: Journal, run: RunDir, keys: Iterable[Digest]) -> None:
    """Copy what was asked for these prompts out of a shared journal: RUN holds its own evidence."""
    if journal.path != run / "journal.db":
        with Journal(run / "journal.db") as own:
            journal.copy_to(own, keys)
