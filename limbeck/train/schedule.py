"""Which examples every optimiser step sees, settled before training starts.

The whole order is a pure function of the example lengths, the settings and the seed. A resumed run therefore needs no
sampler state: step n reads what step n always reads. It is also what a commitment to the data order commits to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, pairwise

from limbeck.errors import Problem, RecipeError
from limbeck.ledger.canonical import digest_json
from limbeck.render.batches import batches


@dataclass(frozen=True)
class Schedule:
    """What each optimiser step learns from. Numbers are indices of the training examples."""

    steps: tuple[tuple[int, ...], ...]
    """The examples of each step that are learned from as the teacher wrote them."""
    prompts: tuple[tuple[int, ...], ...]
    """The examples of each step of which the student answers the prompt, and learns from its own answer."""
    steps_per_epoch: int

    @property
    def digest(self) -> str:
        """Digest of the whole order."""
        return digest_json([self.steps, self.prompts])


def make_schedule(
    lengths: Sequence[int],
    *,
    batch_size: int,
    epochs: float,
    pieces: int,
    seed: int,
    own: tuple[float, float] = (0.0, 0.0),
) -> Schedule:
    """The order of training: `lengths` in tokens, `pieces` that each step is computed in, `epochs` may be a fraction.

    Every example is seen once in each whole epoch. Examples of like length share a step, so that little is padded;
    which steps follow each other is random. `own` is the share of a step's sequences that the student writes itself, at
    the first step and at the last; it changes evenly, and over any stretch of steps the number of such sequences is as
    near to its share as whole sequences allow. Teacher-written examples and prompts to be answered are then two
    streams, each of which sees every example once before it sees one again.

    Raises:
        RecipeError: fewer examples, or a smaller batch, than pieces to compute a step in.
    """
    number = len(lengths)
    smallest = number // -(-number // batch_size) if number else 0
    if smallest < pieces:
        raise RecipeError(
            "a step cannot be cut into so many pieces",
            [
                Problem(
                    "train.batch_size",
                    f"{batch_size} sequences a step, {number} examples: {smallest} in the smallest step",
                    f"at least {pieces}, the processes times train.accumulate",
                    "raise train.batch_size, lower train.accumulate, or collect more examples",
                ),
            ],
        )
    order: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        one = batches(lengths, batch_size, seed=seed, epoch=epoch)
        order += one[: max(1, round(min(1.0, epochs - epoch) * len(one)))]
    per_epoch = -(-number // batch_size)
    if own == (0.0, 0.0):
        return Schedule(tuple(map(tuple, order)), ((),) * len(order), per_epoch)
    sizes = [len(step) for step in order]
    students = _shares(sizes, own)
    written, prompts = _stream(lengths, batch_size, seed, first=0), _stream(lengths, batch_size, seed, first=1 << 20)
    return Schedule(
        tuple(tuple(islice(written, size - n)) for size, n in zip(sizes, students, strict=True)),
        tuple(tuple(islice(prompts, n)) for n in students),
        per_epoch,
    )


def _shares(sizes: Sequence[int], own: tuple[float, float]) -> list[int]:
    """Of each step's sequences, how many the student writes: the rounded running sum of its share."""
    last = max(1, len(sizes) - 1)
    due = [size * (own[0] + (own[1] - own[0]) * step / last) for step, size in enumerate(sizes)]
    # Half a sequence is rounded up, not to even, or shares of a half would alternate between none and two.
    running = [0, *(math.floor(total + 0.5) for total in _running(due))]
    return [b - a for a, b in pairwise(running)]


def _running(values: Sequence[float]) -> Iterator[float]:
    total = 0.0
    for value in values:
        total += value
        # Sums of thirds and the like come out a hair below the whole number that they mean.
        yield round(total, 9)


def _stream(lengths: Sequence[int], batch_size: int, seed: int, first: int) -> Iterator[int]:
    """All examples in the order of one epoch after the other; `first` keeps the two streams' epochs apart."""
    epochs = (batches(lengths, batch_size, seed=seed, epoch=epoch) for epoch in count(first))
    return chain.from_iterable(chain.from_iterable(epochs))


def cut(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """The sequences of a step, by their numbers, in `pieces` parts of near-equal number, like lengths together."""
    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    bounds = [len(ordered) * p // pieces for p in range(pieces + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]
