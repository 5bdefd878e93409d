"""Prompts that the teacher writes itself (Magpie, arXiv 2406.08464).

An instruction-tuned model that is given its own chat template up to the user's turn, and nothing more,
writes what it expects a user to say. Candidates are numbered from 0, each with its own seed; they are
written a batch at a time and taken in their order until there are enough, so the result does not depend on
where a run was interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from limbeck.collect.journal import Journal
from limbeck.collect.local import LocalAnswer, LocalTeacher
from limbeck.collect.rows import shown
from limbeck.collect.written.tally import Piece, Shown, Tally
from limbeck.errors import ModelError, Problem
from limbeck.progress import Line, TokenCount
from limbeck.recipe import SelfPrompt
from limbeck.records import Digest, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SENTINEL = "limbecksentinel"

_MIN_WORDS = 3
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""A word; in scripts that put no space between words, a character."""

_ROLE = re.compile(
    r"<\|[^|<>]*\|>|\[/?INST\]|^[\s*#>]*(?:user|human|assistant|system|ai)[\s*]*(?::|$)",
    re.IGNORECASE | re.MULTILINE,
)
"""What belongs to a template or a transcript, not into one user's words."""

_LOOP = re.compile(r"(\w.{5,}?)\1\1", re.DOTALL)
"""Six characters or more three times running, from a letter or digit on: indented code is no loop."""


class UserTurn(NamedTuple):
    """Where a user's turn begins in a model's own chat template, and what ends it."""

    tokens: tuple[int, ...]
    """Everything before the user's words."""
    end: int
    """The special token after them."""
    special: frozenset[int]
    """All special tokens, which a user does not write."""


def user_turn(tokenizer: PreTrainedTokenizerFast, system: str | None) -> UserTurn:
    """Read off the chat template by rendering a sentinel as the user's words. Raises `ModelError` where the
    template does not show them as they are, or no special token ends the turn.
    """
    user = {"role": "user", "content": _SENTINEL}
    chat = [{"role": "system", "content": system}, user] if system else [user]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError as error:
        raise _no_turn(tokenizer, shown(str(error), 200), "a template that takes a user's message") from error
    before, _, after = text.partition(_SENTINEL)
    if text.count(_SENTINEL) != 1:
        raise _no_turn(tokenizer, f"the user's words {text.count(_SENTINEL)} times", "the user's words once")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    # A token that reaches into the user's words is theirs: in many vocabularies the space before a word is
    # a part of it.
    prefix = tuple(token for token, (_, stop) in spans if stop <= len(before))
    rest = [token for token, (start, _) in spans if start >= len(before) + len(_SENTINEL)]
    end = next((token for token in rest if token in special), None)
    if end is None or not prefix:
        found = f"{shown(before[-30:]) or 'nothing'} before and {shown(after[:30]) or 'nothing'} after them"
        raise _no_turn(tokenizer, found, "something before the user's words, and a special token after them")
    return UserTurn(prefix, end, frozenset(special))


def _no_turn(tokenizer: PreTrainedTokenizerFast, found: str, expected: str) -> ModelError:
    remedy = "give prompts in a file: {kind: file, path: ...}, or take another teacher"
    problem = Problem(f"chat template of {tokenizer.name_or_path}", found, expected, remedy)
    return ModelError("the teacher cannot write prompts", [problem])


def write_prompts(
    teacher: LocalTeacher,
    source: SelfPrompt,
    stream: int,
    width: int,
    known: Collection[Digest],
    journal: Journal,
    line: Line,
    asked: list[Digest],
) -> Tally:
    """`source.count` different prompts that are not among the `known` ids.

    `asked` gets the keys of its requests. `stream` tells several such sources of a recipe apart. Candidates are
    written `width` at a time; each batch is journaled in one commit before it is looked at, and one that is there
    already is not written again. Raises `InputError` with what was kept and dropped where too few are of use
    (`Tally.refuse_vain`).
    """
    turn = user_turn(teacher.tokenizer, source.system)
    shown_on = Shown(line)
    tally = Tally(f"self-prompt of {teacher.identity.name}", source.count, shown_on)
    wrote = TokenCount(shown_on)
    taken: set[str] = set()
    for candidate in _candidates(teacher, source, turn, stream, width, journal, asked, wrote):
        tally.refuse_vain()
        text = candidate.text.strip()
        messages = _messages(source, text)
        folded = " ".join(text.casefold().split())
        reason = _dropped(candidate, turn, text)
        if reason is None and (folded in taken or Prompt.id_of(messages) in known):
            reason = "duplicate"
        if reason is not None:
            tally.drop(reason, candidate.completion_tokens)
            continue
        taken.add(folded)
        tally.keep(Piece(messages, ()), candidate.completion_tokens)
        if len(tally.kept) == source.count:
            break
    return tally


def _dropped(candidate: LocalAnswer, turn: UserTurn, text: str) -> str | None:
    if candidate.stop is None:
        return "ran on"
    if candidate.stop != turn.end:
        return "ended as an answer"
    if not turn.special.isdisjoint(candidate.tokens):
        return "special token"
    return why_not(text)


def _candidates(
    teacher: LocalTeacher,
    source: SelfPrompt,
    turn: UserTurn,
    stream: int,
    width: int,
    journal: Journal,
    asked: list[Digest],
    wrote: TokenCount,
) -> Iterator[LocalAnswer]:
    """Candidates in the order of their numbers, without end, from the journal, where those it lacks are put first."""
    for start in count(0, width):
        requests = [
            teacher.continuation(turn.tokens, turn.end, source, f"self-prompt-{stream}", number)
            for number in range(start, start + width)
        ]
        asked += [request.key for request in requests]
        lacking = set(journal.missing(request.key for request in requests))
        if lacking:
            for group in teacher.answer([[request for request in requests if request.key in lacking]], wrote):
                journal.put_group(group)
        for request in requests:
            yield teacher.read(journal.get(request.key).raw)


def why_not(text: str) -> str | None:
    """Why this text, which ended by itself, is no use as a prompt; None if it is.

    The rules are few and plain, and judge form only. What is odd in content stays: a student has to see how
    its teacher answers odd questions too.
    """
    if not text:
        return "empty"
    if "\ufffd" in text:
        return "broken character"
    if _ROLE.search(text):
        return "role marker"
    if len(_WORD.findall(text)) < _MIN_WORDS:
        return "short"
    if _LOOP.search(text):
        return "loop"
    return None


def _messages(source: SelfPrompt, text: str) -> tuple[Message, ...]:
    system = (Message(role="system", content=source.system),) if source.system else ()
    return (*system, Message(role="user", content=text))
