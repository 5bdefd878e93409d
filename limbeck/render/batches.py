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
PASS_PADDING = 0.03
"""Share of padding up to which the sequences of a step go through the model at once. Another pass takes as long as 100
tokens or so by itself: each weight's gradient is computed, widened and added once more."""
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


def tiles(lengths: Sequence[int], *, most: float = PASS_PADDING) -> list[list[int]]:
    """Sequences, by their numbers, in the fewest forward passes that pad at most a share `most` of the positions.

    A gradient is a sum over sequences, so how they share passes does not change it. Sequences of like length go
    together; for each number of passes, the cut that pads least is found by dynamic programming.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    sorted_N = [lengths[i] for i in order]
    count, tokens = len(order), sum(sorted_N)
    # best[k][j]: positions of the first j sequences in k + 1 passes, and where the last of these begins.
    best = [[(j * sorted_N[j - 1] if j else 0, 0) for j in range(count + 1)]]
    while best[-1][count][0] * (1 - most) > tokens:
        before = best[-1]
        best.append(
            [
                min((before[i][0] + (j - i) * sorted_N[j - 1], i) for i in range(j)) if j else (0, 0)
                for j in range(count + 1)
            ]
        )
    cuts, end = [], count
    for row in reversed(best):
        begin = row[end][1]
        if end > begin:
            cuts.append(order[begin:end])
        end = begin
    return cuts[::-1]


def width_of(lengths: Sequence[int], *, most: float = PASS_PADDING) -> int:
    """How wide the pass of these sequences is made: a multiple of 8, 4 or 2 where that pads at most a share `most`.

    On a CPU each shape of matrix product is prepared once, which takes 7 ms and 0.7 MB, about twenty times a shape of
    pass; of 4,000 sequences of 20 to 2,000 tokens, an epoch has 218 shapes so, and 348 without.
    """
    longest, tokens = max(lengths), sum(lengths)
    wider = (-(-longest // step) * step for step in (8, 4, 2))
    return next((width for width in wider if width * len(lengths) * (1 - most) <= tokens), longest)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, padded on the right, or packed end to end in one row. B rows, T tokens the longest, N
    supervised tokens.

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
    positions_BT: Tensor | None = None
    """int64: of each token in its own example, where examples are packed; a model that is given them keeps the examples
    apart. None where each row is one example."""

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
            None if self.positions_BT is None else self.positions_BT.to(device),
        )


def collate(examples: Sequence[Example], pad_id: int, *, width: int = 0) -> Batch:
    """The tensors of a batch, as wide as the longest example, or `width` if that is more. Raises `ValueError` for an
    example whose first token is supervised: nothing predicts it.
    """
    width = max([width, *(len(e.tokens_T) for e in examples)])
    tokens_BT = np.full((len(examples), width), pad_id, dtype=np.int64)
    attention_BT = np.zeros((len(examples), width), dtype=np.int64)
    mask_BT = np.zeros((len(examples), width), dtype=np.bool_)
    for b, example in enumerate(examples):
        size = len(example.tokens_T)
        tokens_BT[b, :size] = example.tokens_T
        attention_BT[b, :size] = 1
        mask_BT[b, :size] = example.mask_T
    _refuse_first_supervised(examples)
    predict_BT = np.zeros_like(mask_BT)
    predict_BT[:, :-1] = mask_BT[:, 1:]
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(attention_BT),
        torch.from_numpy(predict_BT),
        torch.from_numpy(tokens_BT[mask_BT]),
        tuple(e.id for e in examples),
    )


def collate_packed(examples: Sequence[Example]) -> Batch:
    """The tensors of a batch in one row, without padding. Raises `ValueError` as `collate` does."""
    _refuse_first_supervised(examples)
    tokens_T = np.concatenate([e.tokens_T for e in examples]).astype(np.int64)
    mask_T = np.concatenate([e.mask_T for e in examples])
    positions_T = np.concatenate([np.arange(len(e.tokens_T)) for e in examples])
    # No example begins with a supervised token, so none is predicted from the end of the one before.
    predict_T = np.append(mask_T[1:], False)
    return Batch(
        torch.from_numpy(tokens_T)[None],
        torch.ones(1, len(tokens_T), dtype=torch.int64),
        torch.from_numpy(predict_T)[None],
        torch.from_numpy(tokens_T[mask_T]),
        tuple(e.id for e in examples),
        torch.from_numpy(positions_T)[None],
    )


def _refuse_first_supervised(examples: Sequence[Example]) -> None:
    if first := [e.id for e in examples if e.mask_T[:1].any()]:
        raise ValueError(f"the first token of an example cannot be supervised, nothing predicts it: {', '.join(first)}")
