"""Examples to batches: which go together, and the tensors of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.records import Example
from limbeck.seeds import derive_seed

PADDING = 0.02
"""Share of padding up to which batches are mixed; past it, they are sorted more strictly."""
_JITTERS = (0.2, 0.1, 0.05, 0.02)
"""How far apart lengths may be, relative to each other, and still change places."""


def batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the examples of each batch, for one epoch. A pure function of its arguments.

    Every example is in exactly one batch. No batch has more than `batch_size`, and their sizes differ by at
    most one: a last batch of a single example would move the student as far as a full one. Examples of like
    length go together; how alike is settled by trying, from loose to strict, until at most `PADDING` is
    padded, so that examples meet others in other epochs wherever that costs nothing. The order of the batches
    is random.
    """
    if batch_size < 1 or any(n < 1 for n in lengths):
        raise ValueError(
            f"batch_size and all lengths must be at least 1, not {batch_size} and {min(lengths, default=1)}"
        )
    if not lengths:
        return []
    random = np.random.default_rng(derive_seed(seed, "batches", epoch))
    noise_N = random.uniform(-1, 1, len(lengths))
    tie_N = random.permutation(len(lengths))
    tries = (_grouped(np.asarray(lengths), batch_size, jitter * noise_N, tie_N) for jitter in _JITTERS)
    strictest = _grouped(np.asarray(lengths), batch_size, 0 * noise_N, tie_N)
    grouped = next((g for g in tries if padding_share(lengths, g) <= PADDING), strictest)
    return [grouped[i] for i in random.permutation(len(grouped))]


def _grouped(
    lengths_N: NDArray[np.int64], batch_size: int, jitter_N: NDArray[np.float64], tie_N: NDArray[np.int64]
) -> list[list[int]]:
    """Neighbours by jittered length, in the fewest batches there can be, of near-equal size."""
    order_N = np.lexsort((tie_N, np.log(lengths_N) + jitter_N))
    count = -(-len(lengths_N) // batch_size)
    return [part.tolist() for part in np.array_split(order_N, count)]


def padding_share(lengths: Sequence[int], grouped: Sequence[Sequence[int]]) -> float:
    """Share of the positions of these batches that hold no token, if each is as wide as its longest
    example.
    """
    positions = sum(len(b) * max(lengths[i] for i in b) for b in grouped if b)
    tokens = sum(lengths[i] for b in grouped for i in b)
    return 1 - tokens / positions if positions else 0.0


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, padded on the right. B examples, T tokens the longest, N supervised tokens.

    With `hidden_BTD` of a model that was given `tokens_BT`, row n of `hidden_BTD[predict_BT]` is the state
    that predicts `targets_N[n]`: the position before the target's own. The rows run through the examples in
    order, so a signal taken for `example_ids` lines up with them.
    """

    tokens_BT: Tensor
    """int64."""
    attention_BT: Tensor
    """int64: 1 where there is a token, 0 where there is padding. What a padding token's id is does not
    matter."""
    predict_BT: Tensor
    """bool: True where the next token is supervised."""
    targets_N: Tensor
    """int64: the supervised tokens."""
    example_ids: tuple[str, ...]

    @property
    def supervised(self) -> int:
        """N."""
        return len(self.targets_N)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.tokens_BT.to(device),
            self.attention_BT.to(device),
            self.predict_BT.to(device),
            self.targets_N.to(device),
            self.example_ids,
        )


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """The tensors of a batch. Raises `ValueError` for an example whose first token is supervised: nothing
    predicts it.
    """
    width = max((len(e.tokens_T) for e in examples), default=0)
    tokens_BT = np.full((len(examples), width), pad_id, dtype=np.int64)
    attention_BT = np.zeros((len(examples), width), dtype=np.int64)
    mask_BT = np.zeros((len(examples), width), dtype=np.bool_)
    for b, example in enumerate(examples):
        size = len(example.tokens_T)
        tokens_BT[b, :size] = example.tokens_T
        attention_BT[b, :size] = 1
        mask_BT[b, :size] = example.mask_T
    if mask_BT[:, :1].any():
        first = [e.id for e in examples if e.mask_T[:1].any()]
        raise ValueError(f"the first token of an example cannot be supervised, nothing predicts it: {', '.join(first)}")
    predict_BT = np.zeros_like(mask_BT)
    predict_BT[:, :-1] = mask_BT[:, 1:]
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(attention_BT),
        torch.from_numpy(predict_BT),
        torch.from_numpy(tokens_BT[mask_BT]),
        tuple(e.id for e in examples),
    )
