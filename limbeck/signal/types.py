"""What a teacher says about each supervised position: five kinds of `Signal`.

    TextSignal      the token that stands in the teacher's answer                   one id a position
    SampledSignal   a threshold sample of the teacher's distribution                unbiased, small
    TopKSignal      the k most likely tokens, and all the rest as one tail bucket   coarse, therefore biased
    HiddenSignal    the teacher's last hidden states and its head                   exact, for a live teacher
    DenseSignal     logits over the whole vocabulary                                exact, large

Laws. A signal covers N positions, in order. `vocab_size` is the range of token ids that teacher and student
share: both distributions are over exactly these ids, and a head that is padded wider is cut to them before
its softmax. `index_select`, `slice`, `concat` and `to` move positions and change nothing else.
`temperature`, where a signal holds probabilities, is the one they were taken at; logits are kept raw, and
the loss softens them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from limbeck.errors import InputError, Problem

SignalKind = Literal["text", "sampled", "top_k", "hidden", "dense"]


class SparseRows(NamedTuple):
    """Entries of N positions, flattened in order of position."""

    rows_E: Tensor
    ids_E: Tensor
    weights_E: Tensor
    starts: list[int]
    """Number of the first entry of each position, and at the end the number of entries."""


@dataclass(frozen=True)
class _Positions:
    """What all signals share: `_per_position` names the tensors whose first axis is the position."""

    _per_position: ClassVar[tuple[str, ...]]

    def index_select(self, positions_M: Tensor) -> Self:
        """The signal at these positions, in this order; `positions_M` holds indices."""
        return replace(self, **{name: getattr(self, name)[positions_M] for name in self._per_position})

    def slice(self, start: int, stop: int) -> Self:
        """The signal from position `start` up to `stop`."""
        return replace(self, **{name: getattr(self, name)[start:stop] for name in self._per_position})

    def to(self, device: torch.device | str) -> Self:
        """The signal with all its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class TextSignal(_Positions):
    """The teacher's text: `ids_N`, one token id a position."""

    kind: ClassVar[SignalKind] = "text"
    _per_position = ("ids_N",)

    ids_N: Tensor
    vocab_size: int

    def __post_init__(self) -> None:
        _require(
            "not a text signal",
            [
                *_shape("TextSignal.ids_N", self.ids_N, -1),
                *_ids("TextSignal.ids_N", self.ids_N, self.vocab_size),
            ],
        )

    def __len__(self) -> int:
        return len(self.ids_N)

    def entries(self) -> SparseRows:
        """One entry a position, of weight 1."""
        rows_N = torch.arange(len(self), device=self.ids_N.device)
        return SparseRows(
            rows_N, self.ids_N.long(), torch.ones_like(rows_N, dtype=torch.float32), [*range(len(self) + 1)]
        )


