"""What a kind of signal must say to be stored. `sampled` and `top_k` say it, each in one file.

The store knows nothing of any kind: it moves arrays, blocks and counts about, and asks the kind's codec what they are.
A new kind is a file with a codec, a line in `stored.CODECS`, and its settings in `SignalKey`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from limbeck.signal.planes import Packed

A = TypeVar("A")
"""The encoded arrays of some positions."""
S = TypeVar("S")
"""The signal they decode to."""


class Span(NamedTuple):
    """What an example takes of a block's arrays."""

    positions: slice
    entries: slice
    heads: slice


class Codec(Protocol[A, S]):
    """A kind of signal, with the settings that hold for a whole store.

    Laws: `decode([encode(parts, g)])` is `parts` joined, in expectation over `g` where numbers are rounded; `unpack` of
    `pack` is the arrays joined; `cut` at the spans that `counts` gives is the arrays of each example.
    """

    @property
    def columns(self) -> int:
        """Numbers in a block's row of a shard's table."""
        ...

    def from_logits(self, logits_NV: Tensor, generator: torch.Generator) -> S:
        """The signal of the teacher's logits, which may be padded beyond the vocabulary."""
        ...

    def encode(self, parts: Sequence[S], generator: torch.Generator) -> A:
        """The arrays of neighbouring positions; `generator`, on the CPU, decides which way numbers are rounded."""
        ...

    def decode(self, parts: Sequence[A]) -> S:
        """The signal over all parts, one after the other, on the CPU; over no positions where there are no parts."""
        ...

    def positions(self, arrays: A) -> int:
        """Number of positions."""
        ...

    def pack(self, parts: Sequence[A]) -> Packed:
        """One block, of at least one part."""
        ...

    def unpack(self, block: Packed) -> A:
        """What was packed. Raises `StaleError` for planes that do not hold what the counts say."""
        ...

    def counts(self, arrays: A, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Entries, and entries with a probability of their own, of examples of so many positions each."""
        ...

    def cut(self, arrays: A, span: Span) -> A:
        """A copy of what one example takes of a block."""
        ...

    def sums(self, signal: S) -> Mapping[str, float]:
        """Figures summed over the positions; the stage reports their means."""
        ...
