"""The steps of a decoder layer around its attention (`layers`), each forward and backward with as few kernels and
products as it needs: norm and products, heads in order, product and sum, gated MLP and sum.

Matrix products run in the type of what they are given; between them everything is computed in float32 (float64 for
float64) and rounded once. Gradients of weights come in the type of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limbeck.models.compiling import any_rows, any_size, compiled, wide
from limbeck.models.gated import ACTIVATIONS
from limbeck.models.products import joined, weights_gradient
from limbeck.models.stream import scaled, slopes

# Weights are asked for anew in every pass: where they are divided among processes, they are others then.


def normed_products(
    x_BTD: Tensor, scale_D: Tensor, epsilon: float, projections: Sequence[nn.Linear]
) -> tuple[Tensor, Tensor]:
    """Gives x as it came, and norm(x) @ weight.T + bias for several projections side by side, [B, T, O].

    The norm is x / sqrt(mean(x^2) + epsilon) * scale. The first result is for what else needs x: the gradient that
    comes back for it is added to the norm's where that is computed.
    """
    weights, biases = [p.weight for p in projections], [p.bias for p in projections]
    return _NormedProducts.apply(x_BTD, scale_D, epsilon, len(weights), *weights, *biases)  # pyright: ignore


class HeadNorms(NamedTuple):
    """Norms of each head's query and key, as Qwen 3 has them."""

    query_d: Tensor
    key_d: Tensor
    epsilon: float