@dataclass(frozen=True)
class SampledSignal(_Positions):
    """A threshold sample of the teacher's distribution at each position, in ragged rows.

    `ids_E` holds, position after position, first the head (every token of at least probability `tau`), then
    the ids drawn from the tail, each group in ascending order; `n_head_N` and `n_tail_N` count them. A head
    token weighs its probability, `head_probs_H` float32 in the same order. A tail token weighs `tau`, so no
    number is kept for it. `entropy_N` float32 is the entropy in nats of the distribution that was sampled,
    so that cross-entropy minus entropy is an unbiased KL divergence.

    `sampling.threshold_sample` makes it; `encoding` says in what numbers it is stored, `packing` how they lie on disk.
    """

    kind: ClassVar[SignalKind] = "sampled"
    _per_position = ("n_head_N", "n_tail_N", "ids_E", "head_probs_H", "entropy_N")

    n_head_N: Tensor
    n_tail_N: Tensor
    ids_E: Tensor
    head_probs_H: Tensor
    entropy_N: Tensor
    tau: float
    vocab_size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        n, heads, tails = len(self), int(self.n_head_N.sum()), int(self.n_tail_N.sum())
        _require(
            "not a sampled signal",
            [
                *_shape("SampledSignal.n_tail_N", self.n_tail_N, n),
                *_shape("SampledSignal.entropy_N", self.entropy_N, n),
                *_shape("SampledSignal.head_probs_H", self.head_probs_H, heads),
                *_shape("SampledSignal.ids_E", self.ids_E, heads + tails),
                *_ids("SampledSignal.ids_E", self.ids_E, self.vocab_size),
            ],
        )

    def __len__(self) -> int:
        return len(self.n_head_N)

    @property
    def entries_per_position(self) -> float:
        """Mean number of entries; 0.0 where there are no positions."""
        return len(self.ids_E) / max(1, len(self))

    @property
    def nbytes_per_position(self) -> float:
        """Mean bytes a position in the shards of a store: counts, entropy, ids and head codes, as `packing` packs
        them. Packed each time it is asked for.
        """
        from limbeck.signal.packing import packed_bytes  # it packs these signals, and so imports this module

        return packed_bytes(self) / len(self) if len(self) else 0.0

    def entries(self) -> SparseRows:
        """Every entry with its weight: the probability of a head token, tau for a tail token."""
        counts_N = (self.n_head_N + self.n_tail_N).long()
        ends_N = counts_N.cumsum(0)
        rows_E = torch.repeat_interleave(counts_N)
        within_E = torch.arange(len(rows_E), device=rows_E.device) - (ends_N - counts_N)[rows_E]
        weights_E = torch.full_like(rows_E, self.tau, dtype=torch.float32)
        weights_E[within_E < self.n_head_N[rows_E]] = self.head_probs_H
        return SparseRows(rows_E, self.ids_E.long(), weights_E, [0, *ends_N.tolist()])

    def to_dense(self) -> Tensor:
        """The weights over the whole vocabulary, [N, V] float32. Their expectation is the teacher's
        distribution.
        """
        rows_E, ids_E, weights_E, _ = self.entries()
        dense_NV = weights_E.new_zeros(len(self), self.vocab_size)
        dense_NV[rows_E, ids_E] = weights_E
        return dense_NV

    def index_select(self, positions_M: Tensor) -> Self:
        """The signal at these positions, in this order; `positions_M` holds indices."""
        n_head_M, n_tail_M = self.n_head_N[positions_M], self.n_tail_N[positions_M]
        head_starts_N = _starts(self.n_head_N)
        starts_N = head_starts_N + _starts(self.n_tail_N)
        return replace(
            self,
            n_head_N=n_head_M,
            n_tail_N=n_tail_M,
            ids_E=self.ids_E[_ranges(starts_N[positions_M], n_head_M + n_tail_M)],
            head_probs_H=self.head_probs_H[_ranges(head_starts_N[positions_M], n_head_M)],
            entropy_N=self.entropy_N[positions_M],
        )

    def slice(self, start: int, stop: int) -> Self:
        """The signal from position `start` up to `stop`, as views."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        heads = [int(self.n_head_N[:n].sum()) for n in (start, stop)]
        tails = [int(self.n_tail_N[:n].sum()) for n in (start, stop)]
        return replace(
            self,
            n_head_N=self.n_head_N[start:stop],
            n_tail_N=self.n_tail_N[start:stop],
            ids_E=self.ids_E[heads[0] + tails[0] : heads[1] + tails[1]],
            head_probs_H=self.head_probs_H[heads[0] : heads[1]],
            entropy_N=self.entropy_N[start:stop],
        )


@dataclass(frozen=True)
class TopKSignal(_Positions):
    """The k most likely tokens: `ids_NK`, their `log_probs_NK` in nats, and `tail_mass_N`, the probability
    of the rest.

    The tail is one bucket: a loss compares k + 1 outcomes. That is never more than the divergence over the
    whole vocabulary (the data-processing inequality), and it is blind to how the student spreads its tail.
    """

    kind: ClassVar[SignalKind] = "top_k"
    _per_position = ("ids_NK", "log_probs_NK", "tail_mass_N")

    ids_NK: Tensor
    log_probs_NK: Tensor
    tail_mass_N: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        problems = _shape("TopKSignal.ids_NK", self.ids_NK, -1, -1)
        if not problems:
            n, k = self.ids_NK.shape
            problems += _shape("TopKSignal.log_probs_NK", self.log_probs_NK, n, k)
            problems += _shape("TopKSignal.tail_mass_N", self.tail_mass_N, n)
            problems += _ids("TopKSignal.ids_NK", self.ids_NK, self.vocab_size)
            twice_N = (self.ids_NK.sort(dim=1).values.diff(dim=1) == 0).any(dim=1)
            problems += [
                Problem(
                    f"TopKSignal.ids_NK[{row}]",
                    "an id listed twice",
                    f"{k} different ids",
                    "add up equal ids first",
                )
                for row in twice_N.nonzero()[:3, 0].tolist()
            ]
        _require("not a top-k signal", problems)

    def __len__(self) -> int:
        return len(self.ids_NK)


@dataclass(frozen=True)
class HiddenSignal(_Positions):
    """The teacher's last hidden states `hidden_ND`, after its final norm, and its head: exact, and small.

    With y = logit_scale * (hidden @ head.T + bias), the logits are y, or softcap * tanh(y / softcap) where
    there is a softcap; only ids below `vocab_size` count. They are computed where they are needed, a chunk
    at a time.
    """

    kind: ClassVar[SignalKind] = "hidden"
    _per_position = ("hidden_ND",)

    hidden_ND: Tensor
    head_weight_VD: Tensor
    vocab_size: int
    head_bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        problems = _shape("HiddenSignal.head_weight_VD", self.head_weight_VD, -1, -1)
        if not problems:
            rows, width = self.head_weight_VD.shape
            problems += _shape("HiddenSignal.hidden_ND", self.hidden_ND, -1, width)
            if self.head_bias_V is not None:
                problems += _shape("HiddenSignal.head_bias_V", self.head_bias_V, rows)
            if not 0 < self.vocab_size <= rows:
                expected = f"1 to {rows}, the rows of the head"
                problems.append(Problem("HiddenSignal.vocab_size", str(self.vocab_size), expected))
        _require("not a hidden signal", problems)

    def __len__(self) -> int:
        return len(self.hidden_ND)


@dataclass(frozen=True)
class DenseSignal(_Positions):
    """The teacher's raw logits over the shared vocabulary, `logits_NV`."""

    kind: ClassVar[SignalKind] = "dense"
    _per_position = ("logits_NV",)

    logits_NV: Tensor

    def __post_init__(self) -> None:
        _require("not a dense signal", _shape("DenseSignal.logits_NV", self.logits_NV, -1, -1))

    def __len__(self) -> int:
        return len(self.logits_NV)

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.logits_NV.shape[1]


