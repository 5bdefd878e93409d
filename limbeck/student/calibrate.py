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

import numpy as np
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
_ANSWER = 64
"""Supervised tokens of one example, its first; the rest is cut off, so that more answers take part."""
_LONGEST = 1024
"""Tokens of one example, to the last that is measured. Shorter examples are drawn first; a longer one loses the
beginning of its prompt, for every layer's output of every token is held."""
_READ = 32
"""Tokens read for each supervised token asked for, at most: short answers to long prompts would cost without end."""
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
    """Examples in random order, cut by `_cut`, until they have so many supervised tokens or were read enough."""
    stream = torch.Generator().manual_seed(derive_seed(seed, "student", "calibration"))
    drawn = [examples[i] for i in torch.randperm(len(examples), generator=stream).tolist()]
    drawn = sorted((e for e in drawn if e.supervised), key=lambda e: _end(e) > _LONGEST)
    chosen, supervised, read = [], 0, 0
    for cut in map(_cut, drawn):
        read += len(cut.tokens_T)
        if supervised >= tokens or (chosen and read > _READ * tokens):
            break
        chosen.append(cut)
        supervised += cut.supervised
    if not chosen:
        found = f"{len(examples)} examples, none with an answer"
        remedy = "collect more; layers alone can also be spaced evenly, by student.choose: even"
        problem = Problem("student", found, "at least one", remedy)
        raise ModelError("there is nothing to measure the student on", [problem])
    return chosen


def _end(e: Example) -> int:
    """Where the last token that is measured ends."""
    return int(np.flatnonzero(e.mask_T)[:_ANSWER][-1]) + 1


def _cut(e: Example) -> Example:
    """The example to the last token that is measured; `_LONGEST` tokens, the last, where it is longer."""
    own = slice(max(0, _end(e) - _LONGEST), _end(e))
    mask_T = e.mask_T[own].copy()
    mask_T[0] = False  # nothing predicts it
    return Example(e.id, e.tokens_T[own], mask_T, e.prompt_id, e.completion, e.teacher, e.split)


def _nats(logits_NV: Tensor, signal: SampledSignal) -> float:
    """Cross-entropy of the sampled distribution with the logits', summed over the positions."""
    rows_E, ids_E, weights_E, _ = signal.entries()
    lse_N = torch.cat([rows.float().logsumexp(dim=1) for rows in logits_NV.split(_ROWS)])
    surprise_E = lse_N[rows_E] - logits_NV[rows_E, ids_E].float()
    return float((weights_E * surprise_E).double().sum())
