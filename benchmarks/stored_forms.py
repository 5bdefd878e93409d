"""Forms in which a teacher's distribution can be stored, limbeck's own and the published ones of others.

All are written here from their descriptions, so that one program compares them:

- threshold sampling: `limbeck.signal`, through its encoding;
- random-sampling KD (Anshumann et al., arXiv 2503.16870): draws with replacement from q, proportional to p ** power;
  a token drawn c times of R weighs (c / R)(p / q). With power 1 that is c / R, and an entry is a 17-bit id and a 7-bit
  count, 3 bytes; with another power the weight is no multiple of 1 / R, and is taken to be a 16-bit number;
- DistillKit (github.com/arcee-ai/DistillKit, the two configurations its README names): the k largest
  log-probabilities in descending order; the first of them in bfloat16, the rest as the least-squares fit of a few terms
  in the rank, coefficients in float32; ids in ceil(log2 V) bits. Its losses by default take what is missing as zero and
  renormalise the rest. The fit is computed here in float64, theirs in float32;
- the k most likely tokens, renormalised, as most trainers keep them: 16-bit ids and 16-bit probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.signal.encoding import SampledArrays, decode_sampled, encode_sampled
from limbeck.signal.sampling import threshold_sample


class Entries(NamedTuple):
    """What a form gives back, position after position: how many ids, the ids, their weights. No id twice in one."""

    counts_N: Tensor
    ids_E: Tensor
    weights_E: Tensor

    def positions(self) -> Tensor:
        """The position of each entry, [E]."""
        return torch.repeat_interleave(self.counts_N.long())


class Drawn(NamedTuple):
    """One draw: its entries, and its bytes as the format's arithmetic has them, or arrays for a store that tells."""

    entries: Entries
    nbytes: float
    arrays: SampledArrays | None = None


class Form(NamedTuple):
    """A way of storing."""

    name: str
    draw: Callable[[Tensor, torch.Generator], Drawn]
    random: bool


def threshold(tau: float) -> Form:
    """Threshold sampling, encoded and decoded again."""

    def draw(probs_NV: Tensor, generator: torch.Generator) -> Drawn:
        arrays = encode_sampled(threshold_sample(probs_NV, tau, generator=generator), generator)
        back = decode_sampled(arrays, tau=tau, vocab_size=probs_NV.shape[1])
        _, ids_E, weights_E, _ = back.entries()
        return Drawn(Entries(back.n_head_N + back.n_tail_N, ids_E.int(), weights_E), 0.0, arrays)

    return Form(f"threshold, tau {tau:g}", draw, True)


def random_sampling(draws: int, power: float = 1.0, note: str = "") -> Form:
    """Random-sampling KD with `draws` draws."""
    entry_bytes = 3 if power == 1 else (17 + 16) / 8

    def draw(probs_NV: Tensor, generator: torch.Generator) -> Drawn:
        q_NV = probs_NV if power == 1 else probs_NV.double().pow(power).float()
        q_NV = q_NV / q_NV.sum(dim=1, keepdim=True)
        ids_NR = torch.multinomial(q_NV, draws, replacement=True, generator=generator)
        counts_NV = torch.zeros_like(probs_NV).scatter_add_(1, ids_NR, torch.ones(ids_NR.shape))
        rows_E, ids_E = counts_NV.nonzero(as_tuple=True)
        weights_E = counts_NV[rows_E, ids_E] / draws
        if power != 1:
            weights_E *= probs_NV[rows_E, ids_E] / q_NV[rows_E, ids_E]
        counts_N = torch.bincount(rows_E, minlength=len(probs_NV))
        return Drawn(Entries(counts_N, ids_E.int(), weights_E), entry_bytes * len(ids_E))

    proposal = "" if power == 1 else f" from p^{power:g}"
    return Form(f"random sampling, {draws} draws{proposal}{note}", draw, True)


def draws_for(unique: float, chunks: Sequence[Tensor]) -> int:
    """How many draws from p give `unique` different ids a position: the expectation is sum_i 1 - (1 - p_i) ** R."""

    def expected(draws: int) -> float:
        found = [-torch.expm1(draws * torch.log1p(-p.clamp_max(1 - 1e-7))).sum(dtype=torch.float64) for p in chunks]
        return float(sum(found)) / sum(len(p) for p in chunks)

    low, high = 1, 2
    while expected(high) < unique:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if expected(middle) < unique else (low, middle)
    return high


def distillkit(k: int, exact: int, powers: Sequence[float], vocab_size: int) -> Form:
    """A configuration of DistillKit: `powers` of the rank, 0.5 for its square root."""
    ranks_T = torch.arange(k - exact, dtype=torch.float64)
    terms_TP = torch.stack([ranks_T**power for power in powers], dim=1)
    fit_PT = torch.linalg.pinv(terms_TP)
    nbytes = math.ceil(k * math.ceil(math.log2(vocab_size)) / 8) + 2 * exact + 4 * len(powers)

    def draw(probs_NV: Tensor, generator: torch.Generator) -> Drawn:
        log_NK, ids_NK = probs_NV.log().topk(k, dim=1)
        coefficients_NP = (log_NK[:, exact:].double() @ fit_PT.T).float()
        fitted_NT = coefficients_NP.double() @ terms_TP.T
        stored_NK = torch.cat([log_NK[:, :exact].bfloat16().double(), fitted_NT], dim=1)
        return Drawn(_rows(ids_NK, stored_NK.softmax(dim=1).float()), nbytes * len(probs_NV))

    return Form(f"DistillKit, k {k}, {exact} exact, {len(powers)} terms", draw, False)


def top_k(k: int) -> Form:
    """The k most likely tokens, renormalised."""

    def draw(probs_NV: Tensor, generator: torch.Generator) -> Drawn:
        top = probs_NV.topk(k, dim=1)
        return Drawn(_rows(top.indices, top.values / top.values.sum(dim=1, keepdim=True)), 4.0 * k * len(probs_NV))

    return Form(f"top {k}, renormalised", draw, False)


def _rows(ids_NK: Tensor, weights_NK: Tensor) -> Entries:
    n, k = ids_NK.shape
    return Entries(torch.full((n,), k), ids_NK.reshape(-1).int(), weights_NK.reshape(-1))
