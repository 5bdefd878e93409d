"""One chat through a chat template to tokens and loss mask.

The tokens are those of `tokenizer.apply_chat_template(messages + [answer])`, one for one, for every chat:
this is checked for each, not trusted. The mask covers one run of tokens, what the teacher wrote:

- it begins with the first token that begins in the answer. A token that begins in the prompt is not covered,
  even where it reaches into the answer: the teacher never chose it. White space that the template puts
  between the generation prompt and the answer belongs to the answer, since whoever is given the generation
  prompt has to write it;
- it ends with the token that ends the turn, if the teacher ended its answer itself, and else with the
  answer's last token.

Not covered are the prompt, earlier answers in it (the prompt file wrote those), and the template's own text
before and after. Where things are in the template's text is found by rendering the same chat a second time
with a mark in the answer's place. No rule looks at what a token's id is to decide whether it was written, so
padding that equals the end of the turn changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.errors import ModelError, Problem
from limbeck.ledger.canonical import digest_json
from limbeck.models import chat_template
from limbeck.models.speech import as_chat, as_tools
from limbeck.records import Message, Tool, ToolCall

SPECIAL_TEXT = "special_token_text"
"""The prompt or the answer contains the text of a special token, which would be read as that token."""
REFUSED = "template_refused"
"""The template raised an error for these messages."""
NOT_FOUND = "answer_not_found"
"""The template changed the answer into something the teacher did not write."""


class Rendered(NamedTuple):
    """One chat as tokens."""

    tokens_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]
    """True on the tokens the teacher wrote. Never on the first: nothing predicts it."""
    ended: bool
    """Whether a token that ends the turn is under the mask."""


class LeftOut(NamedTuple):
    """Why a chat cannot be rendered."""

    reason: str
    """`SPECIAL_TEXT`, `REFUSED` or `NOT_FOUND`."""
    detail: str


class Said(NamedTuple):
    """An answer: text, calls of tools, and the tools that it could choose from."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[Tool, ...] = ()


class _Turn(NamedTuple):
    """The template's text and where in it the teacher wrote, in characters."""

    text: str
    start: int
    end: int
    """After the answer."""


