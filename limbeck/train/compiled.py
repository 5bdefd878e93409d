"""The passes over a chunk's logits as one or two kernels on a GPU, written by `torch.compile` (inductor, Triton).

Eager kernels write every intermediate, [C, V] in float32, to memory and read it back: about forty bytes a logit.
Compiled, the logits are read in the type of the products, everything up to the gradient happens in registers in
float32 (float64 for float64), and the gradient is written over them: six bytes a logit in bfloat16 against entries,
ten against a teacher's logits. The formulas are those of `kernels`; the tests hold the two to each other.

Used where `models.compiling` says so and the loss is one term; a weighted sum of several goes through `kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.models import compiling
from limbeck.models.compiling import any_rows, compiled
from limbeck.signal.types import DenseSignal, HiddenSignal, SampledSignal, TextSignal, TopKSignal
from limbeck.train import kernels
from limbeck.train.losses import Loss
from limbeck.train.pairing import Term

Passes = Callable[[Tensor, slice, Tensor], Tensor]
"""From a chunk's projections `y_CV`, which rows they are, and the factor `scale_C` of each row's gradient: nats a row.
Writes the gradient by the projections over `y_CV`, if gradients are wanted."""


class Form(NamedTuple):
    """From projections to logits over temperature: t = finish(scale * y) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def chosen(device: torch.device) -> bool:
    """Whether the passes of this file are used there. On a CPU `kernels`' blocks stay in the cache, and are as fast in
    less memory.
    """
    return device.type == "cuda" and compiling.usable(device)


def passes_of(terms: Sequence[Term], head: kernels.Projection, chunk: int, wide: torch.dtype, *, grad: bool):
    """The passes for these terms, or None where only the eager kernels can: several terms, or a top-k of everything."""
    if len(terms) != 1:
        return None
    (term,) = terms
    form = Form(head.scale, head.softcap, term.temperature)
    signal, factor = term.signal, term.loss.weight / term.temperature
    if isinstance(signal, TextSignal | SampledSignal):
        made = _against_entries(term, signal, form, chunk, wide, grad=grad)
    elif isinstance(signal, TopKSignal):
        if signal.ids_NK.shape[1] == signal.vocab_size:
            return None
        made = _against_top_k(term.loss, signal, form, wide, grad=grad)
    else:
        made = _against_teacher(term, signal, form, chunk, grad=grad)

    def passes(y_CV: Tensor, rows: slice, scale_C: Tensor) -> Tensor:
        return term.loss.weight * made(y_CV, rows, scale_C * factor)

    return passes


def _against_entries(
    term: Term, signal: TextSignal | SampledSignal, form: Form, chunk: int, wide: torch.dtype, *, grad: bool
) -> Passes:
    """The gradient is q times the entries' mass, but at the entries themselves. Those are few: they are computed apart
    from the logits as they were, so that the gradient there, a small difference of two large numbers, is rounded once.
    """
    n, vocab = len(signal), signal.vocab_size
    rows_E, ids_E, weights_E, _ = signal.entries()
    # Entries of the same token are one; then each place is written once.
    at_E, place_E = torch.unique(rows_E * vocab + ids_E, return_inverse=True)
    weights_E = torch.zeros(len(at_E), dtype=wide, device=at_E.device).index_add_(0, place_E, weights_E.to(wide))
    rows_E = at_E // vocab
    mass_N = torch.zeros(n, dtype=wide, device=at_E.device).index_add_(0, rows_E, weights_E)
    known = isinstance(signal, SampledSignal) and term.loss.name == "forward_kl"
    known_N = signal.entropy_N.to(wide) if known and isinstance(signal, SampledSignal) else None
    bounds = [*range(0, n, chunk), n]
    ends = torch.searchsorted(at_E, torch.tensor(bounds, device=at_E.device) * vocab).tolist()
    start = dict(zip(bounds, ends, strict=True))  # asked for at once: each answer waits for the device

    def passes(y_CV: Tensor, rows: slice, scale_C: Tensor) -> Tensor:
        part = slice(start[rows.start], start[rows.stop])
        here_E, row_E, weight_E = at_E[part] - rows.start * vocab, rows_E[part] - rows.start, weights_E[part]
        z_E = _finish(y_CV.view(-1)[here_E].to(wide), form)
        log_z_C = compiled(_normaliser)(any_rows(y_CV), form)
        log_q_E = z_E / form.temperature - log_z_C[row_E]
        nats_C = torch.zeros_like(log_z_C).index_add_(0, row_E, -weight_E * log_q_E)
        if grad:
            mass_C = mass_N[rows] * scale_C
            compiled(_spread_)(any_rows(y_CV), log_z_C, mass_C, form)
            grad_E = log_q_E.exp() * mass_C[row_E] - weight_E * scale_C[row_E]
            y_CV.view(-1)[here_E] = _back(grad_E, z_E, form).to(y_CV.dtype)
        return nats_C if known_N is None else nats_C - known_N[rows]

    return passes


