"""Functions of tensors as kernels of their own, by `torch.compile` (inductor; Triton on a GPU, C++ on a CPU).

A chain of eager kernels writes every intermediate to memory and reads it back; compiled, it is one or two kernels that
keep them in registers. Nothing needs it: `LIMBECK_COMPILE=0` turns it off. A function that cannot be compiled, or not
once more for yet another type or flag, is run as it stands, with one warning: in more memory and time.

On a CPU compiling takes ten to forty seconds of a training, so it is done where a training is long enough to gain more
than that, and always with `LIMBECK_COMPILE=1`.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SWITCH = "LIMBECK_COMPILE"
"""Environment variable: 0 keeps to the eager kernels; 1 compiles for a CPU however short the training is."""
LONG = 1 << 19
"""Tokens of a training from which compiling for a CPU gains more than it takes: it saves about a quarter of a
millisecond a token of a model of 85 million parameters on two cores."""

_log = logging.getLogger(__name__)
_on_cpu = False


def missing(device: str = "cuda") -> str | None:
    """What keeps kernels from being compiled for such a device ("cuda", "cpu") here; None if nothing does."""
    said = os.environ.get(SWITCH) or "1"
    if said != "1":
        return f"switched off by {SWITCH}={said}" + ("" if said == "0" else ", which is neither 0 nor 1")
    if device == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    names = (os.environ.get("CC"), "gcc", "clang") if device == "cuda" else (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        return "no C compiler, which triton needs" if device == "cuda" else "no C++ compiler (g++ or clang++)"
    return None


@cache
def _found(device: str) -> str | None:
    return missing(device)


@contextmanager
def on_cpu(tokens: int) -> Iterator[None]:
    """While the block runs, functions of tensors on a CPU are compiled too, if a training on so many tokens is worth
    it.
    """
    global _on_cpu
    before, _on_cpu = _on_cpu, tokens >= LONG or os.environ.get(SWITCH) == "1"
    try:
        yield
    finally:
        _on_cpu = before


def usable(device: torch.device) -> bool:
    """Whether functions of tensors on `device` are compiled. What there is to compile with is settled once for a
    process.
    """
    if device.type == "cpu":
        return _on_cpu and _found("cpu") is None
    return device.type == "cuda" and _found("cuda") is None


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call for each type, width and flag; itself from where compiling fails."""
    import torch
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    fast = torch.compile(function, fullgraph=True)
    failed = False

    def call(*args: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                # What the compiler says of itself is nothing that a user can act on. Autocast, which changes nothing in
                # these functions, would have each of them compiled once more.
                with warnings.catch_warnings(), torch.autocast(args[0].device.type, enabled=False):
                    warnings.simplefilter("ignore")
                    return fast(*args)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                failed = True
                said = " ".join(str(error).split())[:300]
                _log.warning("torch.compile failed and is done without (%s=0 does not try): %s", SWITCH, said)
        return function(*args)

    return call


def any_rows(matrix: Tensor) -> Tensor:
    """The same tensor; how many rows it has is not compiled in."""
    return any_size(matrix, 0)


def any_size(tensor: Tensor, *axes: int) -> Tensor:
    """The same tensor; how long those axes are is not compiled in."""
    import torch

    torch._dynamo.maybe_mark_dynamic(tensor, axes)
    return tensor


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 as it is: what compiled functions compute in."""
    import torch

    return x if x.dtype == torch.float64 else x.float()
