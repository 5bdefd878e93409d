"""From a teacher's distribution to a small signal: threshold sampling, and top-k with its tail.

Threshold sampling (Duffield, Lund and Thorup, "Learn more, sample less", IEEE Trans. Information Theory 51,
2005) keeps token i with probability min(1, p_i / tau) and gives it the weight max(p_i, tau). The weights
are unbiased, and no other scheme with as many expected entries has a smaller sum of variances, sum_i p_i
(tau - p_i) over p_i < tau.

The tail is drawn systematically: the tail tokens, in order of id, are laid end to end on a line, each p_i /
tau long; one uniform offset a position sets a comb of unit spacing on that line, and the tokens it touches
are drawn. Each token is touched with probability p_i / tau exactly, none twice, and their number is the
floor or the ceiling of tail mass / tau, so that the stored mass is within tau of 1. What the order does
affect are joint draws: two tail tokens of neighbouring ids are seldom drawn together. Expectations of sums
of weights, and so of every loss that is linear in the teacher's probabilities, do not depend on that; their
variances do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import InputError, Problem
from limbeck.signal.types import SampledLayout, SampledSignal, TopKSignal

_GROUP = 64
"""Neighbouring ids summed together first; only groups that hold an entry are looked into."""
_MASS_TOLERANCE = 1e-4
_BLOCK_CPU = 1 << 20
"""Numbers worked on at once, so that every pass but the first finds them in the cache."""
_BLOCK_GPU = 1 << 26


def threshold_sample(probs: Tensor, tau: float, *, generator: torch.Generator) -> SampledSignal:
    """A threshold sample of each row of `probs` [N, V], float32 or float64; deterministic given `generator`.

    Law: the expectation of `.to_dense()` is `probs`, to the rounding of float32. `tau` in (0, 1] is the
    probability from which a token is stored exactly, and the weight of every other; the smaller, the more
    entries.

    Raises `InputError` for rows that are not distributions (each named with its sum), a type narrower than
    float32, or a `tau` outside (0, 1] or so small that the counts of a position would not fit.
    """
    if probs.dim() != 2 or probs.dtype not in (torch.float32, torch.float64):
        found, remedy = f"{probs.dtype} of shape {list(probs.shape)}", "a narrower softmax does not sum to 1"
        problem = Problem("probs", found, "float32 or float64 of shape [N, V]", remedy)
        raise InputError("cannot sample from these probabilities", [problem])
    SampledLayout.of(tau, probs.shape[1])
    probs = probs.detach()
    offsets_N = _offsets(len(probs), generator, probs.device)

    def blocks() -> Iterator[_Block]:
        for rows_RV in probs.split(_block_rows(probs)):
            # The logarithm of 0 is made finite, so that 0 log 0 is 0.
            entropy_R = -_dot(rows_RV, rows_RV.log().clamp_min_(-1e4))
            yield _Block(rows_RV, entropy_R, rows_RV.amin(dim=1))

    return _sample(blocks(), offsets_N, tau, probs.shape[1], temperature=1.0)


def from_logits(
    logits: Tensor,
    tau: float,
    temperature: float = 1.0,
    *,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> SampledSignal:
    """A threshold sample of softmax(logits / temperature), `logits` [N, V] of any floating type.

    `vocab_size` cuts a padded head to the ids that the student shares. The softmax is taken in float32, or
    float64 for float64 logits, a few rows at a time: probabilities of all positions are never held at once.

    Raises what `threshold_sample` raises; a row whose largest logit is not finite has no distribution.
    """
    logits = _shared(logits, vocab_size)
    _check_temperature(temperature)
    SampledLayout.of(tau, logits.shape[1])
    offsets_N = _offsets(len(logits), generator, logits.device)

    def blocks() -> Iterator[_Block]:
        for rows_RV in logits.split(_block_rows(logits)):
            wide_RV = _wide(rows_RV)
            below_RV = wide_RV - wide_RV.amax(dim=1, keepdim=True)
            if temperature != 1:
                below_RV /= temperature
            probs_RV = torch.softmax(below_RV, dim=1)
            entropy_R = -probs_RV.amax(dim=1).log() - _dot(probs_RV, below_RV.clamp_min_(-1e30))
            yield _Block(probs_RV, entropy_R, torch.zeros_like(entropy_R))

    return _sample(blocks(), offsets_N, tau, logits.shape[1], temperature)


def topk_signal(logits: Tensor, k: int, temperature: float = 1.0, *, vocab_size: int | None = None) -> TopKSignal:
    """The `k` most likely tokens of softmax(logits / temperature) and the mass of the rest; `logits` [N, V].

    Raises `InputError` for `k` outside 1 to V, or a temperature that is not positive.
    """
    logits = _shared(logits, vocab_size)
    _check_temperature(temperature)
    if not 1 <= k <= logits.shape[1]:
        raise InputError("cannot take so many", [Problem("k", str(k), f"1 to {logits.shape[1]}, the vocabulary")])
    log_NV = torch.log_softmax(_wide(logits) / temperature, dim=1)
    log_NK, ids_NK = log_NV.topk(k, dim=1)
    # Summing the rest keeps a small tail accurate, which 1 minus the sum of the top would not.
    tail_N = log_NV.scatter_(1, ids_NK, -torch.inf).exp_().sum(dim=1)
    return TopKSignal(ids_NK, log_NK.float(), tail_N.float(), logits.shape[1], temperature)


class _Block(NamedTuple):
    """Distributions of a few rows, their entropy in nats, and the smallest number of each row."""

    probs_RV: Tensor
    entropy_R: Tensor
    least_R: Tensor


class _Draw(NamedTuple):
    """What a block of rows yields: heads and tails by row and id, in order, and what its rows are checked
    by.
    """

    head_rows: Tensor
    head_ids: Tensor
    head_probs: Tensor
    tail_rows: Tensor
    tail_ids: Tensor
    entropy_R: Tensor
    mass_R: Tensor
    least_R: Tensor


def _sample(
    blocks: Iterator[_Block], offsets_N: Tensor, tau: float, vocab_size: int, temperature: float
) -> SampledSignal:
    draws, n = [], 0
    for block in blocks:
        rows = len(block.probs_RV)
        draws.append(_draw(block, tau, offsets_N[n : n + rows], first_row=n))
        n += rows
    if not draws:
        empty, none = offsets_N.new_zeros(0, dtype=torch.int32), offsets_N.new_zeros(0, dtype=torch.float32)
        return SampledSignal(empty, empty, empty, none, none, tau, vocab_size, temperature)
    whole = _Draw(*(torch.cat(column) for column in zip(*draws, strict=True)))
    _check_rows(whole.mass_R, whole.least_R)
    n_head_N = torch.bincount(whole.head_rows, minlength=n)
    n_tail_N = torch.bincount(whole.tail_rows, minlength=n)
    # Head j comes after j heads and the tails of the rows before its own; tail j likewise.
    tails_before_N, heads_up_to_N = n_tail_N.cumsum(0) - n_tail_N, n_head_N.cumsum(0)
    ids_E = torch.empty(len(whole.head_ids) + len(whole.tail_ids), dtype=torch.int32, device=offsets_N.device)
    ids_E[_count(whole.head_rows) + tails_before_N[whole.head_rows]] = whole.head_ids.int()
    ids_E[_count(whole.tail_rows) + heads_up_to_N[whole.tail_rows]] = whole.tail_ids.int()
    return SampledSignal(
        n_head_N.int(),
        n_tail_N.int(),
        ids_E,
        whole.head_probs.float(),
        whole.entropy_R.float(),
        tau,
        vocab_size,
        temperature,
    )


def _draw(block: _Block, tau: float, offsets_R: Tensor, *, first_row: int) -> _Draw:
    groups_RGB = _groups(block.probs_RV)
    sums_RG = groups_RGB.sum(dim=2)
    mass_R = sums_RG.double().sum(dim=1)

    row_M, group_M = (groups_RGB.amax(dim=2) >= tau).nonzero(as_tuple=True)
    values_MB = groups_RGB[row_M, group_M]
    is_head_MB = values_MB >= tau
    sums_RG[row_M, group_M] = values_MB.masked_fill(is_head_MB, 0).sum(dim=1)
    m, b = is_head_MB.nonzero(as_tuple=True)
    head_rows, head_ids, head_probs = row_M[m] + first_row, group_M[m] * _GROUP + b, values_MB[m, b]

    ends_RG = (sums_RG.double() / tau).cumsum_(dim=1).add_(offsets_R[:, None])
    begins_RG = torch.cat([offsets_R[:, None], ends_RG[:, :-1]], dim=1)
    row_M, group_M = (ends_RG.floor() > begins_RG.floor()).nonzero(as_tuple=True)
    values_MB = groups_RGB[row_M, group_M].double()
    values_MB.masked_fill_(values_MB >= tau, 0)
    drawn_MB = _touched(values_MB, begins_RG[row_M, group_M], ends_RG[row_M, group_M])
    m, b = drawn_MB.nonzero(as_tuple=True)
    return _Draw(
        head_rows,
        head_ids,
        head_probs,
        row_M[m] + first_row,
        group_M[m] * _GROUP + b,
        block.entropy_R,
        mass_R,
        block.least_R,
    )


def _touched(values_MB: Tensor, begins_M: Tensor, ends_M: Tensor) -> Tensor:
    """Which tokens of a group a tooth of the comb falls on; the group reaches from `begins_M` to `ends_M`
    on the line.

    The group's length was summed in the precision of the probabilities. Stretching its tokens to exactly
    that length keeps the number of teeth in it, which a second summation might miss by one.
    """
    sums_MB = values_MB.cumsum(dim=1)
    whole_M1 = sums_MB[:, -1:]
    line_MB = begins_M[:, None] + sums_MB * ((ends_M - begins_M)[:, None] / whole_M1)
    teeth_MB = torch.where(sums_MB == whole_M1, ends_M[:, None], line_MB).floor_()
    return torch.cat([teeth_MB[:, :1] > begins_M[:, None].floor(), teeth_MB[:, 1:] > teeth_MB[:, :-1]], dim=1)


def _groups(probs_RV: Tensor) -> Tensor:
    """[R, G, B], a view where the vocabulary is a multiple of the group."""
    rest = -probs_RV.shape[1] % _GROUP
    if rest:
        probs_RV = torch.nn.functional.pad(probs_RV, (0, rest))
    return probs_RV.unflatten(1, (-1, _GROUP))


def _count(sorted_M: Tensor) -> Tensor:
    return torch.arange(len(sorted_M), device=sorted_M.device)


def _offsets(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device).to(device)


def _block_rows(matrix_NV: Tensor) -> int:
    return max(1, (_BLOCK_GPU if matrix_NV.is_cuda else _BLOCK_CPU) // max(1, matrix_NV.shape[1]))


def _dot(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_RV, b_RV, dim=1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _shared(logits: Tensor, vocab_size: int | None) -> Tensor:
    if logits.dim() != 2 or not logits.is_floating_point() or (vocab_size or 0) > logits.shape[1]:
        raise InputError(
            "cannot make a signal of these logits",
            [
                Problem(
                    "logits",
                    f"{logits.dtype} of shape {list(logits.shape)}",
                    f"floating-point numbers of shape [N, V], V at least {vocab_size or 1}",
                ),
            ],
        )
    return logits[:, :vocab_size].detach()


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise InputError("cannot soften by this", [Problem("temperature", str(temperature), "a positive number")])


def _check_rows(mass_N: Tensor, least_N: Tensor) -> None:
    bad = ~((mass_N - 1).abs() <= _MASS_TOLERANCE) | (least_N < 0)
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        problems = [
            Problem(
                f"probs[{row}]",
                f"sum {mass_N[row]:.6g}, least {least_N[row]:.6g}",
                f"sum 1 within {_MASS_TOLERANCE}, nothing negative",
            )
            for row in rows[:10]
        ]
        raise InputError(f"{len(rows)} of {len(bad)} rows are not probability distributions", problems)