def heads_in_order(
    x_BTE: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, heads: int, key_heads: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, T, d], keys and values [B, key heads, T, d] from their products side by side, [B, T, E].

    Queries and keys are normed, where there are norms, and rotated by the angles with cosine and sine [B or 1, T, d]
    (RoPE, arXiv 2104.09864, halves of a head against each other as GPT-NeoX and Llama have it).
    """
    scales = (None, None, 0.0) if norms is None else norms
    return _Heads.apply(x_BTE, cos_BTd, sin_BTd, heads, key_heads, *scales)  # pyright: ignore[reportReturnType]


def added_product(x_BTD: Tensor, inside_BTI: Tensor, projection: nn.Linear) -> Tensor:
    """Computes x + inside @ weight.T + bias, [B, T, D]."""
    return _AddedProduct.apply(x_BTD, inside_BTI, projection.weight, projection.bias)  # pyright: ignore


def added_gated_mlp(x_BTD: Tensor, scale_D: Tensor, epsilon: float, mlp: Any, activation: str) -> Tensor:
    """Computes x + down(act(gate(m)) * up(m)) with m = norm(x), [B, T, D]. The activated product is computed again for
    the gradient.
    """
    projections = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    weights, biases = [p.weight for p in projections], [p.bias for p in projections]
    return _AddedGatedMLP.apply(x_BTD, scale_D, epsilon, activation, *weights, *biases)  # pyright: ignore


class _NormedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, scale_D: Tensor, epsilon: float, count: int, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`parameters` are `count` weights, [O, D] each, and as many biases, [O] or None."""
        weights, biases = parameters[:count], parameters[count:]
        x_ND = x_BTD.detach().reshape(-1, x_BTD.shape[-1])
        n_ND, rstd_N1 = compiled(scaled)(any_rows(x_ND), scale_D.detach(), epsilon, x_ND.dtype)
        weight_OD, bias_O = _joined(weights, x_ND.dtype), _joined(biases, x_ND.dtype)
        assert weight_OD is not None
        y_NO = _product(n_ND, weight_OD, bias_O)
        ctx.save_for_backward(x_ND, scale_D, rstd_N1, n_ND, weight_OD)
        ctx.sizes = [len(weight) for weight in weights if weight is not None]
        ctx.types = [None if p is None else p.dtype for p in (weights[0], biases[0])]
        return x_BTD, y_NO.view(*x_BTD.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x_ND, scale_D, rstd_N1, n_ND, weight_OD = ctx.saved_tensors
        grad_NO = grad_y.reshape(len(n_ND), -1)
        count, grads = len(ctx.sizes), list[Tensor | None]()
        wanted = ctx.needs_input_grad[4 : 4 + count], ctx.needs_input_grad[4 + count :]
        for whole, each in zip(_gradients(grad_NO, n_ND, ctx.types, [any(w) for w in wanted]), wanted, strict=True):
            parts = [None] * count if whole is None else whole.split(ctx.sizes)
            grads += [part if want else None for part, want in zip(parts, each, strict=True)]
        rows = (torch.mm(grad_NO, weight_OD), x_ND, rstd_N1, grad_x.reshape(x_ND.shape))
        grad_x_ND, grad_scale_D = compiled(_scaled_back)(*map(any_rows, rows), scale_D.detach())
        return grad_x_ND.view(grad_x.shape), grad_scale_D if ctx.needs_input_grad[1] else None, None, None, *grads


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        cos_BTd: Tensor,
        sin_BTd: Tensor,
        heads: int,
        key_heads: int,
        query_d: Tensor | None,
        key_d: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_BTE = x_BTE.detach()
        read = tuple(any_size(t, 0, 1) for t in (x_BTE, cos_BTd, sin_BTd))
        ctx.counts, ctx.epsilon = (heads, key_heads), epsilon
        if query_d is None or key_d is None:
            ctx.save_for_backward(cos_BTd, sin_BTd)
            return compiled(_in_order)(*read, *ctx.counts)
        ctx.save_for_backward(cos_BTd, sin_BTd, x_BTE, query_d, key_d)
        return compiled(_normed_in_order)(*read, query_d.detach(), key_d.detach(), epsilon, *ctx.counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        cos_BTd, sin_BTd, *normed = ctx.saved_tensors
        read = (*(any_size(g, 0, 2) for g in grads), any_size(cos_BTd, 0, 1), any_size(sin_BTd, 0, 1))
        if not normed:
            grad_BTHd, scales = compiled(_in_order_back)(*read), (None, None)
        else:
            x_BTE, *scales = normed
            scales = [scale.detach() for scale in scales]
            grad_BTHd, *scales = compiled(_normed_in_order_back)(*read, any_size(x_BTE, 0, 1), *scales, ctx.epsilon)
            scales = [g if want else None for g, want in zip(scales, ctx.needs_input_grad[5:7], strict=True)]
        return grad_BTHd.flatten(-2), None, None, None, None, *scales, None


class _AddedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, inside_BTI: Tensor, weight_DI: Tensor, bias_D: Tensor | None) -> Tensor:
        inside_NI, narrow_DI = inside_BTI.detach().flatten(0, -2), joined([weight_DI], x_BTD.dtype)
        ctx.save_for_backward(inside_NI, narrow_DI)
        ctx.types = [None if p is None else p.dtype for p in (weight_DI, bias_D)]
        return _sum_with_product(x_BTD, inside_NI, narrow_DI, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        inside_NI, narrow_DI = ctx.saved_tensors
        grad_ND = grad.reshape(-1, grad.shape[-1])
        grad_inside = torch.mm(grad_ND, narrow_DI).view(*grad.shape[:-1], -1)
        return grad, grad_inside, *_gradients(grad_ND, inside_NI, ctx.types, ctx.needs_input_grad[2:])


class _AddedGatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, scale_D: Tensor, epsilon: float, activation: str, *parameters: Tensor | None
    ) -> Tensor:
        """`parameters` are the weights of gate, up and down, and their biases or None."""
        (gate_ID, up_ID, down_DI), biases = parameters[:3], parameters[3:]
        assert down_DI is not None
        x_ND = x_BTD.detach().reshape(-1, x_BTD.shape[-1])
        m_ND, rstd_N1 = compiled(scaled)(any_rows(x_ND), scale_D.detach(), epsilon, x_ND.dtype)
        both_ED, narrow_DI = _joined((gate_ID, up_ID), x_ND.dtype), joined([down_DI], x_ND.dtype)
        assert both_ED is not None
        gate_up_NE = _product(m_ND, both_ED, _joined(biases[:2], x_ND.dtype))
        activated_NI = compiled(_activated)(any_rows(gate_up_NE), activation)
        ctx.save_for_backward(x_ND, scale_D, rstd_N1, m_ND, gate_up_NE, both_ED, narrow_DI)
        ctx.activation, ctx.types = activation, [None if p is None else p.dtype for p in parameters]
        return _sum_with_product(x_BTD, activated_NI, narrow_DI, biases[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x_ND, scale_D, rstd_N1, m_ND, gate_up_NE, both_ED, narrow_DI = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        grad_NI = torch.mm(grad_ND, narrow_DI)
        # Side by side again, the two gradients would be one product, and more time to write than that saves.
        activated_NI, *grads_NI = compiled(_activated_back)(any_rows(grad_NI), any_rows(gate_up_NE), ctx.activation)
        grad_m_ND = torch.mm(grads_NI[0], both_ED[: len(both_ED) // 2])
        grad_m_ND.addmm_(grads_NI[1], both_ED[len(both_ED) // 2 :])
        found: list[Tensor | None] = [None] * 6
        factors = [(grads_NI[0], m_ND), (grads_NI[1], m_ND), (grad_ND, activated_NI)]
        for n, (dy_NO, inside_NI) in enumerate(factors):
            found[n::3] = _gradients(dy_NO, inside_NI, ctx.types[n::3], ctx.needs_input_grad[4 + n :: 3])
        grad_x_ND, grad_scale_D = compiled(_scaled_back)(
            *map(any_rows, (grad_m_ND, x_ND, rstd_N1, grad_ND)), scale_D.detach()
        )
        return grad_x_ND.view(grad.shape), grad_scale_D if ctx.needs_input_grad[1] else None, None, None, *found


def _joined(parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """As `joined`; None where there are none."""
    there = [p for p in parameters if p is not None]
    assert len(there) in (0, len(parameters))
    return joined(there, dtype) if there else None


def _product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.mm(x_NI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.t())


def _sum_with_product(x_BTD: Tensor, inside_NI: Tensor, weight_DI: Tensor, bias_D: Tensor | None) -> Tensor:
    x_ND = x_BTD.detach().reshape(len(inside_NI), -1)
    if bias_D is not None:
        x_ND = x_ND + bias_D.detach().to(x_ND.dtype)
    return torch.addmm(x_ND, inside_NI, weight_DI.t()).view(x_BTD.shape)


def _gradients(
    dy_NO: Tensor, x_NI: Tensor, types: Sequence[torch.dtype | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of a weight and its bias, in their types, those that are wanted."""
    weight, bias = types
    return (
        weights_gradient(dy_NO, x_NI, weight) if wanted[0] and weight else None,
        dy_NO.sum(dim=0, dtype=bias) if wanted[1] else None,
    )


# What is compiled.


def _scaled_back(
    grad_ND: Tensor, x_ND: Tensor, rstd_N1: Tensor, beside_ND: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x through the norm and beside it, and that of the norm's weight."""
    grad_x_ND, grad_weight_D = slopes(grad_ND, x_ND, rstd_N1, weight_D)
    return (grad_x_ND + wide(beside_ND)).to(x_ND.dtype), grad_weight_D.to(weight_D.dtype)


def _in_order(
    x_BTE: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads_of(x_BTE, heads, key_heads)
    q, k = (_rotated(t, cos_BTd, sin_BTd).to(t.dtype) for t in (q, k))
    return q.contiguous(), k.contiguous(), v.contiguous()


def _in_order_back(q: Tensor, k: Tensor, v: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    q, k = (_rotated_back(g, cos_BTd, sin_BTd).to(g.dtype) for g in (q, k))
    return torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous()


def _normed_in_order(
    x_BTE: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    query_d: Tensor,
    key_d: Tensor,
    epsilon: float,
    heads: int,
    key_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_in_order` computes, of queries and keys over the root of their mean square, times a weight."""
    q, k, v = _heads_of(x_BTE, heads, key_heads)
    q, k = (wide(t) * _rstd(t, epsilon) * wide(scale_d) for t, scale_d in ((q, query_d), (k, key_d)))
    q, k = (_rotated(t, cos_BTd, sin_BTd).to(v.dtype) for t in (q, k))
    return q.contiguous(), k.contiguous(), v.contiguous()


def _normed_in_order_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    x_BTE: Tensor,
    query_d: Tensor,
    key_d: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of all heads, [B, T, H, d], and of the two weights."""
    heads, scales, parts = q.shape[1], [], [v]
    x_q, x_k, _ = _heads_of(x_BTE, heads, k.shape[1])
    for grad, x, scale_d in ((k, x_k, key_d), (q, x_q, query_d)):
        rows = _rotated_back(grad, cos_BTd, sin_BTd).flatten(0, 2), x.flatten(0, 2), _rstd(x, epsilon).flatten(0, 2)
        grad_Rd, grad_scale_d = slopes(*rows, scale_d)
        parts.insert(0, grad_Rd.view(grad.shape).to(v.dtype))
        scales.insert(0, grad_scale_d.to(scale_d.dtype))
    return torch.cat(parts, dim=1).transpose(1, 2).contiguous(), scales[0], scales[1]


def _heads_of(x_BTE: Tensor, heads: int, key_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, heads, T, d]."""
    x_BTHd = x_BTE.unflatten(-1, (heads + 2 * key_heads, -1))
    return tuple(t.transpose(1, 2) for t in x_BTHd.split([heads, key_heads, key_heads], dim=2))


def _rstd(x: Tensor, epsilon: float) -> Tensor:
    return (wide(x).square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()


def _rotated(x_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    cos, sin = _halves(cos_BTd[:, None]), _halves(sin_BTd[:, None]) * _signs(sin_BTd)
    return (_halves(x_BHTd) * cos + _halves(x_BHTd).flip(-2) * sin).flatten(-2)


def _rotated_back(grad_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    cos, sin = _halves(cos_BTd[:, None]), _halves(sin_BTd[:, None]) * _signs(sin_BTd)
    return (_halves(grad_BHTd) * cos + (_halves(grad_BHTd) * sin).flip(-2)).flatten(-2)


def _halves(x: Tensor) -> Tensor:
    """Wide, the halves of the last axis as an axis before it."""
    return wide(x).unflatten(-1, (2, x.shape[-1] // 2))


def _signs(like: Tensor) -> Tensor:
    """Of the sine in the two halves: the first has the second taken off, the second has the first added."""
    return (torch.arange(2, device=like.device) * 2 - 1)[:, None]


def _activated(gate_up_N2I: Tensor, activation: str) -> Tensor:
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=1)
    return (ACTIVATIONS[activation](wide(gate_NI))[0] * wide(up_NI)).to(gate_up_N2I.dtype)


def _activated_back(grad_NI: Tensor, gate_up_N2I: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate) * up again, and the gradients of gate and up."""
    gate_NI, up_NI = (wide(t) for t in gate_up_N2I.chunk(2, dim=1))
    wide_NI, (act_NI, slope_NI) = wide(grad_NI), ACTIVATIONS[activation](gate_NI)
    found = act_NI * up_NI, wide_NI * up_NI * slope_NI, wide_NI * act_NI
    return found[0].to(grad_NI.dtype), found[1].to(grad_NI.dtype), found[2].to(grad_NI.dtype)
