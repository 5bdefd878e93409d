"""The kinds of sources that a teacher writes: what it is told for each candidate, and what becomes of its words.

Which rows are used is decided by a digest of what they say, never by their order, and no more are held than prompts are
wanted.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from limbeck.collect.digests import DigestSet
from limbeck.collect.files import iter_file_prompts
from limbeck.collect.written.tally import Piece
from limbeck.collect.written.wording import told
from limbeck.recipe import (
    DatasetPrompts,
    DocumentPrompts,
    EvolvePrompts,
    FilePrompts,
    MultiTurnPrompts,
    PersonaPrompts,
    SelfInstructPrompts,
)
from limbeck.recipe.prompts import WrittenPrompts
from limbeck.records import Digest, Message, Parent, Prompt
from limbeck.seeds import derive_seed

_DEEPER = (
    "add one more condition or requirement",
    "ask for the reasons, not only for the result",
    "replace what is general by something particular",
    "make it take several steps of thought where it now takes one",
    "add a short piece of data, a table or some code that has to be worked with",
)
_BESIDE = 0.25
"""Share of candidates that are evolved in breadth."""
_WAVE = 64
"""Requests that are under way together, at most."""
_OWN = 4
"""One example in so many is of the teacher's own, where there is one."""
_SPACED = re.compile(r"\S+")
_NUMBERED = re.compile(r"[ \t]{0,3}\**(\d{1,4})[.):]\**[ \t]+(.*)")


class Task(NamedTuple):
    """What the teacher is told, and how its words become a prompt, or several."""

    instruction: tuple[Message, ...]
    number: int
    """Tells candidates with the same instruction apart."""
    parents: tuple[Parent, ...]
    likened: tuple[str, ...]
    """Texts that it must not be too similar to."""
    make: Callable[[str], tuple[Message, ...]]
    listed: bool = False
    """Whether it is asked for a numbered list, each item of which is a candidate."""
    then: Callable[[str], Task] | None = None
    """What it is told next, after these words; None where they end the candidate."""
    before: tuple[Digest, ...] = ()
    """Prompts of earlier rounds that it is made from."""


class Kind(Protocol):
    """One kind of source. Law: a task is a function of the recipe, the rows, and what was kept in earlier rounds."""

    rounds: int
    wordings: tuple[str, ...]
    wave: int
    """Tasks that are written together."""
    remembers: bool
    """Whether `before` is what all earlier rounds kept, and not only the last one."""

    def task(self, before: Sequence[Piece], number: int) -> Task | None:
        """Task `number`; `before` is what the round before kept, empty in the first. None where there is no more to
        ask.
        """
        ...


def make_kind(source: WrittenPrompts, seed: int) -> Kind:
    """The kind that a source of the recipe names, with its rows read."""
    match source.kind:
        case "evolve":
            return Evolve(source, seed)
        case "personas":
            return Personas(source, seed)
        case "documents":
            return Documents(source)
        case "self-instruct":
            return SelfInstruct(source, seed)
        case "multi-turn":
            return MultiTurn(source)


class Evolve:
    """A `Kind`: seeds made harder, or something beside them."""

    wordings: tuple[str, ...] = ("deepen", "widen")
    remembers = False

    def __init__(self, source: EvolvePrompts, seed: int):
        self.rounds, self._seed = source.rounds, seed
        self.wave = _wave(source.count, source.rounds)
        self._seeds = chosen(source.seeds, source.count)

    def task(self, before: Sequence[Piece], number: int) -> Task:
        """See `Kind.task`. What stood before the user's last words stays."""
        pool = before or self._seeds
        piece = pool[number % len(pool)]
        draw = random.Random(derive_seed(self._seed, "evolve", Prompt.id_of(piece.messages), number))
        if draw.random() < _BESIDE:
            instruction = told("widen", prompt=piece.text)
        else:
            instruction = told("deepen", prompt=piece.text, how=draw.choice(_DEEPER))
        system = tuple(message for message in piece.messages[:-1] if message.role == "system")
        own = (Prompt.id_of(piece.messages),) if before else ()
        return Task(instruction, number, piece.parents, (piece.text,), lambda text: (*system, _user(text)), before=own)