def _against_top_k(loss: Loss, signal: TopKSignal, form: Form, wide: torch.dtype, *, grad: bool) -> Passes:
    """The listed tokens and the rest as one outcome; only the rest needs passes over the logits."""

    def passes(y_CV: Tensor, rows: slice, scale_C: Tensor) -> Tensor:
        part = signal.slice(rows.start, rows.stop)
        ids_CK = part.ids_NK.long()
        z_CK = _finish(y_CV.gather(1, ids_CK).to(wide), form)
        y_CV.scatter_(1, ids_CK, -torch.inf)
        rest_C = compiled(_normaliser)(any_rows(y_CV), form)
        coarse = torch.cat([z_CK / form.temperature, rest_C[:, None]], dim=1)
        teacher = torch.cat([part.log_probs_NK, part.tail_mass_N.log()[:, None]], dim=1).to(wide)
        nats_C, grad_CK = kernels.dense(loss, coarse, teacher, scale_C, kernels.Scratch(len(y_CV), wide, y_CV.device))
        if grad:
            compiled(_spread_)(any_rows(y_CV), rest_C, grad_CK[:, -1].contiguous(), form)
            y_CV.scatter_(1, ids_CK, _back(grad_CK[:, :-1], z_CK, form).to(y_CV.dtype))
        return nats_C

    return passes


def _against_teacher(term: Term, signal: HiddenSignal | DenseSignal, form: Form, chunk: int, *, grad: bool) -> Passes:
    name, share = kernels.teachers_share(term.loss)
    teacher = Form(temperature=term.temperature)
    if isinstance(signal, DenseSignal):
        logits_of = lambda rows: signal.logits_NV[rows]  # noqa: E731
    else:
        head = kernels.teachers_head(signal)
        teacher = Form(head.scale, head.softcap, term.temperature)
        buffer_CV = signal.hidden_ND.new_empty(min(chunk, len(signal)), signal.vocab_size, dtype=head.weight_VD.dtype)
        logits_of = lambda rows: head.project(signal.hidden_ND[rows].to(head.weight_VD.dtype), buffer_CV)  # noqa: E731

    def passes(y_CV: Tensor, rows: slice, scale_C: Tensor) -> Tensor:
        return compiled(_compare_)(any_rows(y_CV), any_rows(logits_of(rows)), scale_C, name, share, form, teacher, grad)

    return passes


# What is compiled. Rows and vocabulary are the axes of every tensor; forms, names and flags are constants.


def _normaliser(y_CV: Tensor, form: Form) -> Tensor:
    """The log of the sum of exp of the logits over temperature, [C]. A projection of minus infinity is no token."""
    s_CV = _softened(y_CV, form)
    most_C1 = s_CV.amax(dim=1, keepdim=True)
    return ((s_CV - most_C1).exp().sum(dim=1, keepdim=True).log() + most_C1)[:, 0]


def _spread_(y_CV: Tensor, log_z_C: Tensor, factor_C: Tensor, form: Form) -> None:
    """Writes the gradient of factor * log_z over the projections: factor * softmax, through the soft cap."""
    z_CV = _finish(_widened(y_CV), form)
    grad_CV = (_softened(y_CV, form) - log_z_C[:, None]).exp() * factor_C[:, None]
    y_CV.copy_(_back(grad_CV, z_CV, form))


