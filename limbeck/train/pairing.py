"""A loss against a signal: which of a loss's terms takes which signal, and the plain form of each pair.

The plain form starts from all of the student's logits. It is written for reading, and is what the fused
form is tested against; a trainer takes `fused.fused_loss`, which never holds those logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import InputError, Problem, RecipeError
from limbeck.signal.types import HiddenSignal, SampledSignal, Signal, TextSignal, TopKSignal
from limbeck.train.losses import (
    LOSSES,
    Loss,
    LossSpec,
    check_pairing,
    check_temperature,
    expectation,
    log_probs,
    terms_of,
    wide,
)


class Term(NamedTuple):
    """A loss, the signal it is computed against, and the temperature, all checked to fit each other."""

    loss: Loss
    signal: Signal
    temperature: float


def pair(
    loss: LossSpec, signal: Signal | Sequence[Signal], *, temperature: float = 1.0, allow_biased: bool = False
) -> tuple[Term, ...]:
    """Each term of `loss` with the signal it takes.

    Raises `RecipeError` for a pairing that `check_pairing` refuses, a term whose signal was not given, and
    probabilities that were taken at another temperature than the loss's; `InputError` for signals over
    different vocabularies or of different lengths.
    """
    signals = list(signal) if isinstance(signal, Sequence) else [signal]
    check_pairing(loss, signals[0].kind, allow_biased=allow_biased)
    sizes = [f"{len(s)} positions over {s.vocab_size} ids" for s in signals]
    if len(set(sizes)) > 1:
        wrong = [Problem(f"signal {s.kind}", size, sizes[0]) for s, size in zip(signals, sizes, strict=True)]
        raise InputError("signals that do not belong together", wrong[1:])
    paired, problems = [], []
    for term in terms_of(loss):
        own = temperature if term.temperature is None else term.temperature
        check_temperature(own)
        match = next((s for s in signals if term.on in (None, s.kind)), None)
        if match is None:
            kinds = ", ".join(s.kind for s in signals)
            problems.append(Problem(f"loss {term.name}", f"signals {kinds}", f"one of kind {term.on}"))
        elif isinstance(match, SampledSignal | TopKSignal) and match.temperature != own:
            where, taken = f"loss {term.name} with signal {match.kind}", match.temperature
            found_ = f"temperature {own} against probabilities taken at {taken}"
            remedy = f"annotate again at temperature {own}, or train at {taken}"
            problems.append(Problem(where, found_, "one temperature", remedy))
        else:
            paired.append(Term(term, match, own))
    if problems:
        raise RecipeError("this loss cannot be computed from this signal", problems)
    return tuple(paired)


def signal_loss(
    student_logits: Tensor,
    signal: Signal | Sequence[Signal],
    *,
    loss: LossSpec,
    temperature: float = 1.0,
    allow_biased: bool = False,
) -> Tensor:
    """The loss at each position, [N], from all of the student's logits [N, V]; `fused_loss` in its plain
    form.

    Logits wider than the signal's vocabulary are cut to it. A sampled signal gives cross-entropy minus the
    stored entropy: its expectation is the KL divergence, while a single one may be negative.

    Raises what `pair` raises, and `InputError` for logits that do not fit the signal.
    """
    total = 0.0
    for term in pair(loss, signal, temperature=temperature, allow_biased=allow_biased):
        n, vocab, shape = len(term.signal), term.signal.vocab_size, student_logits.shape
        if len(shape) != 2 or shape[0] != n or shape[1] < vocab:
            problem = Problem("student_logits", f"shape {list(shape)}", f"[{n}, {vocab} or more]")
            raise InputError("logits that do not fit the signal", [problem])
        total = total + term.loss.weight * _one_loss(student_logits[:, :vocab], term)
    assert isinstance(total, Tensor)
    return total


def _one_loss(student_NV: Tensor, term: Term) -> Tensor:
    signal, temperature = term.signal, term.temperature
    if isinstance(signal, TextSignal | SampledSignal):
        rows_E, ids_E, weights_E, _ = signal.entries()
        log_q_NV = torch.log_softmax(wide(student_NV) / temperature, dim=1)
        ce_N = log_q_NV.new_zeros(len(signal)).index_add(0, rows_E, -weights_E.to(log_q_NV) * log_q_NV[rows_E, ids_E])
        if isinstance(signal, SampledSignal) and term.loss.name == "forward_kl":
            return ce_N - signal.entropy_N
        return ce_N
    if isinstance(signal, TopKSignal):
        # The tail's probability as a log-sum-exp: 1 minus the listed ones would lose a small tail.
        soft_NV = wide(student_NV) / temperature
        tail_N1 = soft_NV.scatter(1, signal.ids_NK, -torch.inf).logsumexp(dim=1, keepdim=True)
        student_NV = torch.cat([soft_NV.gather(1, signal.ids_NK), tail_N1], dim=1)
        teacher_NV = torch.cat([signal.log_probs_NK, signal.tail_mass_N.log()[:, None]], dim=1)
        temperature = 1.0
    else:
        teacher_NV = teacher_logits(signal) if isinstance(signal, HiddenSignal) else signal.logits_NV
    declared = LOSSES[term.loss.name]
    if declared.function is None:
        log_q_NV, log_p_NV = log_probs(student_NV, teacher_NV, temperature)
        return -expectation(log_p_NV.exp(), log_q_NV)
    parameters = {declared.parameter: term.loss.value} if declared.parameter else {}
    return declared.function(student_NV, teacher_NV, temperature=temperature, **parameters)


def teacher_logits(signal: HiddenSignal) -> Tensor:
    """The teacher's logits over the shared vocabulary, [N, V]."""
    vocab = signal.vocab_size
    bias_V = None if signal.head_bias_V is None else signal.head_bias_V[:vocab]
    return head_logits(signal.hidden_ND, signal.head_weight_VD[:vocab], bias_V, signal.logit_scale, signal.softcap)


def head_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Logits [N, V]: softcap * tanh(y / softcap) of y = scale * (hidden @ weight.T + bias), or y without a
    cap.
    """
    y_NV = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V) * scale
    return y_NV if softcap is None else softcap * torch.tanh(y_NV / softcap)
