"""Weights in the type that products run in, and their gradients in the type of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from limbeck.models import amx

_Key = tuple[tuple[int, int], ...]
_joined: dict[tuple[_Key, torch.dtype], Tensor] | None = None


@contextmanager
def joined_once() -> Iterator[None]:
    """While the block runs, weights that are joined again have the same copy, as under autocast: several passes of one
    step then share it. Not where several processes learn, which may put other numbers into the same memory meanwhile.
    """
    global _joined
    before, _joined = _joined, None if torch.distributed.is_initialized() else {}
    try:
        yield
    finally:
        _joined = before


def joined(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parameters one under the other in `dtype`; a view where they lie so in memory already."""
    there = [p.detach() for p in parameters]
    first, rows = there[0], sum(len(p) for p in there)
    if first.dtype == dtype and one_after_the_other(there):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    key = tuple((p.data_ptr(), p._version) for p in parameters), dtype
    if _joined is not None and key in _joined:
        return _joined[key]
    whole = first.new_empty((rows, *first.shape[1:]), dtype=dtype)
    for part, p in zip(whole.split([len(p) for p in there]), there, strict=True):
        part.copy_(p)
    if _joined is not None:
        _joined[key] = whole
    return whole


def one_after_the_other(tensors: Sequence[Tensor]) -> bool:
    """Whether they are in one piece of memory, with nothing in between."""
    ends = [t.data_ptr() + t.numel() * t.element_size() for t in tensors]
    adjacent = ends[:-1] == [t.data_ptr() for t in tensors[1:]] and all(t.is_contiguous() for t in tensors)
    return adjacent and len({t.untyped_storage().data_ptr() for t in tensors}) == 1


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
