"""Value and gradient of each loss for a block of rows, from the student's logits, without autograd.

Every function takes the student's logits over temperature, `s_RV`, and leaves them as they are. It returns
nats a row and the gradient with respect to `s_RV`, each row times `scale_R`, in a buffer of `scratch` that
the next block reuses. With q the student and p the teacher, the gradient of any f(q) is q * (f' - E_q f'),
where f' is its derivative by q.

The formulas are those of `losses`, written a second time; the tests hold them to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.signal.types import DenseSignal, HiddenSignal, SampledSignal, TextSignal, TopKSignal
from limbeck.train.losses import Loss
from limbeck.train.pairing import Term
from limbeck.train.workspace import buffer


class Outcome(NamedTuple):
    """Nats a row, and the gradient with respect to the logits."""

    nats_R: Tensor
    grad_RV: Tensor


class Scratch:
    """Buffers that are made once and reused: making one for every pass costs more than the pass."""

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device):
        self._rows, self._dtype, self._device = rows, dtype, device
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, like_RV: Tensor) -> Tensor:
        """A buffer of the shape of `like_RV`, the same one for the same name and width."""
        rows, width = like_RV.shape
        if (name, width) not in self._buffers:
            shape = self._rows, width
            self._buffers[name, width] = buffer(f"{name}, {width} wide", shape, self._dtype, self._device)
        return self._buffers[name, width][:rows]


def sparse(
    s_RV: Tensor, rows_E: Tensor, ids_E: Tensor, weights_E: Tensor, scale_R: Tensor, scratch: Scratch
) -> Outcome:
    """Cross-entropy, sum of weight times minus log q over the entries; `rows_E` counts from the block's
    first row.
    """
    rows, width = s_RV.shape
    q_RV = torch.softmax(s_RV, dim=1, out=scratch("q", s_RV))
    at_E = rows_E * width + ids_E
    log_q_E = s_RV.view(-1)[at_E] - log_sum_exp(s_RV, q_RV)[rows_E]
    nats_R = s_RV.new_zeros(rows).index_add_(0, rows_E, -weights_E * log_q_E)
    mass_R = s_RV.new_zeros(rows).index_add_(0, rows_E, weights_E)
    q_RV.mul_((mass_R * scale_R)[:, None])
    q_RV.view(-1).index_add_(0, at_E, -weights_E * scale_R[rows_E])
    return Outcome(nats_R, q_RV)


def top_k(
    loss: Loss,
    s_RV: Tensor,
    ids_RK: Tensor,
    log_probs_RK: Tensor,
    tail_R: Tensor,
    scale_R: Tensor,
    scratch: Scratch,
) -> Outcome:
    """Any loss over the k listed tokens and the rest as one outcome."""
    rest_RV = scratch("rest", s_RV).copy_(s_RV).scatter_(1, ids_RK, -torch.inf)
    within_RV = torch.softmax(rest_RV, dim=1, out=scratch("within", s_RV))
    rest_R = log_sum_exp(rest_RV, within_RV)
    if ids_RK.shape[1] == s_RV.shape[1]:
        within_RV.zero_()
        rest_R.fill_(-torch.inf)
    coarse = torch.cat([s_RV.gather(1, ids_RK), rest_R[:, None]], dim=1)
    teacher = torch.cat([log_probs_RK, tail_R.log()[:, None]], dim=1).to(coarse.dtype)
    nats_R, grad = dense(loss, coarse, teacher, scale_R, scratch)
    grad_RV = within_RV.mul_(grad[:, -1:])
    return Outcome(nats_R, grad_RV.scatter_(1, ids_RK, grad[:, :-1]))


def dense(loss: Loss, s_RV: Tensor, t_RV: Tensor, scale_R: Tensor, scratch: Scratch) -> Outcome:
    """Any loss against the teacher's logits over temperature, `t_RV`, which is overwritten."""
    name, share = teachers_share(loss)
    q_RV = torch.softmax(s_RV, dim=1, out=scratch("q", s_RV))
    p_RV = torch.softmax(t_RV, dim=1, out=scratch("p", s_RV))
    log_z_s_R1, log_z_t_R1 = log_sum_exp(s_RV, q_RV)[:, None], log_sum_exp(t_RV, p_RV)[:, None]
    work_RV = scratch("work", s_RV)
    if name == "cross_entropy":
        nats_R = mean(p_RV, torch.sub(log_z_s_R1, s_RV, out=work_RV))
        grad_RV = q_RV.sub_(p_RV)
    elif name == "forward_kl":
        nats_R = mean(p_RV, t_RV.sub_(s_RV).sub_(log_z_t_R1 - log_z_s_R1))
        grad_RV = q_RV.sub_(p_RV)
    elif name == "reverse_kl":
        nats_R = mean(q_RV, torch.sub(s_RV, t_RV, out=work_RV).sub_(log_z_s_R1 - log_z_t_R1))
        grad_RV = work_RV.sub_(nats_R[:, None]).mul_(q_RV)
    elif name == "total_variation":
        nats_R = torch.sub(q_RV, p_RV, out=work_RV).abs().sum(dim=1).mul_(0.5)
        grad_RV = _through_softmax(work_RV.sign_().mul_(0.5), q_RV)
    else:
        m_RV = torch.mul(q_RV, 1 - share, out=work_RV).add_(p_RV, alpha=share)
        m_RV.clamp_min_(torch.finfo(m_RV.dtype).tiny)
        log_m_RV = torch.log(m_RV, out=scratch("log_m", s_RV))
        log_p_m_RV = t_RV.sub_(log_z_t_R1).sub_(log_m_RV)
        log_q_m_RV = torch.sub(s_RV, log_z_s_R1, out=scratch("log_q_m", s_RV)).sub_(log_m_RV)
        if name == "generalized_jsd":
            nats_R = share * mean(p_RV, log_p_m_RV) + (1 - share) * mean(q_RV, log_q_m_RV)
            slope_RV = log_q_m_RV.mul_(1 - share)
        elif name == "skew_kl":
            nats_R = mean(p_RV, log_p_m_RV)
            slope_RV = p_RV.div_(m_RV).mul_(share - 1)
        else:
            nats_R = mean(q_RV, log_q_m_RV)
            slope_RV = log_q_m_RV.sub_(torch.div(q_RV, m_RV, out=log_m_RV), alpha=1 - share)
        grad_RV = _through_softmax(slope_RV, q_RV)
    return Outcome(nats_R, grad_RV.mul_(scale_R[:, None]))