class ChatRenderer:
    """Renders chats by one tokenizer and its chat template. `name` is what errors call the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        """Raises `ModelError` for a tokenizer without a chat template, or without offsets of its tokens."""
        template = chat_template(tokenizer)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelError(
                "the tokenizer does not say where its tokens lie in the text",
                [
                    Problem(
                        f"{name}: tokenizer",
                        type(tokenizer).__name__,
                        "a fast tokenizer (one with a tokenizer.json)",
                        "convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
                    ),
                ],
            )
        self.name = name
        self._tokenizer = tokenizer
        self._core = _offsets_core(tokenizer)
        self._dated = "date_string" in template
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control = self._turn_tokens().union(special, tokenizer.all_special_ids)

    def render(
        self, messages: Sequence[Message], answer: str | Said, *, stopped: bool, created: datetime
    ) -> Rendered | LeftOut:
        """The chat `messages` + `answer` as tokens and mask.

        `stopped`: the teacher ended the answer itself, so the end of the turn is its own and is learned.
        `created`: when the answer was written; templates that take a `date_string` get this date.

        Raises:
            ModelError: the tokenizer contradicts itself.

        """
        answer = Said(answer) if isinstance(answer, str) else answer
        holder = self._special_text(messages, answer)
        if holder:
            return LeftOut(SPECIAL_TEXT, holder)
        date = created.strftime("%d %b %Y")
        try:
            turn = self._locate_calls(messages, answer, date) if answer.calls else self._locate(messages, answer, date)
        except TemplateError as error:
            return LeftOut(REFUSED, f"{error} (roles: {', '.join(m.role for m in messages)}, assistant)")
        if turn is None:
            said = answer.text or ", ".join(call.name for call in answer.calls)
            return LeftOut(NOT_FOUND, f"the template changes the answer {_short(said)}")
        tokens_T, begin_T = self._encode(turn.text)
        self._check(tokens_T, self._apply_to_tokens(messages, answer, date))
        mask_T = (begin_T >= turn.start) & (begin_T < turn.end)
        ender = self._end_of_turn(turn, tokens_T, begin_T) if stopped else None
        if ender is not None:
            mask_T |= (begin_T >= turn.start) & (np.arange(len(tokens_T)) <= ender)
        mask_T[:1] = False
        return Rendered(tokens_T, mask_T, ender is not None)

    def _apply(
        self,
        messages: Sequence[Message],
        answer: str | Said | None,
        date: str,
        *,
        prompting: bool = True,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The template's text; with `answer` None it ends where an answer begins, if `prompting`."""
        text = self._tokenizer.apply_chat_template(
            _chat(messages, answer),
            tokenize=False,
            add_generation_prompt=prompting and answer is None,
            **as_tools(answer.tools if isinstance(answer, Said) else tools),
            **self._dates(date),
        )
        return str(text)

    def _apply_to_tokens(self, messages: Sequence[Message], answer: Said, date: str) -> NDArray[np.int32]:
        ids = self._tokenizer.apply_chat_template(
            _chat(messages, answer),
            tokenize=True,
            return_dict=False,
            **as_tools(answer.tools),
            **self._dates(date),
        )
        return np.asarray(ids, dtype=np.int32)

    def _dates(self, date: str) -> dict[str, Any]:
        return {"date_string": date} if self._dated else {}

    def _locate(self, messages: Sequence[Message], answer: Said, date: str) -> _Turn | None:
        """The template's text with the answer's place in it, or None where the answer is not in it.

        A template may strip the answer, or leave out a part of it (a thinking block); what it rendered must
        be something the teacher wrote, white space aside.
        """
        text = self._apply(messages, answer, date)
        # No fixed text, so that no prompt can contain it by chance or on purpose.
        mark = f"limbeck{digest_json([text])[7:39]}"
        head, _, tail = self._apply(messages, answer._replace(text=mark), date).partition(mark)
        prompt = self._prompt(messages, date, answer.tools)
        if mark in head + tail or not text.endswith(tail):
            return None
        for before in (head, prompt):
            if before is None or not text.startswith(before) or len(before) + len(tail) > len(text):
                continue
            middle = text[len(before) : len(text) - len(tail)]
            if not _wrote(answer.text, middle):
                continue
            start, end = len(before), len(before) + len(middle)
            if prompt is not None and text.startswith(prompt) and not text[len(prompt) : start].strip():
                start = min(start, len(prompt))
            return _Turn(text, start, end)
        return None

    def _locate_calls(self, messages: Sequence[Message], answer: Said, date: str) -> _Turn | None:
        """The same for an answer that calls tools: all that follows the generation prompt, up to what ends a turn of
        words alone. None where the template ends such a turn otherwise, or leaves out a name or an argument.
        """
        text, prompt = self._apply(messages, answer, date), self._prompt(messages, date, answer.tools)
        mark = f"limbeck{digest_json([text])[7:39]}"
        tail = self._apply(messages, Said(mark, (), answer.tools), date).partition(mark)[2]
        if prompt is None or not text.startswith(prompt) or not text.endswith(tail):
            return None
        start, end = len(prompt), len(text) - len(tail)
        rest = text[start:end]
        if answer.text.strip() not in rest:
            return None
        for call in answer.calls:
            if not all(piece in rest for piece in (call.name, *_pieces(call.values()))):
                return None
        return _Turn(text, start, end)

    def _prompt(self, messages: Sequence[Message], date: str, tools: Sequence[Tool]) -> str | None:
        """What the teacher was given, or None for a template that does not end on anything but an answer."""
        try:
            return self._apply(messages, None, date, tools=tools)
        except TemplateError:
            return None

    def _encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Token ids, and the character each token begins at."""
        encoding = self._core.encode(text, add_special_tokens=False)
        begin_T = np.asarray([begin for begin, _ in encoding.offsets], dtype=np.int64)
        return np.asarray(encoding.ids, dtype=np.int32), begin_T

    def _end_of_turn(self, turn: _Turn, tokens_T: NDArray[np.int32], begin_T: NDArray[np.int64]) -> int | None:
        """Position of the first control token after the answer, if at most white space lies between."""
        for t in np.flatnonzero(begin_T >= turn.end):
            if turn.text[turn.end : begin_T[t]].strip():
                return None
            if int(tokens_T[t]) in self._control:
                return int(t)
        return None

    def _special_text(self, messages: Sequence[Message], answer: Said) -> str:
        """Which of the texts contains a special token's text; empty if none does."""
        texts = [(f"message {i} ({m.role})", m.content) for i, m in enumerate(messages)] + [("the answer", answer.text)]
        calls = [call for m in messages for call in m.tool_calls or ()] + list(answer.calls)
        texts += [(f"a call of {call.name}", f"{call.name} {call.arguments}") for call in calls]
        texts += [(f"tool {tool.name}", tool.model_dump_json()) for tool in answer.tools]
        for where, text in texts:
            ids = self._control.intersection(self._core.encode(text, add_special_tokens=False).ids)
            # A tokenizer may also give its unknown token, for a character it does not have.
            found = sorted(token for token in map(self._core.id_to_token, ids) if token and token in text)
            if found:
                return f"{where} contains {', '.join(found)}"
        return ""

    def _turn_tokens(self) -> frozenset[int]:
        """Added tokens that the template sets around messages. Some models do not mark theirs as special."""
        user = Message(role="user", content="a")
        mark = "limbeck"
        try:
            around = self._apply([user], mark, "01 Jan 2026").partition(mark)[2]
            around += self._apply([user], None, "01 Jan 2026", prompting=False)
        except TemplateError:
            return frozenset()
        added = self._tokenizer.added_tokens_decoder
        return frozenset(i for i, token in added.items() if token.content in around)

    def _check(self, ours_T: NDArray[np.int32], theirs_T: NDArray[np.int32]) -> None:
        if np.array_equal(ours_T, theirs_T):
            return
        size = min(len(ours_T), len(theirs_T))
        differ = np.flatnonzero(ours_T[:size] != theirs_T[:size])
        at = int(differ[0]) if len(differ) else size

        def show(ids: NDArray[np.int32]) -> str:
            return f"{len(ids)} tokens; {self._tokenizer.convert_ids_to_tokens(ids[at : at + 6].tolist())}"

        raise ModelError(
            "the tokenizer contradicts itself",
            [
                Problem(
                    f"{self.name}: apply_chat_template, from token {at} on",
                    show(theirs_T),
                    show(ours_T) + " (tokenizer.json)",
                    "use a tokenizer whose tokenizer.json is what its Python class does",
                ),
            ],
        )


def _offsets_core(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's core without its last step, which may trim white space off the offsets."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_padding()
    core.no_truncation()
    core.post_processor = None  # type: ignore[assignment]
    return core


def _chat(messages: Sequence[Message], answer: str | Said | None) -> list[dict[str, Any]]:
    if isinstance(answer, Said):
        return as_chat(messages, answer.text, answer.calls)
    return as_chat(messages, answer)


def _pieces(value: object) -> Iterator[str]:
    """The names and values in a call's arguments, as JSON writes them without its quotes."""
    if isinstance(value, dict):
        yield from (key for key in value if key.isascii())
        for inner in value.values():
            yield from _pieces(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pieces(inner)
    elif isinstance(value, str) and value.isascii() and value.isalnum():  # else templates escape it in their own way
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def _wrote(answer: str, rendered: str) -> bool:
    """Whether `rendered` is the answer, or a piece of it, white space aside."""
    return "".join(rendered.split()) == "".join(answer.split()) or bool(rendered.strip() and rendered.strip() in answer)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
