"""The filters: small objects that look at one completion and keep it, or say why not.

To add one, write a class here (or in a file of its own) with `name`, `loosen` and `judge`, and add a function
that makes it from the recipe to `FILTERS`. Nothing else changes: the verdicts, the facts and the error
messages go by what the filter says of itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import ClassVar, Protocol

from limbeck.curate.loops import find_loop
from limbeck.recipe import Curate
from limbeck.records import Completion

STOPPED = frozenset({"stop", "end_turn", "stop_sequence", "eos", "eos_token"})
"""Finish reasons that say that the teacher ended its answer itself."""


def ended(completion: Completion) -> bool:
    """Whether the teacher ended its answer itself: with an end of its turn, or by calling tools."""
    reason = completion.finish_reason
    return reason in STOPPED or (reason == "tool_calls" and bool(completion.tool_calls))


class Filter(Protocol):
    """Looks at completions one by one, in order. May remember what it has seen."""

    name: ClassVar[str]
    """What the verdicts call it."""
    loosen: ClassVar[str]
    """What to change in the recipe so that it drops less."""

    def judge(self, completion: Completion) -> str | None:
        """None to keep the completion, or the reason to drop it."""
        ...


@dataclass(frozen=True)
class Empty:
    """Drops answers with fewer characters than `min_characters`, white space at the ends not counted."""

    min_characters: int
    name: ClassVar[str] = "empty"
    loosen: ClassVar[str] = "lower curate.min_characters"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        size = len(completion.text.strip())
        if completion.tool_calls:
            return None
        return None if size >= self.min_characters else f"{size} characters, fewer than {self.min_characters}"


@dataclass(frozen=True)
class CutOff:
    """Drops answers that the teacher did not end itself."""

    name: ClassVar[str] = "cut_off"
    loosen: ClassVar[str] = "raise collect.max_tokens, or set curate.cut_off to keep"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        if ended(completion):
            return None
        return f"finish reason is {completion.finish_reason!r} after {completion.completion_tokens} tokens"


@dataclass(frozen=True)
class RepeatedLoop:
    """Drops answers that repeat the same words over and over; `limbeck.curate.loops` says what that means."""

    name: ClassVar[str] = "loop"
    loosen: ClassVar[str] = "set curate.loops to false"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        loop = find_loop(completion.text)
        return loop.reason if loop else None


@dataclass
class Duplicate:
    """Drops answers that were given before, word for word; the first in order is kept.

    Two texts are equal if they are so after Unicode normalisation (NFC) and with white space collapsed. To
    the same prompt, an equal text is always a duplicate, whichever teacher or sample it is. To different
    prompts, it is one only from `LENGTH` characters on: "Yes." is a right answer to many questions, while a
    long answer that fits two of them word for word is boilerplate. Training and held-out answers are compared
    with each other too.
    """

    LENGTH: ClassVar[int] = 64
    name: ClassVar[str] = "duplicate"
    loosen: ClassVar[str] = "set curate.duplicates to false, or lower collect.samples"
    _seen: set[bytes] = field(default_factory=set)

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        text = " ".join(unicodedata.normalize("NFC", completion.text).split())
        text += "".join(f" {call.name}({call.arguments})" for call in completion.tool_calls or ())
        anywhere, here = _key("", text), _key(completion.prompt_id, text)
        if here in self._seen:
            return "the same text was already kept for this prompt"
        if anywhere in self._seen:
            return f"the same {len(text)} characters were already kept for another prompt"
        self._seen.add(here)
        if len(text) >= self.LENGTH:
            self._seen.add(anywhere)
        return None


def _key(prompt_id: str, text: str) -> bytes:
    return blake2b(f"{prompt_id}\n{text}".encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Schema:
    """Drops answers that are not what their JSON schema asks for."""

    name: ClassVar[str] = "schema"
    loosen: ClassVar[str] = "loosen collect.json_schema, or take a teacher that keeps to it"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        return completion.mismatch


@dataclass(frozen=True)
class Images:
    """Drops answers to prompts with images: every student here reads text only, and would learn to guess."""

    name: ClassVar[str] = "images"
    loosen: ClassVar[str] = "give prompts without images"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        count = sum(message.images for message in completion.messages)
        return (
            f"{count} image{'s' if count > 1 else ''} in the prompt, and the student reads text only" if count else None
        )


@dataclass(frozen=True)
class Tools:
    """Drops answers with tools where the chat template that renders them cannot say tools."""

    cannot: Callable[[str], str | None]
    """Why the template for a teacher's answers cannot; None where it can."""
    name: ClassVar[str] = "tools"
    loosen: ClassVar[str] = "take a student whose chat template knows tools, or leave tools out"

    def judge(self, completion: Completion) -> str | None:
        """See `Filter.judge`."""
        if not (completion.tools or completion.tool_calls or any(m.tool_calls for m in completion.messages)):
            return None
        for call in completion.tool_calls or ():
            try:
                call.values()
            except ValueError:
                return f"the arguments of {call.name} are no JSON object"
        return self.cannot(completion.teacher)


FILTERS: tuple[Callable[[Curate], Filter | None], ...] = (
    lambda settings: Empty(settings.min_characters) if settings.min_characters else None,
    lambda settings: RepeatedLoop() if settings.loops else None,
    lambda settings: CutOff() if settings.cut_off == "drop" else None,
    lambda settings: Duplicate() if settings.duplicates else None,
)
"""What makes each filter from the recipe's settings, or None where they switch it off. Completions pass
through in this order and the first filter that drops one names itself. `Duplicate` stays last: what it has
seen must have been kept."""


ALWAYS = (Schema, Images, Tools)
"""What no recipe switches off; facts name these only where they dropped something."""


def make_filters(settings: Curate, cannot: Callable[[str], str | None] | None = None) -> tuple[Filter, ...]:
    """The filters that the settings ask for, in order, with nothing seen yet; with `cannot` (see `Tools`) first those
    that nobody can switch off.
    """
    made = (make(settings) for make in FILTERS)
    always = (Schema(), Images(), Tools(cannot)) if cannot is not None else ()  # `ALWAYS`
    return (*always, *(f for f in made if f is not None))