def log_sum_exp(logits_RV: Tensor, softmax_RV: Tensor) -> Tensor:
    """The normaliser of a softmax that is there already, [R]: read off at the most likely token, where it
    is exact.
    """
    return logits_RV.amax(dim=1) - softmax_RV.amax(dim=1).log_()


def mean(probs_RV: Tensor, values_RV: Tensor) -> Tensor:
    """Sum of probability times value, [R]. Values of tokens that have no probability become 0 if one is not
    finite.
    """
    if probs_RV.is_cuda:  # to look costs more there than to mask: the host would wait for all that is queued
        return torch.linalg.vecdot(probs_RV, values_RV.masked_fill_(probs_RV == 0, 0))
    mean_R = torch.linalg.vecdot(probs_RV, values_RV)
    if not torch.isfinite(mean_R).all():
        mean_R = torch.linalg.vecdot(probs_RV, values_RV.masked_fill_(probs_RV == 0, 0))
    return mean_R


def _through_softmax(slope_RV: Tensor, q_RV: Tensor) -> Tensor:
    """From the derivative by q to the derivative by the logits of q; in the place of `slope_RV`."""
    return slope_RV.sub_(torch.linalg.vecdot(q_RV, slope_RV)[:, None]).mul_(q_RV)


def teachers_share(loss: Loss) -> tuple[str, float]:
    """The loss's name and the teacher's share in its mixture; a mixture of the student or teacher alone is
    a plain KL.
    """
    share = {"generalized_jsd": loss.value, "skew_kl": loss.value, "skew_reverse_kl": 1 - loss.value}.get(
        loss.name, 0.0
    )
    if loss.name in ("generalized_jsd", "skew_kl") and share == 0:
        return "forward_kl", share
    if loss.name in ("generalized_jsd", "skew_reverse_kl") and share == 1:
        return "reverse_kl", share
    return loss.name, share


class Projection(NamedTuple):
    """A head, cut to the shared vocabulary, in the type its products run in."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        vocab: int,
        dtype: torch.dtype,
        whose: str,
    ) -> Projection:
        """The first `vocab` rows of a head, in `dtype`; converted once, not for every chunk. `whose` it is keeps
        the student's from the teacher's, where buffers are kept.
        """
        if (narrow_VD := weight[:vocab]).dtype != dtype:
            made_VD = buffer(f"{whose} head", tuple(narrow_VD.shape), dtype, weight.device)
            narrow_VD = made_VD.copy_(narrow_VD)
        return cls(narrow_VD, None if bias is None else bias[:vocab].to(dtype), scale, softcap)

    def project(self, hidden_CD: Tensor, buffer_CV: Tensor) -> Tensor:
        """Hidden @ weight.T + bias in the first rows of the buffer."""
        out_CV = buffer_CV[: len(hidden_CD)]
        if self.bias_V is None:
            return torch.mm(hidden_CD, self.weight_VD.t(), out=out_CV)
        return torch.addmm(self.bias_V, hidden_CD, self.weight_VD.t(), out=out_CV)

    def finish_(self, y_RV: Tensor) -> Tensor:
        """From projections to logits, in place: scale, then soft cap."""
        if self.scale != 1:
            y_RV.mul_(self.scale)
        return y_RV if self.softcap is None else y_RV.div_(self.softcap).tanh_().mul_(self.softcap)

    def back_(self, grad_RV: Tensor, z_RV: Tensor) -> Tensor:
        """From the gradient by the logits `z_RV`, which are lost, to that by scale * projections."""
        if self.softcap is None:
            return grad_RV
        return grad_RV.addcmul_(grad_RV, z_RV.mul_(z_RV), value=-1 / self.softcap**2)


Compare = Callable[[Tensor, slice, Tensor, Scratch], Outcome]
"""From the student's logits of some rows over temperature, which rows they are, and `scale_R`."""


