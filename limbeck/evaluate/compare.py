"""What a subject's next-token distributions have in common with the teacher's, position by position.

Examples are read one at a time: there is no padding that could touch a figure, and a figure depends on
nothing but its own example. Logits are made for supervised positions only, a chunk of them at a time.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.records import Example
from limbeck.signal.head import head_logits, hidden_states
from limbeck.train.losses import cross_entropy, forward_kl

_CHUNK_BYTES = 32 * 2**20
"""Size of one float32 [chunk, vocabulary] array; about five of them are held at a time."""

_NOT_MEASURED = float("nan")


class Sums(NamedTuple):
    """Figures summed over the supervised positions of one example. Without a teacher, `agree` and `kl` are
    NaN.
    """

    agree: float
    """Positions at which both models find the same token most likely."""
    kl: float
    """Nats, KL(teacher || subject) over the whole vocabulary."""
    nll: float
    """Nats, -log of the probability the subject gives to the token that is there."""
    positions: int
    seconds: float
    """How long the subject took to read the example, its head left out."""
    tokens: int
    """Tokens read, prompt and answer."""


def agreement(teacher_NV: Tensor, subject_NV: Tensor) -> Tensor:
    """1 where both rows of logits have their largest entry in the same place, 0 where not, [N].

    Of equal largest entries the first counts, for both. NaN where a row holds NaN: that is no opinion.
    """
    same_N = (teacher_NV.argmax(-1) == subject_NV.argmax(-1)).double()
    return same_N.masked_fill((teacher_NV.isnan() | subject_NV.isnan()).any(-1), torch.nan)


@torch.inference_mode()
def sum_over_example(
    teacher: PreTrainedModel | None,
    subject: PreTrainedModel,
    example: Example,
    *,
    vocabulary: int | None = None,
) -> Sums:
    """Compare two models at the supervised positions of one example: token t is predicted from the state at
    t - 1.

    A teacher that is its own subject is compared with itself, logit by logit. `vocabulary` cuts the logits
    of both to their first so many entries, for heads that are padded to different widths (see
    `shared_width`).
    """
    at_N, targets_N = supervised(example)
    subject_ND, seconds = _states(subject, example, at_N)
    other = None if teacher is subject else teacher
    other_ND = subject_ND if other is None else _states(other, example, at_N)[0]
    agree, kl, nll = 0.0, 0.0, 0.0
    for rows in torch.arange(len(at_N)).split(_chunk(subject)):
        subject_NV = head_logits(subject, subject_ND[rows])[:, :vocabulary]
        teacher_NV = subject_NV if other is None else head_logits(other, other_ND[rows])[:, :vocabulary]
        nll += _sum(cross_entropy(subject_NV, targets_N[rows].to(subject_NV.device)))
        agree += _sum(agreement(teacher_NV, subject_NV))
        kl += _sum(forward_kl(subject_NV, teacher_NV))
    if teacher is None:
        agree = kl = _NOT_MEASURED
    return Sums(agree, kl, nll, len(at_N), seconds, len(example.tokens_T))


def supervised(example: Example) -> tuple[Tensor, Tensor]:
    """Positions that predict a supervised token, and those tokens, both [N]."""
    at_N = np.flatnonzero(example.mask_T[1:])
    return torch.from_numpy(at_N), torch.from_numpy(example.tokens_T[at_N + 1].astype(np.int64))


@torch.inference_mode()
def warm_up(model: PreTrainedModel, example: Example) -> None:
    """Read an example once, so that weights are in memory before anything is timed."""
    _states(model, example, supervised(example)[0])


def shared_width(one: PreTrainedModel, other: PreTrainedModel, tokens: int) -> int:
    """How many logits to compare: those of the tokenizer's tokens, as in training.

    Heads are padded to round numbers, and entries past the tokenizer's are no tokens: two models with one
    tokenizer agree on what its entries mean and on nothing past them. Training leaves them out of both
    softmaxes, so a divergence that counted them would be in another unit than the loss, however equal the widths.
    """
    return min(tokens, _width(one), _width(other))


def _states(model: PreTrainedModel, example: Example, at_N: Tensor) -> tuple[Tensor, float]:
    """The last hidden states at these positions, [N, D], and the seconds it took to read the example."""
    tokens_1T = torch.from_numpy(example.tokens_T.astype(np.int64))[None].to(model.device)
    started = time.perf_counter()
    hidden_TD = hidden_states(model, tokens_1T)[0]
    hidden_TD[-1, -1].item()  # waits for a device that works on its own
    return hidden_TD[at_N.to(model.device)], time.perf_counter() - started


def _sum(values_N: Tensor) -> float:
    return float(values_N.sum(dtype=torch.float64))


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _chunk(model: PreTrainedModel) -> int:
    return max(1, _CHUNK_BYTES // (4 * _width(model)))
