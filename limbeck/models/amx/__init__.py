"""Weights' gradients and causal attention by the matrix unit of Intel's processors (AMX), where there is one.

oneDNN, by which torch multiplies, computes dy.T @ x at half the rate of its other products and rounds it to bfloat16.
`weight_gradient.cpp` computes it faster and leaves it in float32; `attention.cpp` attends in the caches of a core. Both
are compiled once on a machine, by a C++ compiler that is there, and kept in the cache; without a compiler, the
unit, or OpenMP, and with `LIMBECK_COMPILE=0`, torch's products are used. Compiling takes some seconds, so it waits for
a training that gains more than that.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.models.cache import cached
from limbeck.models.compiling import SWITCH, missing
from limbeck.models.processor import instructions

WORTH = 1 << 15
"""Tokens of a training from which compiling for seconds is worth it: half a minute's on two cores."""
LEAST = 64
"""Below so many rows or columns of a gradient, torch's product is as fast."""

_NEEDED = ("amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16")
_FLAGS = (
    "-O3", "-std=c++17", "-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16",
    "-fopenmp", "-fPIC",
)  # fmt: skip
_SOURCES = ("tiles.h", "weight_gradient.cpp", "attention.cpp")
_NAME = "kernels.so"
_PATIENCE = 120
"""Seconds that a compiler is waited for; it takes two or three."""
_log = logging.getLogger(__name__)
_wanted = False


@contextmanager
def for_training(tokens: int) -> Iterator[None]:
    """While the block runs, `usable` is true where it can be, if learning from, or reading, so many tokens is worth
    it.
    """
    global _wanted
    before, _wanted = _wanted, tokens >= WORTH or os.environ.get(SWITCH) == "1"
    try:
        yield
    finally:
        _wanted = before


def lacking() -> str | None:
    """What keeps the unit from being used here; None if nothing does, as far as one can see without compiling."""
    if platform.system() != "Linux" or not set(_NEEDED) <= instructions():
        return "no matrix unit (AMX)"
    if not torch.backends.openmp.is_available():
        return "torch without OpenMP"
    return missing("cpu")


def usable(device: torch.device) -> bool:
    """Whether the unit is used on `device`. Compiles at the first call that could be true."""
    return _wanted and device.type == "cpu" and _library() is not None


def weight_gradient(dy_NO: Tensor, x_NI: Tensor, out_OI: Tensor | None = None, *, add: bool = False) -> Tensor:
    """dy.T @ x, [O, I] in float32, of two matrices in bfloat16; into `out_OI`, or added to it. Only where `usable`.

    Products of pairs are exact, sums are in float32: over 512 of N at a time in the unit's order, which flushes
    denormals to zero.

    Raises:
        MemoryError: no room for the factors in the unit's order.
    """
    assert dy_NO.dtype == x_NI.dtype == torch.bfloat16
    assert len(dy_NO) == len(x_NI)
    (n, o), i = dy_NO.shape, x_NI.shape[1]
    if out_OI is None:
        out_OI, add = torch.empty(o, i), False
    assert out_OI.shape == (o, i)
    assert out_OI.dtype == torch.float32
    assert out_OI.stride(1) == 1
    if n == 0:
        return out_OI if add else out_OI.zero_()
    dy_NO, x_NI = (t if t.stride(1) == 1 else t.contiguous() for t in (dy_NO, x_NI))
    left, right, to = ((t.data_ptr(), t.stride(0)) for t in (dy_NO, x_NI, out_OI))
    if library().limbeck_weight_gradient(o, i, n, *left, *right, *to, add, torch.get_num_threads()):
        raise MemoryError(f"no room for {n} rows of {o} and {i} numbers in the order of the matrix unit")
    return out_OI


def library() -> ctypes.CDLL:
    """The compiled kernels, where `usable`."""
    found = _library()
    assert found is not None
    return found


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, tried once; None where it cannot be had, with one warning if that is unexpected."""
    if lacking() is not None:
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (LimbeckError, OSError, RuntimeError, subprocess.SubprocessError) as error:  # runtime: no home directory
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        if isinstance(error, subprocess.TimeoutExpired):
            said = f"the compiler timed out after {error.timeout} seconds"
        _log.warning("the matrix unit is done without (%s=0 does not try): %s", SWITCH, " ".join(said.split())[:300])
        return None
    number, matrix = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_int64)
    library.limbeck_weight_gradient.argtypes = [*[number] * 3, *matrix * 3, ctypes.c_int, ctypes.c_int]
    return None if library.limbeck_ask_for_amx() else library  # an older kernel, or one told not to


def _compiled() -> Path:
    compiler = next(
        found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))
    )
    place = files("limbeck.models.amx")
    sources = {name: place.joinpath(name).read_bytes() for name in _SOURCES}
    parts = [*sources.values(), " ".join(_FLAGS).encode(), compiler.encode()]
    made_of = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def build(directory: Path) -> None:
        for name, source in sources.items():
            (directory / name).write_bytes(source)
        command = [compiler, *_FLAGS, "-shared", *(name for name in _SOURCES if name.endswith(".cpp")), "-o", _NAME]
        subprocess.run(
            command, cwd=directory, check=True, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )

    return cached(f"kernels/{made_of}", build).path / _NAME
