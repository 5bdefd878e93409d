"""How a `SampledSignal` is stored: what `encoding` and `packing` do, as a codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.signal.codec import Span
from limbeck.signal.encoding import SampledArrays, decode_sampled, encode_sampled
from limbeck.signal.manifest import SignalKey
from limbeck.signal.packing import columns, pack, unpack
from limbeck.signal.planes import Packed
from limbeck.signal.sampling import from_logits
from limbeck.signal.types import SampledLayout, SampledSignal, concat


class SampledCodec(NamedTuple):
    """`codec.Codec` of threshold samples."""

    tau: float
    temperature: float
    vocab_size: int

    @classmethod
    def of(cls, key: SignalKey) -> SampledCodec:
        """The codec of a store."""
        assert key.tau is not None
        assert key.temperature is not None
        return cls(key.tau, key.temperature, key.vocab_size)

    @property
    def _layout(self) -> SampledLayout:
        return SampledLayout.of(self.tau, self.vocab_size)

    @property
    def columns(self) -> int:
        """Numbers in a block's row of a shard's table."""
        return columns(self._layout)

    def from_logits(self, logits_NV: Tensor, generator: torch.Generator) -> SampledSignal:
        """A threshold sample of softmax(logits / temperature)."""
        return from_logits(logits_NV, self.tau, self.temperature, generator=generator, vocab_size=self.vocab_size)

    def encode(self, parts: Sequence[SampledSignal], generator: torch.Generator) -> SampledArrays:
        """The arrays of neighbouring positions."""
        return encode_sampled(concat(parts), generator)

    def decode(self, parts: Sequence[SampledArrays]) -> SampledSignal:
        """The signal over all parts."""
        if not parts:
            none_N, none_H = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
            return SampledSignal(none_N, none_N, none_N, none_H, none_H, self.tau, self.vocab_size, self.temperature)
        return decode_sampled(_join(parts), tau=self.tau, vocab_size=self.vocab_size, temperature=self.temperature)

    def positions(self, arrays: SampledArrays) -> int:
        """Number of positions."""
        return len(arrays.n_head)

    def pack(self, parts: Sequence[SampledArrays]) -> Packed:
        """One block."""
        return pack(_join(parts), self._layout)

    def unpack(self, block: Packed) -> SampledArrays:
        """What was packed."""
        return unpack(block, self._layout)

    def counts(self, arrays: SampledArrays, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Entries and heads of each example."""
        ends = np.cumsum([0, *positions])
        heads, tails = _sums(arrays.n_head, ends), _sums(arrays.n_tail, ends)
        return [(head + tail, head) for head, tail in zip(heads.tolist(), tails.tolist(), strict=True)]

    def cut(self, arrays: SampledArrays, span: Span) -> SampledArrays:
        """A copy of what one example takes of a block."""
        own = {"ids": span.entries, "head": span.heads}
        fields = SampledArrays._fields
        return SampledArrays(*(getattr(arrays, name)[own.get(name, span.positions)].copy() for name in fields))

    def sums(self, signal: SampledSignal) -> Mapping[str, float]:
        """The teacher's entropy in nats, and the mass that is stored."""
        mass = float(signal.head_probs_H.double().sum()) + signal.tau * int(signal.n_tail_N.sum())
        return {"entropy_nats": float(signal.entropy_N.double().sum()), "stored_mass": mass}


def _join(parts: Sequence[SampledArrays]) -> SampledArrays:
    return SampledArrays(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sums(counts_N: NDArray[np.generic], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of the counts between neighbouring ends."""
    return np.diff(np.concatenate([[0], np.cumsum(counts_N, dtype=np.int64)])[ends])
