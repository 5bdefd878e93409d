"""What this machine computes with, and the precision that suits it."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "float32"]

_BF16 = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16", "sve_bf16")
"""Instructions that multiply bf16 numbers: on x86, and on ARM by the names the kernel gives them."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters, from glibc's malloc.h."""
_MADV_HUGEPAGE = 14
"""From Linux's mman-common.h."""
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_LEAST_AHEAD = 1 << 28
_kept = False
"""Whether `keep_memory` has done it."""


class Processor(NamedTuple):
    """What multiplies matrices here."""

    device: str
    """`cuda` or `cpu`, as torch calls it."""
    name: str
    cores: int
    """Processor cores this process may use."""
    bf16: bool
    """Whether it multiplies bf16 in hardware."""
    instructions: tuple[str, ...]
    """Those of the known bf16 instructions that the CPU has."""


@cache
def processor() -> Processor:
    """The device that torch would train on: the first CUDA device, or else the CPU."""
    import torch

    there = instructions()
    bf16_instructions = tuple(name for name in _BF16 if name in there)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        # Emulation is slower than float32, so it does not count.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Processor("cuda", torch.cuda.get_device_name(0), cores, bf16, bf16_instructions)
    name = str(_capabilities().get("cpu_name") or platform.processor() or platform.machine())
    return Processor("cpu", name, cores, bool(bf16_instructions), bf16_instructions)


def instructions() -> set[str]:
    """Everything that this CPU can do, as torch and Linux call it."""
    return {name for name, there in _capabilities().items() if there is True} | _kernel_flags()


def _capabilities() -> Mapping[str, object]:
    """What torch says of this CPU; nothing where it is too old to say."""
    import torch

    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _kernel_flags() -> set[str]:
    """CPU features as Linux lists them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    line = next((text for text in lines if text.lower().startswith(("flags", "features"))), "")
    names = {"svebf16": "sve_bf16"}
    return {names.get(word, word) for word in line.partition(":")[2].split()}


def precision_dtype(precision: Precision, device: str | None = None) -> torch.dtype:
    """The type of numbers a precision stands for on a device (None: the one `processor` names).

    `auto` is bf16 where the device multiplies it in hardware, and float32 elsewhere.
    """
    import torch

    if precision == "auto":
        here = processor()
        hardware = here.bf16 if device in (None, here.device) else bool(here.instructions)
        return torch.bfloat16 if hardware else torch.float32
    return {"bf16": torch.bfloat16, "float32": torch.float32}[precision]


def keep_memory() -> bool:
    """Let this process keep the memory of freed tensors for its next ones, in large pages; whether the C library can.

    By default glibc hands freed blocks back to the kernel and asks for them again a moment later, and every page of
    them is faulted in anew: a matrix product whose result has to be faulted in took 4.3 ms instead of 1.5. Here all
    blocks come from a heap that is never trimmed (mallopt(3): M_MMAP_MAX of 0, M_TRIM_THRESHOLD of -1), and the kernel
    is asked to give it pages of 2 MiB. It concerns everything in the process, so only stages that work on tensors call
    it.
    """
    global _kept
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  only glibc has it
    except (AttributeError, OSError, TypeError):
        return False
    if not _kept:
        _kept = bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
        if _kept:
            _ask_for_large_pages(libc)
    return _kept


def large_pages() -> str | None:
    """What this kernel says of large pages: "always", "madvise" (where they are asked for) or "never"; None where it
    knows none.
    """
    try:
        said = _LARGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return None
    return said.partition("[")[2].partition("]")[0] or None


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap by half of the machine's memory, which takes none before it is written to, and asks for large
    pages there (madvise(2): MADV_HUGEPAGE).

    Not where addresses are counted as if they were memory: under a limit of the process (setrlimit(2)), of which
    weights and threads need their part, or where the kernel promises no more than it has (vm.overcommit_memory = 2).

    Finding out where a page of 4 KiB lies takes longer than reading it, the more so in a virtual machine: 64 MiB were
    read at 9 GB/s, and at 27 in large pages; a training step took two thirds of the time on a day of slow memory. The C
    library has a setting of its own for this, but only where it is in the environment before the process starts.
    """
    if counted():
        return
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") // 2 * page
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    while (at := libc.malloc(size)) is None:  # more than the kernel promises
        size //= 2
        if size < _LEAST_AHEAD:
            return
    first = -(-at // page) * page
    libc.madvise(first, (at + size - first) // page * page, _MADV_HUGEPAGE)  # a kernel without them refuses, no harm
    libc.free(at)


def counted() -> bool:
    """Whether addresses of this process that it never wrote to are counted against a limit."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
