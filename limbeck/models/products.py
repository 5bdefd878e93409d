"""Gradients of weights from products of bfloat16, in the type of the weights, wherever a device can add them up so."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from limbeck.models import amx


def weights_gradient(dy_NO: Tensor, x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """dy.T @ x, [O, I] in `dtype`. Of bfloat16 for float32: by the matrix unit on a CPU (`amx`) or by cuBLAS in float32
    to the end; elsewhere rounded to bfloat16 before it is widened.
    """
    if dy_NO.dtype == torch.bfloat16 and dtype == torch.float32:
        if min(dy_NO.shape[1], x_NI.shape[1]) >= amx.LEAST and amx.usable(dy_NO.device):
            return amx.weight_gradient(dy_NO, x_NI)
        if adds_wide(dy_NO.device):
            return torch.mm(dy_NO.t(), x_NI, out_dtype=dtype)
    return torch.mm(dy_NO.t(), x_NI).to(dtype)


@cache
def adds_wide(device: torch.device) -> bool:
    """Whether products of bfloat16 come, or are added, to float32 without being rounded first: cuBLAS can."""
    if device.type != "cuda":
        return False
    a, total = (torch.ones(16, 16, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, beta=1, out=total)
        product = torch.mm(a, a, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool((total == 17).all() and (product == 16).all())
