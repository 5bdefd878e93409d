"""Stored signals against the teacher they are said to come from: a fresh forward pass over a random sample.

The store's digests show that its files are what the annotate stage wrote. An audit shows that what it wrote
is what the teacher says: on this machine, with these weights, for these tokens, at these positions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models
from limbeck.errors import InputError, Problem
from limbeck.recipe import LocalTeacher, Recipe
from limbeck.records import Example
from limbeck.render.batches import collate
from limbeck.render.examples import ExampleSet
from limbeck.seeds import derive_seed
from limbeck.signal.annotate import signal_key
from limbeck.signal.encoding import SampledArrays, decode_sampled
from limbeck.signal.head import CHUNK, head_logits, hidden_states
from limbeck.signal.store import SignalStore
from limbeck.signal.stored import StoredSignal
from limbeck.signal.types import SampledLayout, SampledSignal, TextSignal, TopKSignal

_NOISE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""How far two runs of the same teacher may differ in a token's log-odds, in nats: batches of another shape
are rounded differently. docs/signals.md has what was measured."""
_DEVIATIONS = 6.0
"""Standard errors that the tail as a whole may be off: one chance in 500 million."""


_NOTHING = math.log(1e-6)
"""Log-probabilities below this are rounding."""


class Audit(NamedTuple):
    """What an audit found."""

    examples: int
    positions: int
    head_difference: float
    """Mean difference between a stored probability and the fresh one: of heads, or of the likeliest and the tail."""
    entropy_difference: float
    """Mean difference between a stored entropy and the fresh one, nats; NaN for a top-k signal, which stores none."""
    tail_rank: float
    """Mean share of the fresh tail's mass below a stored tail token; 0.5 when the tail was drawn from it,
    near 0 for tokens that have nothing to do with it. NaN where there are no tail tokens."""
    problems: tuple[Problem, ...]
    """Every difference that rounding does not explain."""

    @property
    def ok(self) -> bool:
        """Whether there is none."""
        return not self.problems


class _Found(NamedTuple):
    """What one example gave: differences of its heads, differences of its entropies, ranks of its tail."""

    heads_H: Tensor
    entropy_N: Tensor
    ranks_E: Tensor
    problems: list[Problem]


def audit(
    directory: str | os.PathLike[str],
    recipe: Recipe,
    examples: ExampleSet,
    *,
    share: float = 0.02,
    seed: int = 0,
) -> Audit:
    """Compare the signals of a random `share` of the training examples, at least one, with a fresh forward
    pass.

    Raises:
        StaleError: the store is damaged or was made from something else.
        InputError: nothing is stored that a teacher on this machine could be asked about.

    """
    store = SignalStore.open(directory, expect=signal_key(recipe, examples), examples=examples.train)
    _refuse_unaudited(store)
    stream = torch.Generator().manual_seed(derive_seed(seed, "audit"))
    count = min(len(examples.train), max(1, round(share * len(examples.train))))
    chosen = [examples.train[i] for i in torch.randperm(len(examples.train), generator=stream)[:count].tolist()]
    found: list[_Found] = []
    for teacher in (t for t in recipe.teachers if isinstance(t, LocalTeacher)):
        for example in (e for e in chosen if e.teacher == teacher.name):
            signal = store.take([example.id])
            assert not isinstance(signal, TextSignal)
            found.append(
                compare(models.load_model(teacher.model, teacher.precision, models.processor().device), example, signal)
            )
    return _summary(found, os.fspath(directory))


def _refuse_unaudited(store: SignalStore) -> None:
    """What another forward pass could say nothing about."""
    reasons = {
        "text": ("a text signal, which is the answers' own tokens", "signals that hold distributions"),
        "hidden": ("signals of kind hidden, of which nothing is stored", "signals that are stored"),
    }
    reason = reasons.get(store.manifest.kind)
    if store.manifest.key.source:
        reason = ("signals that endpoints said while they answered", "signals of a teacher on this machine")
    if server := store.manifest.key.server:
        reason = (f"signals that {server.model} at {server.base_url} said", "signals of a teacher on this machine")
    if reason:
        found, expected = reason
        problem = Problem(str(store.root), found, expected, "leave the audit out: verify checks the files' digests")
        raise InputError("these signals cannot be audited", [problem])


