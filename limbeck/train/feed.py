"""From the schedule to the forward passes of each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset

from limbeck.records import Example
from limbeck.render.batches import Batch, collate, collate_packed, tiles, width_of
from limbeck.train.schedule import Schedule, cut

OwnAnswers = Callable[[int], list[Example]]
"""From the number of a step to the examples that the student wrote for it. Called once the step is due, not before."""

_PAD = 0
"""Never looked at: padding stands to the right of every token."""


@dataclass(frozen=True)
class MicroBatch:
    """What one process computes between two synchronisations. Not a tuple, which the library would take apart."""

    passes: tuple[Batch, ...]
    supervised: int
    """Supervised tokens over all passes."""


@dataclass
class Counts:
    """What one process has read, over all its steps since it started."""

    tokens: int = 0
    positions: int = 0
    """Tokens and padding."""
    own: int = 0
    """Supervised tokens that the student wrote itself; of the whole step, whatever the number of processes."""
    supervised: int = 0
    """The same of all tokens."""

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class Feed(Dataset[MicroBatch]):
    """The micro-batches of one process, in order: item i is piece i % accumulate of step i // accumulate.

    Items are made when they are asked for, so that a step which learns from what the student itself writes is written
    by the student as it then is; a resumed run skips items without making them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        schedule: Schedule,
        *,
        own_answers: OwnAnswers | None = None,
        accumulate: int = 1,
        process: int = 0,
        processes: int = 1,
        packed: bool = False,
    ):
        self.counts = Counts()
        self._examples, self._schedule, self._own_answers = examples, schedule, own_answers
        self._accumulate, self._process, self._processes = accumulate, process, processes
        self._packed = packed
        self._longest = max((len(e.tokens_T) for e in examples), default=0)
        """No pass is made wider than the longest sequence: a model may know no positions after it."""
        self._held: tuple[int, list[Example]] = (-1, [])

    def __len__(self) -> int:
        return len(self._schedule.steps) * self._accumulate

    @property
    def tokens(self) -> int:
        """Of all steps and processes; an answer that the student has yet to write counts as the one it stands for."""
        read = Counter(i for steps in (self._schedule.steps, self._schedule.prompts) for step in steps for i in step)
        return sum(times * len(self._examples[i].tokens_T) for i, times in read.items())

    def __getitem__(self, index: int) -> MicroBatch:
        step, piece = divmod(index, self._accumulate)
        examples = self._step(step)
        pieces = cut([len(e.tokens_T) for e in examples], self._accumulate * self._processes)
        mine = [examples[i] for i in pieces[piece * self._processes + self._process]]
        passes = self._passes(mine)
        self.counts.tokens += sum(len(e.tokens_T) for e in mine)
        self.counts.positions += sum(batch.tokens_BT.numel() for batch in passes)
        return MicroBatch(passes, sum(batch.supervised for batch in passes))

    def _step(self, step: int) -> list[Example]:
        if self._held[0] != step:
            examples = [self._examples[i] for i in self._schedule.steps[step]]
            own = self._own_answers(step) if self._own_answers and self._schedule.prompts[step] else []
            self.counts.own += sum(e.supervised for e in own)
            self.counts.supervised += sum(e.supervised for e in examples + own)
            self._held = (step, examples + own)
        return self._held[1]

    def _passes(self, examples: Sequence[Example]) -> tuple[Batch, ...]:
        if self._packed:
            return (collate_packed(examples),)
        lengths = [len(e.tokens_T) for e in examples]
        return tuple(
            collate(
                [examples[i] for i in group],
                _PAD,
                width=min(width_of([lengths[i] for i in group]), max(self._longest, *(lengths[i] for i in group))),
            )
            for group in tiles(lengths)
        )
