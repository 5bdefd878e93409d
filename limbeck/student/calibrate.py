"""What pruning is measured on: some of the teacher's own answers, and what the teacher says of each of their tokens.

How far a model strays is the forward KL divergence KL(teacher || model) in nats a token, over the positions
that predict the answers' tokens. It is estimated from a threshold sample of the teacher's distribution, as
the model's cross-entropy less the teacher's own on the same sample: unbiased, exactly 0 for the teacher,
and every candidate is measured with the same sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.records import Example
from limbeck.render.batches import Batch, collate
from limbeck.seeds import derive_seed
from limbeck.signal.head import CHUNK, head_logits, hidden_states
from limbeck.signal.sampling import from_logits
from limbeck.signal.types import SampledSignal

TOKENS = 384
"""Supervised tokens that layers, heads and neurons are measured on."""
_LONGEST = 96
"""Tokens of a calibration example; the rest is cut off, so that more answers take part."""
_TAU = 0.02
_BATCH = 16
_ROWS = 16
"""Positions whose logits are widened to float32 at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Calibration:
    """Batches, and what the teacher says about their supervised positions."""

    batches: list[Batch]
    signals: list[SampledSignal]
    own: float
    """The teacher's own cross-entropy with its sample, nats over all positions."""

    @property
    def positions(self) -> int:
        """Supervised positions of all batches. Padding and prompts are not among them."""
        return sum(b.supervised for b in self.batches)


def calibrate(
    model: PreTrainedModel, examples: Sequence[Example], *, seed: int = 0, tokens: int = TOKENS
) -> Calibration:
    """Draw about `tokens` supervised tokens of the examples, and let the teacher `model` say what it thinks of
    them. The same arguments give the same calibration.

    Raises:
        ModelError: no example has an answer.

    """
    ranked = sorted(_sample(examples, seed, tokens), key=lambda e: len(e.tokens_T))
    batches = [collate(ranked[i : i + _BATCH], 0).to(model.device) for i in range(0, len(ranked), _BATCH)]
    stream = torch.Generator().manual_seed(derive_seed(seed, "student", "signal"))
    signals, own = [], 0.0
    with torch.inference_mode():
        for batch in batches:
            logits_NV = head_logits(model, predicting(model, batch))
            signals.append(from_logits(logits_NV, _TAU, generator=stream))
            own += _nats(logits_NV, signals[-1])
    return Calibration(batches, signals, own)


def predicting(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states [N, D] at the positions that predict supervised tokens."""
    return hidden_states(model, batch.tokens_BT)[batch.predict_BT]


def stray(
    model: PreTrainedModel,
    calibration: Calibration,
    how: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> float:
    """KL(teacher || model), nats a token, with the model changed as `how` says for each batch."""
    total = -calibration.own
    with torch.inference_mode():
        for number, (batch, signal) in enumerate(zip(calibration.batches, calibration.signals, strict=True)):
            with how(number):
                hidden_ND = predicting(model, batch)
            first = 0
            for piece_CD in hidden_ND.split(CHUNK):
                total += _nats(head_logits(model, piece_CD), signal.slice(first, first + len(piece_CD)))
                first += len(piece_CD)
    return total / calibration.positions


def _sample(examples: Sequence[Example], seed: int, tokens: int) -> list[Example]:
    """Examples in random order, cut to `_LONGEST`, until they have so many supervised tokens."""
    chosen: list[Example] = []
    stream = torch.Generator().manual_seed(derive_seed(seed, "student", "calibration"))
    for i in torch.randperm(len(examples), generator=stream).tolist():
        if tokens <= 0:
            break
        e = examples[i]
        short = Example(e.id, e.tokens_T[:_LONGEST], e.mask_T[:_LONGEST], e.prompt_id, e.completion, e.teacher, e.split)
        if short.supervised:
            chosen.append(short)
            tokens -= short.supervised
    if not chosen:
        found = f"{len(examples)} examples, none with an answer in its first {_LONGEST} tokens"
        remedy = "collect more; layers alone can also be spaced evenly, by student.choose: even"
        problem = Problem("student", found, "at least one", remedy)
        raise ModelError("there is nothing to measure the student on", [problem])
    return chosen


def _nats(logits_NV: Tensor, signal: SampledSignal) -> float:
    """Cross-entropy of the sampled distribution with the logits', summed over the positions."""
    rows_E, ids_E, weights_E, _ = signal.entries()
    lse_N = torch.cat([rows.float().logsumexp(dim=1) for rows in logits_NV.split(_ROWS)])
    surprise_E = lse_N[rows_E] - logits_NV[rows_E, ids_E].float()
    return float((weights_E * surprise_E).double().sum())