Signal = TextSignal | SampledSignal | TopKSignal | HiddenSignal | DenseSignal
_S = TypeVar("_S", bound=_Positions)


def concat(signals: Sequence[_S]) -> _S:
    """One signal over the positions of all, in order.

    Raises `InputError` for an empty list, and for signals that differ in anything but their positions:
    kind, tau, vocabulary, temperature, head.
    """
    if not signals:
        problem = Problem("signals", "an empty list", "at least one signal")
        raise InputError("nothing to concatenate", [problem])
    first = signals[0]
    problems = []
    for n, other in enumerate(signals):
        if type(other) is not type(first):
            problems.append(Problem(f"signals[{n}]", type(other).__name__, type(first).__name__))
            continue
        for name in (f.name for f in fields(first) if f.name not in first._per_position):
            ours, theirs = getattr(first, name), getattr(other, name)
            tensors = isinstance(ours, Tensor) or isinstance(theirs, Tensor)
            if ours is not theirs and (tensors or ours != theirs):
                shown = ["another tensor" if isinstance(v, Tensor) else repr(v) for v in (theirs, ours)]
                problems.append(Problem(f"signals[{n}].{name}", shown[0], f"{shown[1]}, as in signals[0]"))
    _require("signals that do not belong together", problems)
    joined = {name: torch.cat([getattr(s, name) for s in signals]) for name in first._per_position}
    return replace(first, **joined)


class SampledLayout(NamedTuple):
    """Bytes of each number of an encoded `SampledSignal`, before it is packed; `encoding` gives their meaning."""

    count_bytes: int
    id_bytes: int
    head_bytes: int = 1
    entropy_bytes: int = 2

    @classmethod
    def of(cls, tau: float, vocab_size: int) -> SampledLayout:
        """The layout, settled by `tau` and the vocabulary alone, so that every shard of a store has the same.

        A position has at most 1/tau heads and 1/tau + 1 tail draws, and never more than V of either.

        Raises `InputError` for a `tau` outside (0, 1] or so small that a count would not fit 16 bits, and
        for ids of more than 24 bits.
        """
        problems = []
        most = min(vocab_size, int(1 / tau) + 2) if 0 < tau <= 1 else 0
        if most == 0:
            problems.append(Problem("tau", str(tau), "a number above 0, at most 1"))
        elif most > 0xFFFF:
            found = f"{tau}, which gives a position up to {most} tail entries"
            problems.append(Problem("tau", found, "a tau that gives at most 65,535", "use 1.6e-5 or more"))
        if not 0 < vocab_size <= 1 << 24:
            problems.append(Problem("vocab_size", str(vocab_size), "1 to 16,777,216"))
        _require("not settings of a sampled signal", problems)
        return cls(count_bytes=1 if most <= 0xFF else 2, id_bytes=2 if vocab_size <= 1 << 16 else 3)


def _starts(counts_N: Tensor) -> Tensor:
    counts_N = counts_N.long()
    return counts_N.cumsum(0) - counts_N


def _ranges(starts_M: Tensor, lengths_M: Tensor) -> Tensor:
    """The concatenation of start, start + 1, ... start + length - 1 over all pairs."""
    rows_E = torch.repeat_interleave(lengths_M.long())
    return torch.arange(len(rows_E), device=rows_E.device) + (starts_M - _starts(lengths_M))[rows_E]


def _require(summary: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise InputError(summary, problems)


def _shape(where: str, tensor: Tensor, *sizes: int) -> list[Problem]:
    """A problem unless `tensor` has these sizes; -1 is any size."""
    if tensor.dim() == len(sizes) and all(want in (-1, size) for size, want in zip(tensor.shape, sizes, strict=True)):
        return []
    expected = ", ".join("any" if size < 0 else str(size) for size in sizes)
    return [Problem(where, f"shape [{', '.join(map(str, tensor.shape))}]", f"shape [{expected}]")]


def _ids(where: str, ids: Tensor, vocab_size: int) -> list[Problem]:
    """A problem unless all ids lie in the vocabulary; the label -100 is none."""
    if ids.numel() == 0:
        return []
    low, high = (int(end) for end in torch.aminmax(ids))
    if low >= 0 and high < vocab_size:
        return []
    remedy = "give supervised positions only, in ids of the tokenizer that vocab_size belongs to"
    return [Problem(where, f"ids from {low} to {high}", f"ids from 0 to {vocab_size - 1}", remedy)]
