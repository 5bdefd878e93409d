"""What the measurements share: the machine in words, runs in processes of their own, medians, and tables.

Standard library only, so that it works in limbeck's environment and in the peers', and so that the process which starts
the runs stays small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / ".peers"

Result = dict[str, object]
"""What a run hands back, as JSON."""

_VERSIONS = "import json, sys; from importlib import metadata as m; print(json.dumps({n: m.version(n) for n in %r}))"


def add_peers(parser: argparse.ArgumentParser) -> None:
    """The option that says where the peers' environment lies."""
    parser.add_argument(
        "--peers", type=Path, default=PEERS, help="environment of the peers (made by peers/environment.py)"
    )


def peers_python(directory: Path) -> Path:
    """The interpreter of the peers' environment; ends the process with 2 where there is none."""
    python = directory / "bin" / "python"
    if not python.exists():
        at = "" if directory == PEERS else f" --at {directory}"
        print(f"{python}: no such file; make it with python benchmarks/peers/environment.py{at}", file=sys.stderr)
        sys.exit(2)
    return python


def child_environment() -> dict[str, str]:
    """Ours, with this checkout and benchmarks/ on the path, and without any hub."""
    path = os.pathsep.join([str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


class Run(NamedTuple):
    """One case: what it is called, and the command that runs it, to which `--result FILE` is added."""

    name: str
    command: tuple[str, ...]


def run_one(run: Run, logs: Path, number: int) -> Result | None:
    """Runs it in a process of its own. None if it failed; then its output's end is shown, and all is in the log."""
    logs.mkdir(parents=True, exist_ok=True)
    stem = logs / f"{run.name.replace(' ', '-')}-{number}"
    result, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    result.unlink(missing_ok=True)
    print(f"{run.name}, run {number + 1} ...", file=sys.stderr, flush=True)
    with open(log, "w", encoding="utf-8") as file:
        command = [*run.command, "--result", str(result)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=child_environment(), check=False)
    if done.returncode != 0 or not result.is_file():
        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        print(f"{run.name}: exit {done.returncode}, see {log}", *end, sep="\n  ", file=sys.stderr)
        return None
    return json.loads(result.read_text(encoding="utf-8"))


def alternate(runs: Sequence[Run], rounds: int, logs: Path) -> dict[str, list[Result]]:
    """Every run once, then every run again, so that a slow spell of the machine meets all of them."""
    results: dict[str, list[Result]] = {run.name: [] for run in runs}
    for number in range(rounds):
        for run in runs:
            result = run_one(run, logs, number)
            if result is not None:
                results[run.name].append(result)
    return results


def write_result(path: Path, result: Result) -> None:
    """A run's last act: its figures, with its own peak memory."""
    path.write_text(json.dumps(result | {"peak_bytes": peak_bytes()}), encoding="utf-8")


def peak_bytes() -> int:
    """The greatest resident memory of this process so far.

    Linux says it as VmHWM. ru_maxrss is the fallback: a process begins there with the peak of the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def median(results: Sequence[Result], key: str) -> float:
    """The median of a figure over runs."""
    return statistics.median(float(str(r[key])) for r in results)


def spread(results: Sequence[Result], key: str) -> str:
    """The least and the greatest of a figure over runs."""
    values = [float(str(r[key])) for r in results]
    return f"{min(values):,.0f} to {max(values):,.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(peers: Path | None = None) -> dict[str, str]:
    """The machine in words, and the versions on both sides."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    bf16 = "AMX, a matrix unit" if "amx_bf16" in flags else "AVX-512, no matrix unit" if "avx512_bf16" in flags else ""
    words = {
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": str(cores),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "bf16": bf16 or "no instruction of x86 for it",
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's default"),
        "limbeck's side": _versions(Path(sys.executable), ("torch", "transformers", "accelerate")),
    }
    if peers is not None:
        names = ("torch", "transformers", "accelerate", "trl", "liger-kernel")
        words["the peers' side"] = _versions(peers, names)
    return words


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions(python: Path, names: tuple[str, ...]) -> str:
    done = subprocess.run([python, "-c", _VERSIONS % (names,)], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {version}" for name, version in json.loads(done.stdout).items())


def write_report(out: Path, name: str, markdown: str, data: Result) -> None:
    """Prints the markdown, and writes it and the JSON to OUT."""
    (out / f"{name}.md").write_text(markdown + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(markdown)


def say_machine(words: dict[str, str]) -> str:
    """The machine as markdown."""
    return "\n".join(f"- {key}: {value}" for key, value in words.items())
