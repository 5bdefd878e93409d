"""From logits and one uniform per row to one token per row, mostly without sorting the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from limbeck.errors import InputError, ModelError, Problem

_BLOCK = 256  # vocabulary entries summed into one edge of the coarse cumulative sum
_GROUP = 16  # vocabulary entries behind one maximum in the search for the most likely tokens
_WIDTHS = (64, 1024)  # how many of the most likely tokens are looked at before a row is sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the model's distribution.

    In this order: logits are divided by `temperature` (0 takes the most likely token, the first of equals);
    `top_k` keeps the k most likely tokens (0 keeps all); `top_p` keeps, of those, the smallest set of the
    most likely that has at least this share of their probability (1 keeps all). Tokens exactly as likely as
    the last one kept are kept too, so the set depends on nothing but the distribution. At most `max_tokens`
    tokens are drawn for a row.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        warm = 0 <= self.temperature < math.inf
        laws = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, warm, "0 (greedy) or a positive number"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
        )
        problems = [Problem(f"Sampling.{key}", repr(value), law) for key, value, holds, law in laws if not holds]
        if problems:
            raise InputError("the sampling settings do not fit", problems)


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first `count` uniforms in [0, 1) of a seed's stream: float64 [count], 53 random bits each.

    The stream is Philox-4x64-10 with the seed (0 to 2**128 - 1) as key and the counter running from 1 (Salmon
    et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so anyone can draw it again. A longer draw
    begins with the shorter one.
    """
    raw = np.random.Philox(key=seed).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def next_tokens(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """The token ids [B] that float64 uniforms in [0, 1) select.

    `sampling` shapes each row's distribution; the token is the inverse of its cumulative distribution (tokens
    in the order of their ids) at the uniform. A token that is not kept, or has probability 0, is never
    selected.

    Raises `ModelError` where a row's logits are no distribution: NaN, +inf, or -inf throughout.
    """
    if sampling.temperature == 0:
        best = logits_BV.max(-1)
        _require_finite(best.values)
        return best.indices
    scaled_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if sampling.temperature != 1:
        scaled_BV = scaled_BV / sampling.temperature
    probs_BV = scaled_BV.softmax(-1)
    _require_finite(probs_BV[:, 0])
    top_k = sampling.top_k if sampling.top_k < probs_BV.shape[1] else 0
    if sampling.top_p == 1 and top_k == 0:
        return _invert(probs_BV, uniforms_B)
    return _invert_kept(probs_BV, uniforms_B, sampling.top_p, top_k)


def _require_finite(values_B: Tensor) -> None:
    finite_B = torch.isfinite(values_B)
    if not bool(finite_B.all()):
        rows = (~finite_B).nonzero()[:, 0].tolist()
        problem = Problem(f"rows {rows} of the batch", "NaN or infinite logits", "finite ones", "use float32 weights")
        raise ModelError("the model's logits are no distribution", [problem])


def _select(edges_NK: Tensor, uniforms_N: Tensor) -> Tensor:
    """The first entry of each row whose edge (cumulative weight, float64) exceeds a share of the total.

    The uniform is the share. Rounding can make it 1, and no edge exceeds the total: it is held just below.
    """
    total_N1 = edges_NK[:, -1:]
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    target_N1 = torch.minimum(uniforms_N[:, None] * total_N1, below_N1)
    return torch.searchsorted(edges_NK, target_N1, right=True)[:, 0]


def _invert(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The inverse in two levels: over blocks of the vocabulary, then within one block."""
    short = -probs_BV.shape[1] % _BLOCK
    blocks_BNK = (pad(probs_BV, (0, short)) if short else probs_BV).unflatten(1, (-1, _BLOCK))
    edges_BN = blocks_BNK.sum(-1).double().cumsum(-1)
    block_B = _select(edges_BN, uniforms_B)
    row_B = torch.arange(len(probs_BV), device=probs_BV.device)
    before_B = torch.where(block_B > 0, edges_BN[row_B, block_B - 1], 0.0)
    mass_B = edges_BN[row_B, block_B] - before_B
    within_B = (uniforms_B * edges_BN[:, -1] - before_B) / mass_B
    return block_B * _BLOCK + _select(blocks_BNK[row_B, block_B].double().cumsum(-1), within_B)


def _invert_kept(probs_BV: Tensor, uniforms_B: Tensor, top_p: float, top_k: int) -> Tensor:
    """The inverse over the kept tokens; a row whose kept tokens are not among the few most likely is looked
    at again, with more of them.
    """
    vocabulary = probs_BV.shape[1]
    tokens_B = torch.empty(len(probs_BV), dtype=torch.long, device=probs_BV.device)
    open_N = torch.arange(len(probs_BV), device=probs_BV.device)
    for width in (*(width for width in _WIDTHS if width < vocabulary), vocabulary):
        top = _largest(probs_BV if len(open_N) == len(probs_BV) else probs_BV[open_N], width)
        least_N, certain_N = _least_kept(top.values, top_p, top_k, whole=width == vocabulary)
        ids_NK, order_NK = top.indices[certain_N].sort(-1)
        weights_NK = top.values[certain_N].gather(1, order_NK)
        weights_NK = torch.where(weights_NK >= least_N[certain_N, None], weights_NK, 0.0)
        rows_N = open_N[certain_N]
        place_N = _select(weights_NK.double().cumsum(-1), uniforms_B[rows_N])
        tokens_B[rows_N] = ids_NK.gather(1, place_N[:, None])[:, 0]
        open_N = open_N[~certain_N]
        if len(open_N) == 0:
            break
    return tokens_B


class _Top(NamedTuple):
    values: Tensor  # [N, K], falling
    indices: Tensor  # [N, K]


def _largest(probs_NV: Tensor, count: int) -> _Top:
    """The `count` largest of each row.

    The `count` groups with the largest maxima hold them, or others equal to them, so only those are searched.
    """
    vocabulary = probs_NV.shape[1]
    if count == vocabulary:
        return _Top(*probs_NV.sort(-1, descending=True))
    if vocabulary % _GROUP or count * _GROUP > vocabulary:
        return _Top(*probs_NV.topk(count))
    grouped_NMG = probs_NV.unflatten(1, (_GROUP, -1))
    groups_NK = grouped_NMG.amax(1).topk(count, sorted=False).indices
    found = grouped_NMG.gather(2, groups_NK[:, None].expand(-1, _GROUP, -1)).flatten(1).topk(count)
    member_NK = found.indices // count
    ids_NK = member_NK * grouped_NMG.shape[2] + groups_NK.gather(1, found.indices % count)
    return _Top(found.values, ids_NK)


def _least_kept(falling_NK: Tensor, top_p: float, top_k: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    """The least probability [N] that is kept, and for which rows [N] it is certain.

    Where `falling_NK` is not the whole vocabulary, a row is certain if it reaches below the least probability
    kept: then it holds every token that is kept, equals of the last one included.
    """
    certain_N = torch.ones_like(falling_NK[:, 0], dtype=torch.bool)
    least_N1 = torch.zeros_like(falling_NK[:, :1])
    if top_k:
        least_N1 = falling_NK[:, min(top_k, falling_NK.shape[1]) - 1, None]
        certain_N = falling_NK[:, -1] < least_N1[:, 0]
    if top_p < 1:
        mass_NK = torch.where(falling_NK >= least_N1, falling_NK, 0.0).double().cumsum(-1)
        total_N1 = mass_NK[:, -1:] if top_k or whole else torch.ones_like(mass_NK[:, -1:])
        place_N1 = torch.searchsorted(mass_NK, top_p * total_N1).clamp(max=falling_NK.shape[1] - 1)
        least_N1 = falling_NK.gather(1, place_N1)
        certain_N = certain_N & (falling_NK[:, -1] < least_N1[:, 0])
    return least_N1[:, 0], certain_N | whole
