"""What this machine can do, and what to install for the rest. Asks no network."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)[^;]*?(?:>=([0-9.]+))?[^;]*;.*extra == ['\"]([A-Za-z0-9_-]+)['\"]")

_OWN_CACHE = "set LIMBECK_CACHE to a directory of your own"


class Package(NamedTuple):
    """A package that an extra asks for."""

    name: str
    installed: str | None
    at_least: str

    @property
    def good(self) -> bool:
        """Installed, and no older than what is asked for."""
        return self.installed is not None and _release(self.installed) >= _release(self.at_least)


class Extra(NamedTuple):
    """One extra of limbeck."""

    name: str
    packages: tuple[Package, ...]

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'limbeck[{self.name}]'"


class Finding(NamedTuple):
    """One thing about this machine; `remedy` is empty where nothing is to be done."""

    name: str
    value: str
    remedy: str = ""


def extras() -> list[Extra]:
    """The extras that the installed limbeck declares, with what is there of each."""
    try:
        declared = requires("limbeck") or []
    except PackageNotFoundError:
        declared = []
    packages: dict[str, list[Package]] = {}
    for line in declared:
        if match := _REQUIREMENT.match(line):
            name, at_least, extra = match.groups()
            packages.setdefault(extra, []).append(
                Package(name.lower().replace("_", "-"), _installed(name), at_least or "0")
            )
    return [Extra(name, tuple(found)) for name, found in packages.items()]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version up to the first part that is none (PEP 440's release segment)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def examine() -> list[Finding]:
    """Everything that decides what this machine can do."""
    return [*_software(), *_machine(), *_places(), *_extras()]


def as_text(findings: list[Finding]) -> str:
    """For a person: aligned, with what to do below what lacks."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<{width}}  {finding.value}")
        if finding.remedy:
            lines.append(f"{'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> str:
    """The findings as a JSON list."""
    return json.dumps([finding._asdict() for finding in findings], ensure_ascii=False, indent=2)


def _software() -> list[Finding]:
    from limbeck.ledger.code import code_version

    code = code_version()
    commit = f" at commit {code.commit[:12]}" if code.commit else ""
    return [
        Finding("limbeck", f"{code.limbeck}{commit}{', with uncommitted changes' if code.dirty else ''}"),
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        Finding("system", f"{platform.system()} {platform.release()}"),
    ]


def _machine() -> list[Finding]:
    return [*_processor(), Finding("memory", f"{_gib(_memory_bytes())} GiB"), *_pages()]


def _pages() -> list[Finding]:
    """Whether tensors on a CPU come to lie in large pages, which makes memory up to three times as fast."""
    from limbeck.models.processor import counted, large_pages

    said = large_pages()
    if said is None:
        return []
    if said == "madvise" and counted():
        remedy = "lift ulimit -v and -d, or set vm.overcommit_memory to 0"
        return [Finding("large pages", "not used: this process's addresses are limited", remedy)]
    on = said != "never"
    remedy = "" if on else "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    return [Finding("large pages", f"{'used by training' if on else 'switched off in the kernel'} ({said})", remedy)]


def _processor() -> list[Finding]:
    """What torch would compute on, by its own word."""
    from limbeck.models.processor import processor

    try:
        found = processor()
    except ImportError:
        name = platform.processor() or platform.machine()
        return [Finding("processor", f"{name}; torch is not installed, so nothing can be trained here")]
    instructions = f" ({', '.join(found.instructions)})" if found.instructions else ""
    return [
        Finding("processor", f"{found.device}: {found.name}"),
        Finding("cores", str(found.cores)),
        Finding(
            "bf16 in hardware",
            f"yes{instructions}" if found.bf16 else "no: precision auto computes in float32",
        ),
        *_kernels(found.device),
    ]


def _kernels(device: str) -> list[Finding]:
    """What training runs besides torch's own kernels."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    from limbeck.models import compiling

    lacking = compiling.missing(device)
    needed = "triton and a C compiler (gcc)" if device == "cuda" else "a C++ compiler (g++)"
    remedy = "" if lacking is None or compiling.SWITCH in lacking else f"install {needed}"
    always = device == "cuda" or os.environ.get(compiling.SWITCH) == "1"
    when = "" if always else f" for trainings on {compiling.LONG:,} tokens or more"
    compiled = f"torch's own kernels: {lacking}" if lacking else f"compiled (torch.compile){when}"
    found = [Finding("loss, layers" if device == "cuda" else "layers", compiled, remedy)]
    if device == "cpu":
        found.append(_unit())
    if device == "cuda":
        there = is_flash_attn_2_available()
        padded = "torch's sdpa: sequences are padded, flash-attn is not there"
        found.append(Finding("attention", "flash-attn: sequences are packed" if there else padded))
    return found


def _unit() -> Finding:
    from limbeck.models import amx

    lacking = amx.lacking()
    longer = "" if os.environ.get(amx.SWITCH) == "1" else f" for trainings on {amx.WORTH:,} tokens or more"
    return Finding(
        "attention, weights' gradients",
        f"torch's own products: {lacking}" if lacking else f"by the matrix unit (AMX){longer}",
    )


def _memory_bytes() -> int:
    """What there is, or what the container may use of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(limits)


def _places() -> list[Finding]:
    """Where models are cached, whether it can be written, and the room there and here."""
    from limbeck.models.cache import cache_root

    here = Path.cwd()
    found = [Finding("free disk here", f"{_gib(shutil.disk_usage(here).free)} GiB under {here}")]
    try:
        cache = cache_root()
    except RuntimeError as error:  # nobody's home directory is known
        return [*found, Finding("model cache", f"nowhere: {error}", _OWN_CACHE)]
    if not os.path.isdir(cache):
        why = _unwritable(cache)
        made = f"and cannot be made: {why}" if why else "can be made"
        return [*found, Finding("model cache", f"{cache}, not there yet, {made}", _OWN_CACHE if why else "")]
    try:
        kinds = sorted(path for path in cache.iterdir() if path.is_dir())
        entries = [(kind, path) for kind in kinds for path in sorted(kind.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        return [*found, Finding("model cache", f"{cache}, cannot be read: {error.strerror}", _OWN_CACHE)]
    why = next((f"{place}: {why}" for place in (cache, *kinds) if (why := _unwritable(place))), None)
    free = f"{_gib(shutil.disk_usage(cache).free)} GiB free"
    told = f"cannot be written: {why}" if why else "can be written"
    found.append(Finding("model cache", f"{cache}, {free}, {told}", _OWN_CACHE if why else ""))
    return [*found, *(Finding(f"  {kind.name}", f"{path.name}, {_size(path):,} bytes") for kind, path in entries)]


def _unwritable(directory: Path) -> str | None:
    """Why nothing can be written there, or where it would be made; None where it can. A file is tried that nobody sees
    and that is gone at once.
    """
    there = next(place for place in (directory, *directory.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _extras() -> list[Finding]:
    found = []
    for extra in extras():
        name = f"extra [{extra.name}]"
        for package in extra.packages:
            if package.installed:
                older = "" if package.good else f", needs {package.at_least} or newer"
                found.append(Finding(name, f"{package.name} {package.installed}{older}", extra.remedy if older else ""))
        if missing := ", ".join(package.name for package in extra.packages if not package.installed):
            found.append(Finding(name, f"{missing} not installed", extra.remedy))
    return found
