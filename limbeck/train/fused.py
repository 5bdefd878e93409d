"""The fused loss: from hidden states and the head to the sum of a loss and its gradient, a chunk of
positions at a time.

The student's logits exist for one chunk only. Their gradient is computed at once, in their place, and
multiplied into the gradients of hidden states and head; the backward pass only scales those. The teacher's
logits, where a signal implies any, exist for the same chunk. Nothing of size [N, V] is made for any signal.

Matrix products run in the type of the inputs, or in autocast's; all that follows, from temperature to
gradient, in float32, or float64 for float64 inputs. In bfloat16 the logits are therefore rounded once, as
they are in a model that computes its head under autocast, and never again before the gradient is handed to
the matrix products. Sums over chunks are kept in float32. The passes over a chunk run in blocks of rows
that stay in the processor's cache, which makes them several times faster than whole-chunk passes. On a GPU
they are one or two compiled kernels for the whole chunk (`compiled`), or else blocks large enough to fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.errors import InputError, Problem
from limbeck.models import amx
from limbeck.models.products import adds_wide
from limbeck.signal.types import HiddenSignal, Signal
from limbeck.train import compiled, kernels
from limbeck.train.losses import LossSpec
from limbeck.train.pairing import Term, pair
from limbeck.train.workspace import buffer

_CHUNK_BYTES = 1 << 27
_LEAST_CHUNK = 256
"""Below this many positions, adding to the head's gradient costs more than a fifth of the matrix products."""
_GRANULE = 32
"""Chunks of many positions are a multiple of it, filled up with zeros: a matrix product whose shape was met before need
not be prepared anew, which takes as long as the product itself."""
_BLOCK_NUMBERS = 1 << 20
_HEAD_SLICE = 4096
"""Rows of the head at a time, where a product is widened to be added, or a sum is scaled and narrowed."""
_GPU_CHUNK = 1024
"""Least positions that have logits at a time on a GPU. Otherwise as many as the hidden states are wide, or half of that
where a live teacher's logits stand beside: with the head's gradient in float32 they then take about as much memory as
that gradient takes with its copy in bfloat16, which a head in bfloat16 has in the end."""
_GPU_CHUNK_BYTES = 1 << 30
_GPU_BLOCK_NUMBERS = 1 << 25
"""Numbers in a block of the eager passes on a GPU: 128 MiB in float32, of which up to six are held."""


def fused_loss(
    hidden: Tensor,
    head_weight: Tensor,
    signal: Signal | Sequence[Signal],
    *,
    loss: LossSpec,
    temperature: float = 1.0,
    chunk: int | None = None,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    weights: Tensor | None = None,
    allow_biased: bool = False,
) -> Tensor:
    """The sum of `loss` over the positions, a scalar in float32 (float64 for float64 inputs).

    `hidden` [N, D] are the student's last hidden states, `head_weight` [V, D] and `head_bias` [V] its head;
    the logits are softcap * tanh(y / softcap) of y = logit_scale * (hidden @ head_weight.T + head_bias),
    without the tanh where `softcap` is None. A head wider than the signal's vocabulary is cut to it.
    `weights` [N] multiply the positions; one of weight 0 is left out altogether, whatever its numbers are.
    `chunk` is how many positions have logits at a time; by default as many as fill 128 MiB, and at least
    256; on a GPU at least 1,024. Several signals and a weighted sum of losses share one pass.

    Equal in value and gradient to the sum of `weights` times `pairing.signal_loss`. Without positions it is
    0, and the gradient is 0. Gradients come in the types of the inputs, for those inputs that ask for one.

    Raises `InputError` or `RecipeError` for what `pairing.pair` refuses and for shapes that do not fit.
    """
    terms = pair(loss, signal, temperature=temperature, allow_biased=allow_biased)
    dtype = _product_dtype(hidden, head_weight)
    job = _Job(terms, dtype, weights, chunk, logit_scale, softcap, grad=torch.is_grad_enabled())
    _check(job, hidden, head_weight, head_bias)
    if weights is not None and not (weights != 0).all():
        kept_M = weights.nonzero()[:, 0]
        hidden = hidden[kept_M]
        terms = tuple(term._replace(signal=term.signal.index_select(kept_M)) for term in job.terms)
        job = replace(job, terms=terms, weights_N=weights[kept_M])
    return _FusedLoss.apply(hidden, head_weight, head_bias, job)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def position_losses(
    hidden: Tensor,
    head_weight: Tensor,
    signal: Signal | Sequence[Signal],
    *,
    loss: LossSpec,
    temperature: float = 1.0,
    chunk: int | None = None,
    head_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    allow_biased: bool = False,
) -> Tensor:
    """The loss at each position, [N], without a gradient: what `fused_loss` sums, for means and intervals."""
    terms = pair(loss, signal, temperature=temperature, allow_biased=allow_biased)
    job = _Job(terms, _product_dtype(hidden, head_weight), None, chunk, logit_scale, softcap, grad=False)
    _check(job, hidden, head_weight, head_bias)
    return _run(hidden, head_weight, head_bias, job, (False, False, False)).nats_N


