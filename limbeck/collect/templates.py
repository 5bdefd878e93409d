"""Rows of several columns to chat messages, by a template in Jinja.

Templates run in Jinja's sandbox: a recipe may come from somebody else. A column that a row lacks, or that is null where
it is written out, is an error that names it; `{% if column %}` and `| default(...)` say what to do without it.
"""

from __future__ import annotations

from typing import NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import JsonValue

from limbeck import recipe
from limbeck.collect.rows import Wrong, chat_of, shown
from limbeck.errors import Problem, PromptError
from limbeck.records import Message


class _Null(Undefined):
    """A column that is there and null: false, and replaced by `default`, but never written out."""

    def __str__(self) -> str:
        self._is_null()

    def _is_null(self) -> NoReturn:
        raise UndefinedError(f"{self._undefined_name!r} is null")


class Rendering:
    """A template that was read. Raises `PromptError` where it is not in order."""

    def __init__(self, template: recipe.Template, where: str):
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._messages: list[tuple[str, Template]] = []
        named: set[str] = set()
        problems = []
        for place, part in enumerate(template.parts):
            try:
                named |= meta.find_undeclared_variables(environment.parse(part.content))
                self._messages.append((part.role, environment.from_string(part.content)))
            except TemplateError as error:
                key = f"{where}: template.{f'messages.{place}' if template.messages else part.role}"
                remedy = "see Jinja's documentation of templates; columns stand in {{ }}"
                problems.append(Problem(key, f"{error}: {shown(part.content)}", "a template in Jinja", remedy))
        if problems:
            raise PromptError("a template cannot be read", problems)
        self.columns = tuple(sorted(named - set(environment.globals)))
        """The columns that it names."""

    def messages(self, row: dict[str, JsonValue]) -> tuple[Message, ...] | Wrong:
        """The messages of a row, or what is wrong with it."""
        values = {name: _Null(name=name) if value is None else value for name, value in row.items()}
        chat: list[JsonValue] = []
        for role, template in self._messages:
            try:
                chat.append({"role": role, "content": template.render(values)})
            except UndefinedError as error:
                there = shown(", ".join(row) or "none", 200)
                remedy = "fill it in, correct the name, or write {{ column | default('') }}"
                return Wrong(f"{shown(str(error), 200)}; columns {there}", "a value in every column used", remedy)
            except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError) as error:
                found = f"{type(error).__name__}: {shown(str(error), 200)}"
                return Wrong(found, "a row that the template can be filled with", "correct the row or the template")
        return chat_of("template", chat)
