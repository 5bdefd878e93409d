"""Which examples every optimiser step sees, settled before training starts.

The whole order is a pure function of the example lengths, the settings and the seed. A resumed run therefore needs no
sampler state: step n reads what step n always reads. It is also what a commitment to the data order commits to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from limbeck.errors import Problem, RecipeError
from limbeck.ledger.canonical import digest_json
from limbeck.render.batches import batches, padding_share


@dataclass(frozen=True)
class Schedule:
    """`steps[s][m]` are the indices of the examples in micro-batch m of optimiser step s.

    A step has `accumulate * processes` micro-batches; process p of P takes those with m % P == p.
    """

    steps: tuple[tuple[tuple[int, ...], ...], ...]
    steps_per_epoch: int
    padding: float
    """Share of the positions computed that hold no token."""

    @property
    def digest(self) -> str:
        """Digest of the whole order."""
        return digest_json(self.steps)

    def micro_batches(self, process: int, processes: int) -> list[tuple[int, ...]]:
        """What one process computes, in order."""
        return [micro for step in self.steps for m, micro in enumerate(step) if m % processes == process]


def make_schedule(lengths: Sequence[int], *, batch_size: int, epochs: float, pieces: int, seed: int) -> Schedule:
    """The order of training: `lengths` in tokens, `pieces` micro-batches a step, `epochs` may be a fraction.

    Every example is seen once in each whole epoch. Examples of like length share a batch, so that little is padded;
    which batches follow each other is random.

    Raises:
        RecipeError: fewer examples, or a smaller batch, than pieces to compute a step in.
    """
    count = len(lengths)
    smallest = count // -(-count // batch_size) if count else 0
    if smallest < pieces:
        raise RecipeError(
            "a step cannot be cut into so many pieces",
            [
                Problem(
                    "train.batch_size",
                    f"{batch_size} sequences a step, {count} examples: {smallest} in the smallest step",
                    f"at least {pieces}, the processes times train.accumulate",
                    "raise train.batch_size, lower train.accumulate, or collect more examples",
                ),
            ],
        )
    order: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        one = batches(lengths, batch_size, seed=seed, epoch=epoch)
        order += one[: max(1, round(min(1.0, epochs - epoch) * len(one)))]
    steps = tuple(_cut(batch, lengths, pieces) for batch in order)
    micro = [list(piece) for step in steps for piece in step]
    return Schedule(steps, -(-count // batch_size), padding_share(lengths, micro))


def _cut(batch: Sequence[int], lengths: Sequence[int], pieces: int) -> tuple[tuple[int, ...], ...]:
    """A batch in `pieces` parts of near-equal number, neighbours in length together."""
    ordered = sorted(batch, key=lambda i: (lengths[i], i))
    bounds = [len(ordered) * p // pieces for p in range(pieces + 1)]
    return tuple(tuple(ordered[a:b]) for a, b in pairwise(bounds))
