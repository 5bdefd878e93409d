"""The loss's large buffers, kept from step to step while a training runs.

A chunk of logits takes 100 MB and more. Where such a block is freed after every loss, smaller ones settle in its place
before the next, which then needs another block: a process grew by 0.4 GiB more in its first twelve steps, and faulted
pages in anew in most of them. On a GPU, torch's allocator keeps blocks by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Kept = dict[tuple[str, torch.dtype, torch.device], Tensor]
_kept: _Kept | None = None


@contextmanager
def kept_buffers() -> Iterator[None]:
    """While the block runs, a buffer that was made on a CPU is kept for the next that is asked for under its name. Each
    loss's backward pass has to come before the next loss: the gradient of a head that has none yet is such a buffer.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of this shape with anything in it. Two with the same name are the same memory, while they are kept."""
    if _kept is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    key, numbers = (name, dtype, device), math.prod(shape)
    if key in _kept and _kept[key].numel() < numbers:
        del _kept[key]  # first: its place can be part of the new one's
    if key not in _kept:
        _kept[key] = torch.empty(numbers, dtype=dtype, device=device)
    return _kept[key][:numbers].view(shape)