@dataclass(frozen=True)
class _Job:
    terms: tuple[Term, ...]
    dtype: torch.dtype
    """In which the matrix products run."""
    weights_N: Tensor | None
    chunk: int | None
    scale: float
    softcap: float | None
    grad: bool

    @property
    def vocab(self) -> int:
        return self.terms[0].signal.vocab_size

    def chunk_of(self, hidden: Tensor) -> int:
        """Positions with logits at a time: as asked for, or the default, evened out and in whole granules."""
        n, row = len(hidden), self.vocab * self.dtype.itemsize
        default = _CHUNK_BYTES // row
        if hidden.is_cuda:
            live = any(isinstance(term.signal, HiddenSignal) for term in self.terms)
            default = min(max(_GPU_CHUNK, hidden.shape[1] // (2 if live else 1)), _GPU_CHUNK_BYTES // row)
        most = self.chunk or max(_LEAST_CHUNK, default)
        if self.chunk is not None or n == 0:
            return max(1, min(most, n))
        even = -(-n // -(-n // most))
        return even if even < _LEAST_CHUNK else -(-even // _GRANULE) * _GRANULE


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's type where it is on, as for any matrix product, else the wider of the two."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


class _Result(NamedTuple):
    nats_N: Tensor
    grad_hidden_ND: Tensor | None
    grad_weight_VD: Tensor | None
    grad_bias_V: Tensor | None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, job: _Job) -> Tensor:
        """The weighted sum; the gradients, computed here, wait in `ctx`."""
        want = tuple(job.grad and needed for needed in ctx.needs_input_grad[:3])
        nats_N, *grads = _run(hidden, head_weight, head_bias, job, want)
        ctx.save_for_backward(*grads)
        ctx.types = [None if t is None else (t.shape, t.dtype) for t in (hidden, head_weight, head_bias)]
        if job.weights_N is not None:
            nats_N = nats_N * job.weights_N
        return nats_N.sum(dtype=torch.float64).to(nats_N.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Scales what forward found, unless the scale is 1. Rows of a head beyond the vocabulary get 0."""
        grads: list[Tensor | None] = []
        # On a GPU to look costs a wait, which is less than to read and write a large head's gradient once more.
        same = any(
            f is not None and kind == (f.shape, f.dtype) for f, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        unscaled = same and float(grad_outputs[0]) == 1
        for found, kind in zip(ctx.saved_tensors, ctx.types, strict=True):
            grad = None
            if unscaled and found is not None and kind == (found.shape, found.dtype):
                grad = found
            elif found is not None:
                shape, dtype = kind
                grad = found.new_empty(shape, dtype=dtype)
                grad[len(found) :].zero_()
                if found.is_cuda:  # widens and narrows in registers
                    torch.mul(found, grad_outputs[0], out=grad[: len(found)])
                    grads.append(grad)
                    continue
                for at in range(0, len(found), _HEAD_SLICE):
                    part = found[at : at + _HEAD_SLICE]
                    grad[at : at + len(part)] = part * grad_outputs[0]
            grads.append(grad)
        return *grads, None


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, want: Sequence[bool]) -> _Result:
    with torch.autocast(hidden.device.type, enabled=False):
        dtype, n = job.dtype, len(hidden)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        hidden = hidden.to(dtype)
        chunk = job.chunk_of(hidden)
        if job.chunk is None and n % chunk and chunk >= _LEAST_CHUNK:
            hidden = torch.cat([hidden, hidden.new_zeros(chunk - n % chunk, hidden.shape[1])])
        head = kernels.Projection.of(weight, bias, job.scale, job.softcap, job.vocab, dtype, "student's")
        numbers = _GPU_BLOCK_NUMBERS if hidden.is_cuda else _BLOCK_NUMBERS
        block = min(chunk, max(1, numbers // job.vocab))
        scratch = kernels.Scratch(block, wide, hidden.device)
        passes = None
        if compiled.chosen(hidden.device):
            passes = compiled.passes_of(job.terms, head, chunk, wide, grad=any(want))
        compare = kernels.comparisons(job.terms, chunk, wide) if passes is None else []
        scale_N = torch.full((n,), head.scale, dtype=wide, device=hidden.device)
        if job.weights_N is not None:
            scale_N *= job.weights_N
        logits_CV = buffer("logits", (chunk, job.vocab), dtype, hidden.device)
        nats_N = torch.empty_like(scale_N)
        grad_hidden = torch.empty_like(hidden) if want[0] else None
        # Where the head itself is wide, its gradient has to be in the end.
        total = wide if n > chunk or weight.dtype == wide else dtype
        grad_weight = _HeadGradient(weight, head.weight_VD.shape, total) if want[1] else None
        grad_bias = scale_N.new_zeros(job.vocab) if want[2] else None
        for a in range(0, n, chunk):
            y_CV = head.project(hidden[a : a + chunk], logits_CV)
            there = min(chunk, n - a)
            y_CV[there:].zero_()  # what fills up the last chunk is no position
            if passes is not None:
                rows = slice(a, a + there)
                nats_N[rows] = passes(y_CV[:there], rows, scale_N[rows])
            for r in range(0, there if passes is None else 0, block):
                y_RV = y_CV[r : min(r + block, there)]
                rows = slice(a + r, a + r + len(y_RV))
                z_RV = head.finish_(y_RV if dtype == wide else scratch("z", y_RV).copy_(y_RV))
                nats_N[rows], grad_RV = _sum_terms(job.terms, compare, z_RV, rows, scale_N[rows], scratch)
                if any(want):
                    y_RV.copy_(head.back_(grad_RV, z_RV))
            if grad_hidden is not None:
                torch.mm(y_CV, head.weight_VD, out=grad_hidden[a : a + chunk])
            if grad_weight is not None:
                grad_weight.add(y_CV, hidden[a : a + chunk])
            if grad_bias is not None:
                grad_bias += y_CV.sum(dim=0, dtype=wide)
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:n]
        return _Result(nats_N, grad_hidden, None if grad_weight is None else grad_weight.total(), grad_bias)


def _sum_terms(
    terms: Sequence[Term],
    compare: Sequence[kernels.Compare],
    z_RV: Tensor,
    rows: slice,
    scale_R: Tensor,
    scratch: kernels.Scratch,
) -> kernels.Outcome:
    """All terms of the weighted sum for a block of rows; the gradient is by the logits `z_RV`."""
    total = None
    for term, against in zip(terms, compare, strict=True):
        weight, temperature = term.loss.weight, term.temperature
        s_RV = z_RV if temperature == 1 else torch.div(z_RV, temperature, out=scratch("s", z_RV))
        nats_R, grad_RV = against(s_RV, rows, scale_R * (weight / temperature), scratch)
        if total is not None:
            total = kernels.Outcome(total.nats_R + weight * nats_R, total.grad_RV.add_(grad_RV))
        elif len(terms) == 1:
            total = kernels.Outcome(weight * nats_R, grad_RV)
        else:
            total = kernels.Outcome(weight * nats_R, scratch("sum", z_RV).copy_(grad_RV))
    assert total is not None
    return total


def _gradient_of(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where a gradient of a head goes. Where it becomes the head's `grad` as it is, its memory is used again once that
    was let go. Several processes may hold on to it longer, to send it.
    """
    if weight.is_leaf and weight.grad is None and not torch.distributed.is_initialized():
        return buffer("gradient", tuple(shape), dtype, weight.device)
    return torch.empty(shape, dtype=dtype, device=weight.device)


class _HeadGradient:
    """The sum over chunks of gradient.T @ hidden, [V, D], kept in `dtype`."""

    def __init__(self, weight: Tensor, shape: torch.Size, dtype: torch.dtype):
        self._total_VD = _gradient_of(weight, shape, dtype)
        self._begun = False

    def add(self, grad_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds a chunk's share; where the sum is kept wider than the products, a slice at a time."""
        total_VD = self._total_VD
        if total_VD.dtype == grad_CV.dtype:
            total_VD.addmm_(grad_CV.t(), hidden_CD, beta=int(self._begun))
        elif grad_CV.dtype == torch.bfloat16 and total_VD.dtype == torch.float32 and amx.usable(total_VD.device):
            amx.weight_gradient(grad_CV, hidden_CD, total_VD, add=self._begun)
        elif adds_wide(total_VD.device):
            wide, beta = total_VD.dtype, int(self._begun)
            torch.addmm(total_VD, grad_CV.t(), hidden_CD, out_dtype=wide, beta=beta, out=total_VD)
        else:
            product = hidden_CD.new_empty(min(_HEAD_SLICE, len(total_VD)), hidden_CD.shape[1])
            for v in range(0, len(total_VD), _HEAD_SLICE):
                part = total_VD[v : v + _HEAD_SLICE]
                added = torch.mm(grad_CV[:, v : v + _HEAD_SLICE].t(), hidden_CD, out=product[: len(part)])
                part.add_(added) if self._begun else part.copy_(added)
        self._begun = True

    def total(self) -> Tensor:
        """The sum; zeros if nothing was added."""
        return self._total_VD if self._begun else self._total_VD.zero_()


def _check(job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n, vocab, width = len(job.terms[0].signal), job.vocab, hidden.shape[-1]
    problems = []

    def shape(name: str, tensor: Tensor, expected: str, remedy: str = "") -> None:
        problems.append(Problem(name, f"shape {list(tensor.shape)}", expected, remedy))

    if hidden.dim() != 2 or len(hidden) != n:
        shape("hidden", hidden, f"[{n}, D], a row for each position of the signal")
    if weight.dim() != 2 or weight.shape[1] != width or len(weight) < vocab:
        remedy = "make the signal over the ids that both heads share (vocab_size)"
        shape("head_weight", weight, f"[V, {width}], V at least the signal's {vocab}", remedy)
    if bias is not None and bias.shape != weight.shape[:1]:
        shape("head_bias", bias, f"[{len(weight)}]")
    if job.weights_N is not None and job.weights_N.shape != (n,):
        shape("weights", job.weights_N, f"[{n}]")
    if job.chunk is not None and job.chunk < 1:
        problems.append(Problem("chunk", str(job.chunk), "1 or more positions"))
    if job.softcap is not None and job.softcap <= 0:
        problems.append(Problem("softcap", str(job.softcap), "a positive number, or None for no cap"))
    if problems:
        raise InputError("the loss cannot be computed from these", problems)
