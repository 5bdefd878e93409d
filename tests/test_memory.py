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
import json, resource
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
held = torch.ones(1 << 26)
print(json.dumps([kept, models.keep_memory(), grown, faulted, resident("AnonHugePages")]))
"""


@pytest.fixture(scope="module")
def seen() -> list[int]:
    """Whether it was done, and once more; bytes by which the process grew; faults of twenty tensors of 16 MiB; bytes in
    large pages beside one of 256 MiB.
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
    if processor.large_pages() in (None, "never"):
        pytest.skip("this kernel has no large pages")
    # Not all: a kernel short of contiguous memory gives some.
    assert seen[4] >= 64 << 20


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
    assert processor.large_pages() == mode
    found = {finding.name: finding for finding in doctor.examine()}["large pages"]
    assert found.value == told
    assert bool(found.remedy) == remedy


def test_a_kernel_without_large_pages_is_not_spoken_of(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "_LARGE_PAGES", tmp_path / "enabled")
    assert processor.large_pages() is None
    assert "large pages" not in {finding.name for finding in doctor.examine()}
