"""How a `TopKSignal` is stored: the ids, the log-probabilities and the tail's mass, bit for bit.

    ids        [N, K]  int32, below the vocabulary
    log_probs  [N, K]  float32, nats
    tail       [N]     float32, the probability of every other token together

A block has 2 or 3 planes of ids, 4 of log-probabilities (the bits of the float32), both rank by rank and not position
by position, for like ranks have like magnitudes, and 4 of the tail. `planes` says what a plane is. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.signal.codec import Span
from limbeck.signal.manifest import SignalKey
from limbeck.signal.planes import Packed, damaged, from_planes, to_planes
from limbeck.signal.sampling import topk_signal
from limbeck.signal.types import TopKSignal


class TopKArrays(NamedTuple):
    """An encoded `TopKSignal`; the module's docstring gives types and shapes."""

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    tail: NDArray[np.float32]


class TopKCodec(NamedTuple):
    """`codec.Codec` of the k most likely tokens."""

    k: int
    temperature: float
    vocab_size: int

    @classmethod
    def of(cls, key: SignalKey) -> TopKCodec:
        """The codec of a store."""
        assert key.k is not None
        assert key.temperature is not None
        return cls(key.k, key.temperature, key.vocab_size)

    @property
    def _widths(self) -> tuple[int, int, int]:
        return (2 if self.vocab_size <= 1 << 16 else 3, 4, 4)

    @property
    def columns(self) -> int:
        """Numbers in a block's row of a shard's table."""
        return 3 + sum(self._widths)

    def from_logits(self, logits_NV: Tensor, generator: torch.Generator) -> TopKSignal:
        """The k most likely tokens of softmax(logits / temperature); nothing is drawn from `generator`."""
        return topk_signal(logits_NV, self.k, self.temperature, vocab_size=self.vocab_size)

    def encode(self, parts: Sequence[TopKSignal], generator: torch.Generator) -> TopKArrays:
        """The arrays of neighbouring positions; nothing is rounded."""
        on_cpu = [part.to("cpu") for part in parts]
        return TopKArrays(
            np.concatenate([part.ids_NK.numpy() for part in on_cpu]).astype(np.int32),
            np.concatenate([part.log_probs_NK.numpy() for part in on_cpu]).astype(np.float32),
            np.concatenate([part.tail_mass_N.numpy() for part in on_cpu]).astype(np.float32),
        )

    def decode(self, parts: Sequence[TopKArrays]) -> TopKSignal:
        """The signal over all parts."""
        arrays = _join(parts) if parts else _none(self.k)
        return TopKSignal(
            torch.from_numpy(arrays.ids.astype(np.int64)),
            torch.from_numpy(arrays.log_probs),
            torch.from_numpy(arrays.tail),
            self.vocab_size,
            self.temperature,
        )

    def positions(self, arrays: TopKArrays) -> int:
        """Number of positions."""
        return len(arrays.tail)

    def pack(self, parts: Sequence[TopKArrays]) -> Packed:
        """One block."""
        whole = _join(parts)
        numbers = (whole.ids.T.reshape(-1), _bits(whole.log_probs.T), _bits(whole.tail))
        planes = [
            plane for values_M, width in zip(numbers, self._widths, strict=True) for plane in to_planes(values_M, width)
        ]
        entries = whole.ids.size
        return Packed(len(whole.tail), entries, entries, tuple(map(len, planes)), b"".join(planes))

    def unpack(self, block: Packed) -> TopKArrays:
        """What was packed."""
        if block.entries != block.positions * self.k or block.heads != block.entries:
            raise damaged(f"{block.entries} entries", f"{self.k} at each of {block.positions} positions")
        lengths = (block.entries, block.entries, block.positions)
        ids_E, log_probs_E, tail_N = from_planes(block, list(zip(self._widths, lengths, strict=True)))
        return TopKArrays(
            ids_E.astype(np.int32).reshape(self.k, -1).T,
            log_probs_E.view(np.float32).reshape(self.k, -1).T,
            tail_N.view(np.float32),
        )

    def counts(self, arrays: TopKArrays, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Entries of each example; all have a probability of their own."""
        return [(count * self.k, count * self.k) for count in positions]

    def cut(self, arrays: TopKArrays, span: Span) -> TopKArrays:
        """A copy of what one example takes of a block."""
        own = span.positions
        return TopKArrays(arrays.ids[own].copy(), arrays.log_probs[own].copy(), arrays.tail[own].copy())

    def sums(self, signal: TopKSignal) -> Mapping[str, float]:
        """The mass that is stored token by token, and the positions that hold but the token that stands there."""
        sums = {"stored_mass": float((1 - signal.tail_mass_N.double()).sum())}
        alone = int(torch.isneginf(signal.log_probs_NK).any(dim=1).sum())
        return sums | {"from_the_words": float(alone)} if alone else sums


def _join(parts: Sequence[TopKArrays]) -> TopKArrays:
    ids, log_probs, tail = zip(*parts, strict=True)
    return TopKArrays(np.concatenate(ids), np.concatenate(log_probs), np.concatenate(tail))


def _none(k: int) -> TopKArrays:
    return TopKArrays(np.zeros((0, k), np.int32), np.zeros((0, k), np.float32), np.zeros(0, np.float32))


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)