class Personas:
    """A `Kind`: each persona with each task, in an order drawn by the recipe's seed."""

    rounds = 1
    wordings: tuple[str, ...] = ("persona",)
    remembers = False

    def __init__(self, source: PersonaPrompts, seed: int):
        self.wave = _wave(source.count)
        self._personas = chosen(source.personas, source.count, "persona")
        self._tasks = chosen(source.tasks, source.count, "task")
        self._pairs = len(self._personas) * len(self._tasks)
        # Steps of a number without a common divisor come by every pair once.
        draw = random.Random(derive_seed(seed, "personas"))
        self._first = draw.randrange(self._pairs)
        self._step = draw.randrange(1, self._pairs + 1)
        while math.gcd(self._step, self._pairs) != 1:
            self._step = draw.randrange(1, self._pairs + 1)

    def task(self, before: Sequence[Piece], number: int) -> Task:
        """See `Kind.task`."""
        pair = (self._first + number * self._step) % self._pairs
        who, what = self._personas[pair // len(self._tasks)], self._tasks[pair % len(self._tasks)]
        instruction = told("persona", persona=who.text, task=what.text)
        return Task(instruction, number, (*who.parents, *what.parents), (what.text,), lambda text: (_user(text),))


class Documents:
    """A `Kind`: questions about pieces of documents."""

    rounds = 1
    wordings: tuple[str, ...] = ("question",)
    remembers = False

    def __init__(self, source: DocumentPrompts):
        self.wave = _wave(source.count)
        self._show = source.show
        self._pieces = _pieces(source)

    def task(self, before: Sequence[Piece], number: int) -> Task:
        """See `Kind.task`."""
        piece = self._pieces[number % len(self._pieces)]
        instruction = told("question", piece=piece.text, shown=self._show)
        show = f"{piece.text}\n\n" if self._show else ""
        return Task(instruction, number, piece.parents, (), lambda text: (_user(f"{show}{text}"),))


class SelfInstruct:
    """A `Kind`: lists of seeds, and of what was kept in earlier rounds, that the teacher goes on with."""

    wordings: tuple[str, ...] = ("list",)
    remembers = True

    def __init__(self, source: SelfInstructPrompts, seed: int):
        self._source, self._seed = source, seed
        self.rounds = min(source.rounds, source.count)
        self.wave = _wave(source.count, self.rounds * source.each)
        self._seeds = chosen(source.seeds, max(source.count, source.examples))

    def task(self, before: Sequence[Piece], number: int) -> Task:
        """See `Kind.task`. The parents are all examples; there is always a seed among them."""
        draw = random.Random(derive_seed(self._seed, "self-instruct", len(before), number))
        own = draw.sample(before, min(self._source.examples // _OWN, len(before)))
        seeds = draw.sample(self._seeds, min(self._source.examples - len(own), len(self._seeds)))
        examples = [*seeds, *own]
        draw.shuffle(examples)
        texts = tuple(" ".join(piece.text.split()) for piece in examples)
        instruction = told("list", examples=texts, each=self._source.each)
        parents = tuple(dict.fromkeys(parent for piece in seeds for parent in piece.parents))
        ids = tuple(Prompt.id_of(piece.messages) for piece in own)
        return Task(instruction, number, parents, texts, lambda text: (_user(text),), listed=True, before=ids)


class MultiTurn:
    """A `Kind`: chats in which the teacher answers, and then speaks for the user."""

    rounds = 1
    wordings: tuple[str, ...] = ("turn",)
    remembers = False

    def __init__(self, source: MultiTurnPrompts):
        self._turns = source.turns
        self.wave = _wave(source.count)
        self._seeds = chosen(source.seeds, source.count)

    def task(self, before: Sequence[Piece], number: int) -> Task:
        """See `Kind.task`."""
        piece = self._seeds[number % len(self._seeds)]
        return self._answer(piece.messages, 1, number, piece.parents)

    def _answer(self, chat: tuple[Message, ...], turn: int, number: int, parents: tuple[Parent, ...]) -> Task:
        """The teacher's answer to a chat with so many of the user's turns."""

        def then(text: str) -> Task:
            return self._ask((*chat, Message(role="assistant", content=text)), turn + 1, number, parents)

        return Task(chat, number, parents, (), lambda text: (*chat, _user(text)), then=then)

    def _ask(self, chat: tuple[Message, ...], turn: int, number: int, parents: tuple[Parent, ...]) -> Task:
        """The user's turn of this number. It must not say again what was said."""

        def make(text: str) -> tuple[Message, ...]:
            return (*chat, _user(text))

        spoken = [message for message in chat if message.role in ("user", "assistant")]
        likened = tuple(message.content for message in spoken if message.role == "user")
        then = None if turn == self._turns else lambda text: self._answer(make(bare(text)), turn, number, parents)
        return Task(told("turn", chat=spoken), number, parents, likened, make, then=then)


def _wave(count: int, parts: int = 1) -> int:
    """Requests that are under way together: no more than would do if all that comes of them were kept, since all are
    paid for. `count` prompts come in as many parts as rounds times prompts a request.
    """
    return min(_WAVE, math.ceil(count / parts))


def items(text: str) -> list[str]:
    """The items of a numbered list, each to the next number that follows on or to an empty line; what stands before,
    between and after them is left out.
    """
    found: list[list[str]] = []
    last, within = None, False
    for line in text.splitlines():
        matched = _NUMBERED.match(line)
        if matched and (last is None or int(matched[1]) == last + 1):
            last, within = int(matched[1]), True
            found.append([matched[2].strip()])
        elif not line.strip():
            within = False
        elif within:
            found[-1].append(line.strip())
    return ["\n".join(lines).strip() for lines in found]


def bare(text: str) -> str:
    """Without the quotes that a model may put around all of it."""
    text = text.strip()
    if len(text) > 2 and text[0] + text[-1] in ('""', "“”") and not set(text[1:-1]) & set('"“”'):
        return text[1:-1].strip()
    return text


def chosen(
    source: FilePrompts | DatasetPrompts, count: int, kind: Literal["seed", "persona", "task"] = "seed"
) -> list[Piece]:
    """So many different rows, or all where there are fewer, in the order of a digest of what they say."""
    seen = DigestSet()

    def rows():
        for row in iter_file_prompts(source):
            if row.id not in seen:
                seen.add(row.id)
                yield row

    picked = heapq.nsmallest(count, rows(), key=lambda row: _rank(row.id))
    return [Piece(row.messages, (_parent(row.id, source, kind),)) for row in picked]


def _pieces(source: DocumentPrompts) -> list[Piece]:
    def cut():
        for row in iter_file_prompts(source.documents):
            text = row.messages[-1].content
            starts = [word.start() for word in _SPACED.finditer(text)]
            if not starts:  # an image alone, or nothing: there is nothing to ask about
                continue
            pieces = math.ceil(len(starts) / source.words)
            # Of one length, so that no piece is the last few words of a document.
            cuts = [starts[len(starts) * n // pieces] for n in range(pieces)]
            for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
                yield _rank(f"{row.id} {start}"), text[start:end].strip(), row.id

    picked = heapq.nsmallest(source.count, cut())
    return [Piece((_user(text),), (_parent(name, source.documents, "document"),)) for _, text, name in picked]


def _parent(
    name: str, source: FilePrompts | DatasetPrompts, kind: Literal["seed", "document", "persona", "task"]
) -> Parent:
    return Parent(id=name, source=source.name, licence=source.licence, kind=kind)


def _rank(text: str) -> bytes:
    return hashlib.sha256(f"limbeck-written-1 {text}".encode()).digest()


def _user(text: str) -> Message:
    return Message(role="user", content=text)
