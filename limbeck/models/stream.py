"""Training with what flows between the layers in bfloat16, over weights in float32.

Autocast runs matrix products in bfloat16, but the sum that runs through the layers starts from float32 embeddings and
is multiplied by float32 weights in every norm, so it, and all that is computed and kept from it, stays in float32.
Here the embeddings are rounded once where they leave their table, and each norm computes in float32 and hands on
bfloat16: what a model whose weights are bfloat16 computes, while weights, gradients and moments keep float32.

The gradient of the embeddings is added into the rows it concerns. Autograd makes a table of zeros for it, as large as
the embeddings, and adds that to the gradient of a head which shares its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from limbeck.models.compiling import any_rows, compiled, usable, wide

_EPSILONS = ("variance_epsilon", "eps")
"""Under which names the classes of transformers keep the number that is added to the mean square."""


@contextmanager
def narrow_stream(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """While the block runs, what leaves the embeddings and the norms of `model` has `dtype`; nothing happens for None.

    A norm whose class is not root mean square times weight keeps its own arithmetic, and its result is rounded.
    Gradients of all weights have the type of the weights.
    """
    if dtype is None:
        yield
        return

    def rounded(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(rounded)]
    replaced: list[nn.Module] = []
    if type(embeddings) is nn.Embedding and model.device.type == "cpu" and not torch.distributed.is_initialized():
        embeddings.forward = MethodType(_rows_of, embeddings)
        replaced.append(embeddings)
    for module in model.modules():
        if not _is_norm(module):
            continue
        epsilon = rms_epsilon(module)
        if epsilon is None:
            handles.append(module.register_forward_hook(rounded))
        else:
            # Bound to the module, so that a copy's computes with the copy's weights.
            module.forward = MethodType(_forward_of(epsilon, dtype), module)
            replaced.append(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward


def _rows_of(embeddings: nn.Embedding, tokens_BT: Tensor) -> Tensor:
    plain = embeddings.max_norm is None and not embeddings.sparse and not embeddings.scale_grad_by_freq
    if plain and embeddings.weight.requires_grad and torch.is_grad_enabled():
        return _Rows.apply(torch.empty(0, requires_grad=True), embeddings, tokens_BT)  # pyright: ignore
    return nn.Embedding.forward(embeddings, tokens_BT)


class _Rows(torch.autograd.Function):
    """Rows of a table of embeddings, [B, T, D]. Their gradient goes into the table's `grad` itself, once autograd has
    put there what a head that shares the table has; only where one process has the whole table, since others would not
    be told. `anchor` asks for a gradient in the place of the table, for which autograd would wait.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: nn.Embedding, tokens_BT: Tensor) -> Tensor:
        ctx.table, ctx.tokens_BT = table, tokens_BT
        return nn.functional.embedding(tokens_BT, table.weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # pyright: ignore
        weight_VD, tokens_N = ctx.table.weight, ctx.tokens_BT.reshape(-1)
        rows_ND = grad.reshape(len(tokens_N), -1).to(weight_VD.dtype)
        if ctx.table.padding_idx is not None:
            learned_N = tokens_N != ctx.table.padding_idx
            tokens_N, rows_ND = tokens_N[learned_N], rows_ND[learned_N]
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        weight_VD.grad.index_add_(0, tokens_N, rows_ND)
        return None, None, None


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and isinstance(getattr(module, "weight", None), nn.Parameter)


def _forward_of(epsilon: float, dtype: torch.dtype):
    # The weight is asked for anew in every pass: where weights are divided among processes, it is another tensor then.
    def forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
        return _RootMeanSquare.apply(hidden_states, module.weight, epsilon, dtype)  # pyright: ignore

    return forward


@torch.no_grad()
def rms_epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm that is x / sqrt(mean(x^2) + epsilon) * weight; None for every other module.

    Found by trying: the module's own result for random numbers, with a random weight, is compared with the formula's.
    """
    epsilon = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if epsilon is None or bias is not None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(4, len(weight), generator=generator).mul_(torch.tensor([1e-2, 1.0, 1.0, 1e2])[:, None])
    w_D = torch.randn(len(weight), generator=generator)
    with torch.autocast(weight.device.type, enabled=False):
        tried = torch.func.functional_call(module, {"weight": w_D.to(weight.device)}, (x_ND.to(weight.device),))
    expected = x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + epsilon) * w_D
    same = tried.shape == expected.shape and torch.allclose(tried.cpu().float(), expected, rtol=1e-4, atol=1e-5)
    return epsilon if same else None


class _RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, computed in float32; keeps x as it came.

    With n = x / r, r = sqrt(mean(x^2) + epsilon) and g the gradient of the result, the gradient of the weight is the
    sum of g * n over rows, and that of x is (g * weight - n * mean(g * weight * n)) / r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        if usable(x.device):
            x_ND = x.detach().reshape(-1, x.shape[-1])
            out_ND, rstd_N1 = compiled(scaled)(any_rows(x_ND), weight_D.detach(), epsilon, dtype)
            ctx.save_for_backward(x, rstd_N1, weight_D)
            return out_ND.view(x.shape)
        wide_ND = x.detach().reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        rms_N1 = torch.linalg.vector_norm(wide_ND, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd_N1 = rms_N1.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, rstd_N1, weight_D)
        return wide_ND.mul_(rstd_N1).mul_(weight_D).to(dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, rstd_N1, weight_D = ctx.saved_tensors
        width = x.shape[-1]
        if usable(x.device):
            grad_ND, x_ND = (any_rows(t.reshape(-1, width)) for t in (grad, x.detach()))
            grad_x_ND, grad_weight_D = compiled(_scaled_back)(grad_ND, x_ND, any_rows(rstd_N1), weight_D.detach())
            return grad_x_ND.view(x.shape), grad_weight_D if ctx.needs_input_grad[1] else None, None, None
        n_ND = x.reshape(-1, width).to(torch.float32, copy=True).mul_(rstd_N1)
        grad_ND = grad.reshape(-1, width).to(torch.float32, copy=True)
        both_ND = grad_ND * n_ND
        grad_weight_D = both_ND.sum(dim=0) if ctx.needs_input_grad[1] else None
        along_N1 = torch.mv(both_ND, weight_D.to(torch.float32)).div_(width)[:, None]
        grad_x_ND = grad_ND.mul_(weight_D).addcmul_(n_ND, along_N1, value=-1).mul_(rstd_N1)
        if grad_weight_D is not None:
            grad_weight_D = grad_weight_D.to(weight_D.dtype)
        return grad_x_ND.to(x.dtype).view(x.shape), grad_weight_D, None, None


def scaled(x_ND: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `_RootMeanSquare.forward` computes, as it is compiled: x / r * weight, and 1 / r as [N, 1]."""
    wide_ND = wide(x_ND)
    rstd_N1 = (wide_ND.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
    return (wide_ND * rstd_N1 * weight_D).to(dtype), rstd_N1


def slopes(grad_ND: Tensor, x_ND: Tensor, rstd_N1: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight, wide, from that of `scaled`."""
    n_ND, wide_ND = wide(x_ND) * rstd_N1, wide(grad_ND)
    by_weight_ND = wide_ND * wide(weight_D)
    along_N1 = (by_weight_ND * n_ND).mean(dim=-1, keepdim=True)
    return (by_weight_ND - n_ND * along_N1) * rstd_N1, (wide_ND * n_ND).sum(dim=0)


def _scaled_back(grad_ND: Tensor, x_ND: Tensor, rstd_N1: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """What `_RootMeanSquare.backward` computes, as it is compiled."""
    grad_x_ND, grad_weight_D = slopes(grad_ND, x_ND, rstd_N1, weight_D)
    return grad_x_ND.to(x_ND.dtype), grad_weight_D.to(weight_D.dtype)
