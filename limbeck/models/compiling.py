"""Functions of tensors as kernels of their own on a GPU, by `torch.compile` (inductor, Triton).

A chain of eager kernels writes every intermediate to memory and reads it back; compiled, it is one or two kernels that
keep them in registers. Nothing needs it: `LIMBECK_COMPILE=0` turns it off. A function that cannot be compiled, or not
once more for yet another type or flag, is run as it stands, with one warning: in more memory and time.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SWITCH = "LIMBECK_COMPILE"
"""Environment variable: 0 keeps to the eager kernels."""

_log = logging.getLogger(__name__)


def missing() -> str | None:
    """What keeps kernels from being compiled for a GPU here; None if nothing does."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"switched off by {SWITCH}=0"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler, which triton needs"
    return None


@cache
def _found() -> str | None:
    return missing()


def usable(device: torch.device) -> bool:
    """Whether functions of tensors on `device` are compiled. Settled once for a process."""
    return device.type == "cuda" and _found() is None


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
                with warnings.catch_warnings():  # what the compiler says of itself is nothing that a user can act on
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
    import torch

    torch._dynamo.maybe_mark_dynamic(matrix, 0)
    return matrix
