"""The product in the middle of a gated MLP, act(gate) * up, as one kernel forward and one backward.

Eager kernels keep the gate's activation beside gate and up for the gradient, and pass over it five times; compiled, the
activation is computed again in registers. Used where functions are compiled (`compiling`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from limbeck.models.compiling import any_rows, compiled, usable, wide

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What the classes of transformers call the parts of a gated MLP."""


@contextmanager
def fused_gates(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, the gated MLPs of `model` multiply by `_Gate`, where functions are compiled for its device.

    Only modules that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)), with SiLU or GELU's tanh form.
    """
    replaced: list[nn.Module] = []
    try:
        for module in model.modules() if usable(model.device) else ():
            # One that has a forward of its own already has somebody's hook before it, or is of a block around this one.
            if "forward" not in vars(module) and (activation := gate_of(module)) is not None:
                # Bound to the module, so that a copy's computes with the copy's weights.
                module.forward = MethodType(_forward_of(activation), module)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


@contextmanager
def learning(module: nn.Module) -> Iterator[None]:
    """While the block runs, the module and all in it are in training mode."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def gate_of(module: nn.Module) -> str | None:
    """Which activation a gated MLP has, "silu" or "gelu_tanh"; None for every other module.

    Found by trying: activation and module are compared with the formulas on random numbers.
    """
    parts = [part for name in _PARTS if isinstance(part := getattr(module, name, None), nn.Module)]
    if len(parts) < len(_PARTS):
        return None
    gate_proj, up_proj, down_proj, act_fn = parts
    weight = getattr(gate_proj, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    g_N = torch.linspace(-8, 8, 65, device=weight.device)
    # As it learns: one that drops out some of what it computes then is another module.
    with torch.autocast(weight.device.type, enabled=False), learning(module):
        name = next((n for n, act in ACTIVATIONS.items() if torch.allclose(act_fn(g_N), act(g_N)[0], atol=1e-6)), None)
        if name is None:
            return None
        expected = down_proj(act_fn(gate_proj(x_BTD)) * up_proj(x_BTD))
        least = 1e-3 * float(expected.abs().max())  # a small model's numbers are small
        return name if torch.allclose(module(x_BTD), expected, rtol=1e-2, atol=least) else None


def _forward_of(activation: str) -> Callable[..., Tensor]:
    def forward(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x), activation))

    return forward


class _Gate(torch.autograd.Function):
    """act(gate) * up, computed in float32 and rounded once; keeps gate and up as they came."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        gate_NI, up_NI = (any_rows(t.detach().reshape(-1, t.shape[-1])) for t in (gate, up))
        return compiled(_product)(gate_NI, up_NI, activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        gate, up = ctx.saved_tensors
        grad_NI, gate_NI, up_NI = (any_rows(t.detach().reshape(-1, t.shape[-1])) for t in (grad, gate, up))
        grad_gate_NI, grad_up_NI = compiled(_product_back)(grad_NI, gate_NI, up_NI, ctx.activation)
        return grad_gate_NI.view(gate.shape), grad_up_NI.view(up.shape), None


def _product(gate_NI: Tensor, up_NI: Tensor, activation: str) -> Tensor:
    return (ACTIVATIONS[activation](wide(gate_NI))[0] * wide(up_NI)).to(gate_NI.dtype)


def _product_back(grad_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide_NI = wide(grad_NI)
    act_NI, slope_NI = ACTIVATIONS[activation](wide(gate_NI))
    return (wide_NI * wide(up_NI) * slope_NI).to(gate_NI.dtype), (wide_NI * act_NI).to(up_NI.dtype)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(x)
    return x * share, share * (1 + x * (1 - share))


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU by tanh (arXiv 1606.08415)."""
    scale, cube = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(scale * (x + cube * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * cube * x * x)


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"silu": _silu, "gelu_tanh": _gelu_tanh}
"""Value and derivative."""
