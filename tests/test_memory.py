"""`keep_memory`: what a process frees is there for its next tensors, in large pages where the kernel has any."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from limbeck import doctor

processor = import_module("limbeck.models.processor")  # by its name: the package has a function of that name

_GLIBC = """
import json, mmap, resource
import torch
from limbeck import models

def resident(key):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) << 10

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def again():
    for _ in range(20):
        torch.ones(1 << 22)

before = resident("Rss")
kept = models.keep_memory()
grown = resident("Rss") - before
torch.ones(1 << 22)
at = faults()
again()
faulted = faults() - at
with mmap.mmap(-1, 1 << 28, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as asked:
    try:
        asked.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass
    asked.write(bytes(1 << 28))
    given = resident("AnonHugePages")
held = torch.ones(1 << 26)
print(json.dumps([kept, models.keep_memory(), grown, faulted, resident("AnonHugePages"), given]))
"""


@pytest.fixture(scope="module")
def seen() -> list[int]:
    """Whether it was done, and once more; bytes by which the process grew; faults of twenty tensors of 16 MiB; bytes in
    large pages beside one of 256 MiB, and beside as much asked of the kernel by Python.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("a kernel that does not say what a process has")
    done = subprocess.run([sys.executable, "-c", _GLIBC], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    if not found[0]:
        pytest.skip("another C library than glibc")
    return found


def test_asking_for_memory_ahead_takes_none(seen: list[int]):
    assert seen[2] < 8 << 20


def test_a_freed_block_is_the_next_ones_without_a_page_fault(seen: list[int]):
    # Twenty times 16 MiB are 81,920 pages of 4 KiB, each faulted in anew where freed memory goes back to the kernel.
    assert seen[3] < 2_000


def test_it_may_be_asked_for_twice(seen: list[int]):
    assert seen[1]


def test_tensors_are_in_large_pages_where_the_kernel_has_them(seen: list[int]):
    if seen[5] < 1 << 27 or processor.counted():
        pytest.skip("this kernel has no large pages, or none to give")
    assert seen[4] >= 64 << 20


_LIMITED = """
import json, resource, sys
from importlib import import_module
processor = import_module("limbeck.models.processor")

def addresses():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmSize")) << 10

kind = getattr(resource, sys.argv[1])
resource.setrlimit(kind, (1 << 40, resource.getrlimit(kind)[1]))
before = addresses()
print(json.dumps([processor.keep_memory(), addresses() - before]))
"""


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_where_addresses_are_limited_none_are_taken_ahead(limit: str):
    """They are for weights that are mapped, and for the stacks of threads, too."""
    if not Path("/proc/self/status").exists():
        pytest.skip("a system that does not say what a process has")
    done = subprocess.run([sys.executable, "-c", _LIMITED, limit], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, taken = json.loads(done.stdout)
    if not kept:
        pytest.skip("another C library than glibc")
    assert taken < 64 << 20


@pytest.mark.parametrize(("said", "expected"), [("0", False), ("1", False), ("2", True)])
def test_where_the_kernel_promises_no_more_than_it_has_addresses_are_counted(
    tmp_path, monkeypatch, said: str, expected: bool
):
    monkeypatch.setattr(processor.resource, "getrlimit", lambda _: (processor.resource.RLIM_INFINITY,) * 2)
    (tmp_path / "overcommit").write_text(f"{said}\n", encoding="ascii")
    monkeypatch.setattr(processor, "_OVERCOMMIT", tmp_path / "overcommit")
    assert processor.counted() == expected
    (tmp_path / "enabled").write_text("always [madvise] never\n", encoding="ascii")
    monkeypatch.setattr(processor, "_LARGE_PAGES", tmp_path / "enabled")
    found = {finding.name: finding for finding in doctor.examine()}["large pages"]
    assert found.value.startswith("not used") == bool(found.remedy) == expected


@pytest.mark.parametrize(
    ("said", "mode", "told", "remedy"),
    [
        ("always [madvise] never\n", "madvise", "used by training (madvise)", False),
        ("[always] madvise never\n", "always", "used by training (always)", False),
        ("always madvise [never]\n", "never", "switched off in the kernel (never)", True),
    ],
)
def test_the_doctor_says_whether_large_pages_are_used(
    tmp_path, monkeypatch, said: str, mode: str, told: str, remedy: bool
):
    (tmp_path / "enabled").write_text(said, encoding="ascii")
    monkeypatch.setattr(processor, "_LARGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(processor, "counted", lambda: False)
    assert processor.large_pages() == mode
    found = {finding.name: finding for finding in doctor.examine()}["large pages"]
    assert found.value == told
    assert bool(found.remedy) == remedy


def test_a_kernel_without_large_pages_is_not_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "_LARGE_PAGES", tmp_path / "enabled")
    assert processor.large_pages() is None
    assert "large pages" not in {finding.name for finding in doctor.examine()}