Teacher = Callable[[slice, Tensor], Tensor]
"""Writes the teacher's logits of some rows into a buffer, and returns it."""


def comparisons(terms: Sequence[Term], chunk: int, wide: torch.dtype) -> list[Compare]:
    """One for each term. Terms against the same teacher share its logits, a chunk of them at a time."""
    teachers: dict[int, Teacher] = {}
    found: list[Compare] = []
    for term in terms:
        signal = term.signal
        if isinstance(signal, TextSignal | SampledSignal):
            found.append(_against_entries(term, signal, wide))
        elif isinstance(signal, TopKSignal):
            found.append(_against_top_k(term, signal))
        else:
            if id(signal) not in teachers:
                teachers[id(signal)] = _given(signal) if isinstance(signal, DenseSignal) else _projected(signal, chunk)
            found.append(_against_teacher(term, teachers[id(signal)]))
    return found


def _against_entries(term: Term, signal: TextSignal | SampledSignal, wide: torch.dtype) -> Compare:
    rows_E, ids_E, weights_E, starts = signal.entries()
    weights_E = weights_E.to(wide)
    known_N = (
        signal.entropy_N.to(wide) if isinstance(signal, SampledSignal) and term.loss.name == "forward_kl" else None
    )

    def compare(s_RV: Tensor, rows: slice, scale_R: Tensor, scratch: Scratch) -> Outcome:
        at = slice(starts[rows.start], starts[rows.stop])
        nats_R, grad_RV = sparse(s_RV, rows_E[at] - rows.start, ids_E[at], weights_E[at], scale_R, scratch)
        return Outcome(nats_R if known_N is None else nats_R - known_N[rows], grad_RV)

    return compare


def _against_top_k(term: Term, signal: TopKSignal) -> Compare:
    def compare(s_RV: Tensor, rows: slice, scale_R: Tensor, scratch: Scratch) -> Outcome:
        part = signal.slice(rows.start, rows.stop)
        return top_k(term.loss, s_RV, part.ids_NK, part.log_probs_NK, part.tail_mass_N, scale_R, scratch)

    return compare


def _against_teacher(term: Term, teacher: Teacher) -> Compare:
    def compare(s_RV: Tensor, rows: slice, scale_R: Tensor, scratch: Scratch) -> Outcome:
        t_RV = teacher(rows, scratch("t", s_RV))
        if term.temperature != 1:
            t_RV.div_(term.temperature)
        return dense(term.loss, s_RV, t_RV, scale_R, scratch)

    return compare


def _given(signal: DenseSignal) -> Teacher:
    return lambda rows, buffer_RV: buffer_RV.copy_(signal.logits_NV[rows])


def teachers_head(signal: HiddenSignal) -> Projection:
    """The teacher's head, cut to the shared vocabulary."""
    dtype = torch.promote_types(signal.hidden_ND.dtype, signal.head_weight_VD.dtype)
    return Projection.of(
        signal.head_weight_VD,
        signal.head_bias_V,
        signal.logit_scale,
        signal.softcap,
        signal.vocab_size,
        dtype,
        "teacher's",
    )


def _projected(signal: HiddenSignal, chunk: int) -> Teacher:
    head = teachers_head(signal)
    dtype = head.weight_VD.dtype
    buffer_CV = buffer("teacher", (chunk, signal.vocab_size), dtype, signal.hidden_ND.device)
    held = range(0)

    def logits(rows: slice, buffer_RV: Tensor) -> Tensor:
        nonlocal held
        if rows.start not in held:
            first = rows.start - rows.start % chunk
            held = range(first, first + chunk)
            head.project(signal.hidden_ND[first : first + chunk].to(dtype), buffer_CV)
        return head.finish_(buffer_RV.copy_(buffer_CV[rows.start - held.start : rows.stop - held.start]))

    return logits