def _summary(found: list[_Found], where: str) -> Audit:
    heads_H, entropy_N, ranks_E = (torch.cat([f[i] for f in found]) for i in range(3))  # pyright: ignore
    problems = [p for f in found for p in f.problems]
    rank = float(ranks_E.mean())
    # A rank is uniform from 0 to 1; the comb draws the tail more evenly than that, so this errs on the safe
    # side.
    allowed = _DEVIATIONS * math.sqrt(1 / 12 / max(1, len(ranks_E)))
    if len(ranks_E) and abs(rank - 0.5) > allowed:
        expected = f"0.5 within {allowed:.3f}"
        problems.append(Problem(f"{where}: mean rank of {len(ranks_E)} tail tokens", f"{rank:.3f}", expected))
    return Audit(
        len(found),
        len(entropy_N),
        float(heads_H.mean()) if len(heads_H) else 0.0,
        float(entropy_N.mean()) if len(entropy_N) else 0.0,
        rank,
        tuple(problems),
    )


@torch.inference_mode()
def compare(model: PreTrainedModel, example: Example, signal: StoredSignal) -> _Found:
    """The stored signal of one example against the teacher's own word on it."""
    batch = collate([example], 0).to(model.device)
    hidden_ND = hidden_states(model, batch.tokens_BT)[batch.predict_BT]
    noise = _NOISE[model.dtype]
    parts, first = [], 0
    for piece_CD in hidden_ND.split(CHUNK):
        logits_CV = head_logits(model, piece_CD)[:, : signal.vocab_size].float().cpu() / signal.temperature
        part = signal.slice(first, first + len(piece_CD))

        def where(row: int, first: int = first) -> str:
            return f"example {example.id}, supervised position {first + row}"

        log_CV = logits_CV.log_softmax(dim=1)
        if isinstance(part, TopKSignal):
            parts.append(_compare_top_k(log_CV, part, noise, where))
        else:
            parts.append(_compare(log_CV, part, _levels(part), noise, where))
        first += len(piece_CD)
    columns = [torch.cat([p[i] for p in parts]) for i in range(3)]  # pyright: ignore
    return _Found(columns[0], columns[1], columns[2], [problem for p in parts for problem in p.problems])


def _compare(
    log_NV: Tensor, signal: SampledSignal, levels_L: Tensor, noise: float, where: Callable[[int], str]
) -> _Found:
    probs_NV = log_NV.exp()
    entropy_N = -(probs_NV * log_NV.clamp_min(-1e4)).sum(dim=1)
    rows_E, ids_E, weights_E, starts = signal.entries()
    within_E = torch.arange(len(rows_E)) - torch.tensor(starts)[rows_E]
    is_head_E = within_E < signal.n_head_N[rows_E]
    fresh_E, odds_NV = probs_NV[rows_E, ids_E], _log_odds(log_NV)
    limit = math.log(signal.tau) - math.log1p(-signal.tau) + noise if signal.tau < 1 else math.inf
    level_H = torch.searchsorted(levels_L, weights_E[is_head_E])
    low_H = levels_L[(level_H - 1).clamp_min(0)].logit() - noise
    high_H = levels_L[(level_H + 1).clamp_max(len(levels_L) - 1)].logit() + noise
    odds_E = odds_NV[rows_E, ids_E]
    wrong_E = torch.zeros_like(is_head_E)
    wrong_E[is_head_E] = (odds_E[is_head_E] < low_H) | (odds_E[is_head_E] > high_H)
    wrong_E |= ~is_head_E & (odds_E > limit)
    missing_NV = odds_NV > limit
    missing_NV[rows_E, ids_E] = False
    gap_N = (signal.entropy_N - entropy_N).abs()
    problems = [
        Problem(f"{where(int(rows_E[e]))}: token {int(ids_E[e])}", f"{weights_E[e]:.4f}", f"{fresh_E[e]:.4f}")
        for e in wrong_E.nonzero()[:, 0].tolist()
    ]
    problems += [
        Problem(f"{where(n)}: token {v}", "not in the head", f"{probs_NV[n, v]:.4f}, with tau {signal.tau}")
        for n, v in missing_NV.nonzero().tolist()
    ]
    problems += [
        Problem(f"{where(n)}: entropy", f"{signal.entropy_N[n]:.4f} nats", f"{entropy_N[n]:.4f} nats")
        for n in (gap_N > noise * (1 + entropy_N)).nonzero()[:, 0].tolist()
    ]
    ranks_E = _ranks(probs_NV, signal.tau, rows_E[~is_head_E], ids_E[~is_head_E])
    return _Found((weights_E - fresh_E)[is_head_E].abs(), gap_N, ranks_E, problems)


