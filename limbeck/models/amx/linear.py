"""Linear layers whose weights' gradients are computed by the matrix unit, in a training under bfloat16 autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from limbeck.models import amx
from limbeck.models.products import joined


@contextmanager
def float32_gradients(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, linear layers of `model` that learn have their weights' gradients from `amx`, if usable.

    What they compute forward, and for their inputs, is what autocast computes. Their weights' gradients are no longer
    rounded to bfloat16 before they become float32.
    """
    replaced: list[nn.Linear] = []
    try:
        for module in model.modules() if amx.usable(model.device) else ():
            if type(module) is nn.Linear and _fitting(module) and "forward" not in vars(module):
                # Bound to the module, so that a copy's computes with the copy's weights.
                module.forward = MethodType(_forward, module)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _fitting(module: nn.Linear) -> bool:
    weight = module.weight
    return weight.requires_grad and weight.dtype == torch.float32 and min(weight.shape) >= amx.LEAST


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    # The weight is asked for anew in every pass: where weights are divided among processes, it is another then.
    narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not narrow or not torch.is_grad_enabled() or not module.weight.requires_grad:
        return nn.Linear.forward(module, x)
    return _Linear.apply(x, module.weight, module.bias)  # pyright: ignore[reportReturnType]


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias in bfloat16, [..., O]; keeps x and the weight as they were rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.types = x.dtype, None if bias_O is None else bias_O.dtype
        x, narrow_OI = x.detach().to(torch.bfloat16), joined([weight_OI], torch.bfloat16)
        ctx.save_for_backward(x, narrow_OI)
        with torch.autocast("cpu", enabled=False):
            bias_O = None if bias_O is None else bias_O.detach().to(torch.bfloat16)
            return nn.functional.linear(x, narrow_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, narrow_OI = ctx.saved_tensors
        x_type, bias_type = ctx.types
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = (grad_NO @ narrow_OI).view(x.shape).to(x_type) if ctx.needs_input_grad[0] else None
        grad_weight_OI = amx.weight_gradient(grad_NO, x_NI) if ctx.needs_input_grad[1] else None
        grad_bias_O = grad_NO.sum(dim=0, dtype=bias_type) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight_OI, grad_bias_O
