"""Causal attention and its gradients by the matrix unit, for a training or a teacher in bfloat16 (`attention.cpp`)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.models import amx

LONGEST = 1024
"""Tokens of a sequence up to which its probabilities, three times in bfloat16, fit the caches of a processor."""


class _Shape(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "length", "width")),
                ("scale", ctypes.c_float))  # fmt: skip


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` can be asked: queries [B, heads, T, d] that attend to as many keys, everything in bfloat16."""
    return (
        all(t.dtype == torch.bfloat16 and t.stride(-1) == 1 for t in (query, key, value))
        and 1 < query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[3] == value.shape[3]
        and query.shape[3] % 32 == 0
        and amx.usable(query.device)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ key.T) @ value, each query over the keys up to its own, [B, T, heads, d] in bfloat16.

    Only where `usable`. Sums and softmax are in float32; the gradient makes the probabilities again.

    Raises:
        MemoryError: no room for the factors in the unit's order.
    """
    return _Causal.apply(query, key, value, scale)  # pyright: ignore[reportReturnType]


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        shape = _Shape(batch, heads, key.shape[1], length, width, scale)
        mixed_BTHd = query.new_empty(batch, length, heads, width)
        log_sums_BHT = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
        parts = [_heads(t) for t in (query, key, value, mixed_BTHd.transpose(1, 2))]
        _call("limbeck_attend", shape, *parts, log_sums_BHT)
        ctx.save_for_backward(query, key, value, log_sums_BHT)
        ctx.shape = shape
        return mixed_BTHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        query, key, value, log_sums_BHT = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
        parts = [_heads(t) for t in (query, key, value)]
        back = [_heads(t) for t in (grad.transpose(1, 2), *grads)]
        _call("limbeck_attend_back", ctx.shape, *parts, log_sums_BHT, *back)
        return *grads, None


def _heads(x_BHTd: Tensor) -> _Heads:
    return _Heads(x_BHTd.data_ptr(), *x_BHTd.stride()[:3])


def _call(name: str, *parts: _Shape | _Heads | Tensor) -> None:
    told = (part.data_ptr() if isinstance(part, Tensor) else ctypes.addressof(part) for part in parts)
    if getattr(amx.library(), name)(*map(ctypes.c_void_p, told), torch.get_num_threads()):
        raise MemoryError("no room for a head's keys, values and probabilities in the order of the matrix unit")