def _compare_top_k(log_NV: Tensor, signal: TopKSignal, noise: float, where: Callable[[int], str]) -> _Found:
    """The likeliest tokens one by one, the tail as one outcome, and that no likelier token was left out."""
    fresh_NK = log_NV.gather(1, signal.ids_NK)
    rest_NV = log_NV.scatter(1, signal.ids_NK, -torch.inf)
    rest_N1 = rest_NV.logsumexp(dim=1, keepdim=True)
    ours_NO = torch.cat([signal.log_probs_NK, signal.tail_mass_N.log()[:, None]], dim=1)
    theirs_NO = torch.cat([fresh_NK, rest_N1], dim=1)
    wrong_NO = (_log_odds(ours_NO) - _log_odds(theirs_NO)).abs() > noise
    wrong_NO &= torch.maximum(ours_NO, theirs_NO) > _NOTHING
    problems = [
        Problem(
            f"{where(n)}: {f'token {int(signal.ids_NK[n, o])}' if o < signal.ids_NK.shape[1] else 'the tail'}",
            f"{ours_NO[n, o].exp():.6g}",
            f"{theirs_NO[n, o].exp():.6g}",
        )
        for n, o in wrong_NO.nonzero().tolist()
    ]
    least_N1 = signal.log_probs_NK.amin(dim=1, keepdim=True)
    problems += [
        Problem(f"{where(n)}: token {v}", "not stored", f"{rest_NV[n, v].exp():.6g}, above the least stored")
        for n, v in ((rest_NV > least_N1 + noise) & (rest_NV > _NOTHING)).nonzero().tolist()
    ]
    none = torch.zeros(0, dtype=torch.float64)
    # The entropies are not stored; their places count the positions.
    unknown_N = torch.full((len(signal),), torch.nan)
    return _Found((ours_NO.exp() - theirs_NO.exp()).abs().reshape(-1), unknown_N, none, problems)


def _log_odds(log_NV: Tensor) -> Tensor:
    return log_NV - torch.log1p(-log_NV.exp().clamp_max(1 - 1e-7))


def _ranks(probs_NV: Tensor, tau: float, rows_E: Tensor, ids_E: Tensor) -> Tensor:
    """The share of its position's tail mass that lies in less likely tokens, and half of its own."""
    ranks = []
    for row in rows_E.unique().tolist():
        tail_V = probs_NV[row].double().masked_fill(probs_NV[row] >= tau, 0)
        sorted_V, order_V = tail_V.sort()
        below_V = torch.empty_like(tail_V).scatter_(0, order_V, sorted_V.cumsum(0) - sorted_V / 2)
        ranks.append((below_V / tail_V.sum())[ids_E[rows_E == row]])
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.float64)


def _levels(signal: SampledSignal) -> Tensor:
    """The head probabilities that the encoding knows, ascending: what it decodes the codes 0 to 255 to."""
    layout = SampledLayout.of(signal.tau, signal.vocab_size)
    one, none = np.ones(256, f"<u{layout.count_bytes}"), np.zeros(256, f"<u{layout.count_bytes}")
    ids = np.zeros(256, "<u2") if layout.id_bytes == 2 else np.zeros((256, layout.id_bytes), np.uint8)
    codes = SampledArrays(one, none, ids, np.arange(256, dtype=np.uint8), np.zeros(256, "<u2"))
    return decode_sampled(codes, tau=signal.tau, vocab_size=signal.vocab_size).head_probs_H