def _compare_(
    y_CV: Tensor,
    t_CV: Tensor,
    scale_C: Tensor,
    name: str,
    share: float,
    form: Form,
    teacher: Form,
    grad: bool,
) -> Tensor:
    """Nats a row against the teacher's projections `t_CV`; the gradient over the student's. The formulas are those of
    `kernels.dense`.
    """
    z_CV = _finish(_widened(y_CV), form)
    s_CV = z_CV / form.temperature
    t_CV = (_finish(_widened(t_CV), teacher) / teacher.temperature).to(s_CV.dtype)
    log_q_CV, log_p_CV = _log_softmax(s_CV), _log_softmax(t_CV)
    q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
    if name == "cross_entropy":
        nats_C = -_mean(p_CV, log_q_CV)
        grad_CV = q_CV - p_CV
    elif name == "forward_kl":
        nats_C = _mean(p_CV, log_p_CV - log_q_CV)
        grad_CV = q_CV - p_CV
    elif name == "reverse_kl":
        ratio_CV = log_q_CV - log_p_CV
        nats_C = _mean(q_CV, ratio_CV)
        grad_CV = torch.where(q_CV == 0, 0.0, q_CV * (ratio_CV - nats_C[:, None]))
    elif name == "total_variation":
        nats_C = 0.5 * (q_CV - p_CV).abs().sum(dim=1)
        grad_CV = _through_softmax(0.5 * (q_CV - p_CV).sign(), q_CV)
    else:
        m_CV = ((1 - share) * q_CV + share * p_CV).clamp_min(torch.finfo(q_CV.dtype).tiny)
        log_m_CV = m_CV.log()
        if name == "generalized_jsd":
            nats_C = share * _mean(p_CV, log_p_CV - log_m_CV) + (1 - share) * _mean(q_CV, log_q_CV - log_m_CV)
            slope_CV = (log_q_CV - log_m_CV) * (1 - share)
        elif name == "skew_kl":
            nats_C = _mean(p_CV, log_p_CV - log_m_CV)
            slope_CV = p_CV / m_CV * (share - 1)
        else:
            nats_C = _mean(q_CV, log_q_CV - log_m_CV)
            slope_CV = log_q_CV - log_m_CV - (1 - share) * q_CV / m_CV
        grad_CV = _through_softmax(slope_CV, q_CV)
    if grad:
        y_CV.copy_(_back(grad_CV * scale_C[:, None], z_CV, form))
    return nats_C


def _widened(y_CV: Tensor) -> Tensor:
    return y_CV if y_CV.dtype == torch.float64 else y_CV.float()


def _softened(y_CV: Tensor, form: Form) -> Tensor:
    wide_CV = _widened(y_CV)
    s_CV = _finish(wide_CV, form) / form.temperature
    return s_CV if form.softcap is None else torch.where(wide_CV == -torch.inf, -torch.inf, s_CV)


def _finish(y: Tensor, form: Form) -> Tensor:
    y = y if form.scale == 1 else y * form.scale
    return y if form.softcap is None else torch.tanh(y / form.softcap) * form.softcap


def _back(grad: Tensor, z: Tensor, form: Form) -> Tensor:
    return grad if form.softcap is None else grad * (1 - (z / form.softcap).square())


def _log_softmax(s_CV: Tensor) -> Tensor:
    below_CV = s_CV - s_CV.amax(dim=1, keepdim=True)
    return below_CV - below_CV.exp().sum(dim=1, keepdim=True).log()


def _mean(probs_CV: Tensor, values_CV: Tensor) -> Tensor:
    return torch.where(probs_CV == 0, 0.0, probs_CV * values_CV).sum(dim=1)


def _through_softmax(slope_CV: Tensor, q_CV: Tensor) -> Tensor:
    return torch.where(q_CV == 0, 0.0, (slope_CV - _mean(q_CV, slope_CV)[:, None]) * q_CV)
