"""Fuzz both verifiers of evidence: nothing that is read may end in more than a refusal.

    python tools/fuzz_verifiers.py --minutes 10 --seed 1

Good evidence (a run of a few rows, and every proof made of it) is changed at random: bytes of any file, rows and
schemas of the databases, cells of the Parquet tables, values of entries and proofs with everything around them made to
agree, links and pipes in the place of files. Then both verifiers read it. A case fails where one of them raises what is
no refusal, ends its process, takes more than half a minute or a gigabyte, or changes a file; and where the second
refuses and the first does not. Each case has a seed of its own: `--seed S --only N` does case N again.

Needs a checkout: the evidence is made by what the tests use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
_MEMORY = 4 << 30
"""Bytes of address space; arenas of the libraries take most of it."""
_RESIDENT = 1 << 30
_SECONDS = 30


class CaseError(Exception):
    """A verifier did what it must not do."""


def work(base: Path, seed: int, first: int, last: int, until: float, only: bool) -> None:
    """Cases from `first` on. Says each before it is done, so that one that ends the process is known."""
    os.environ["LIMBECK_HOME"] = str(base / "keys")
    from faults import mutations  # pyright: ignore[reportMissingImports]

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    good = mutations.Good.read(base) if (base / "ready").exists() else mutations.Good.make(base)
    (base / "ready").touch()
    signal.signal(signal.SIGALRM, _too_long)
    case = first
    while True:
        print(f"case {case}", flush=True)
        signal.alarm(_SECONDS)
        try:
            told = one(good, mutations, base / "case", Random(f"{seed}/{case}"))
        except CaseError as error:
            print("FAILED " + json.dumps({"case": case, "why": str(error)}), flush=True)
            keep = base / f"failed-{case}"
            shutil.copytree(base / "case", keep, symlinks=True, dirs_exist_ok=True, copy_function=_copy)
        else:
            if only:
                print(told, flush=True)
        signal.alarm(0)
        case += 1
        if only or time.time() > until or case == last:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print("PEAK " + json.dumps({"cases": case - first, "MiB": peak}), flush=True)


def _copy(source: str, target: str) -> None:
    if os.path.isfile(source) and os.path.getsize(source) < 1 << 26:
        shutil.copyfile(source, target)


def _too_long(*_: object) -> None:
    raise CaseError(f"more than {_SECONDS} seconds")


def one(good, mutations, place: Path, random: Random) -> str:
    """One change, read by both."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    what = mutations.change(good, place, random)
    before = _state(place)
    first, second = _ask(what, lambda: mutations.first(place)), _ask(what, lambda: mutations.second(place))
    if _state(place) != before:
        raise CaseError(f"{what}: a file was touched")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _RESIDENT >> 10:
        raise CaseError(f"{what}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB resident")
    if second and not first:
        raise CaseError(f"{what}: the second verifier refuses ({second}), the first does not")
    return f"{what}: first {first}, second {second}"


def _ask(what: str, verifier) -> str:
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return verifier()
    except CaseError as error:
        raise CaseError(f"{what}: {error}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise CaseError(f"{what}: {traceback.format_exc()[-3000:]}") from None


def _state(place: Path) -> list[tuple[str, int, int, int]]:
    """Names, sizes, times and kinds of everything there."""
    found = []
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files, "."):
            told = os.lstat(os.path.join(folder, name))
            found.append((os.path.join(folder, name), told.st_size, told.st_mtime_ns, told.st_mode))
    return sorted(found)


def main() -> int:
    """Give the cases to a process that may die, and to another after it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=0, help="stop after so many, where the time has not come before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="do this one case and say what came of it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where evidence and failed cases stay")
    parser.add_argument("--worker", nargs=2, metavar=("FIRST", "UNTIL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.keep, given.seed, int(given.worker[0]), given.cases, float(given.worker[1]), given.only is not None)
        return 0
    base = given.keep or Path(tempfile.mkdtemp(prefix="limbeck-fuzz-"))
    base.mkdir(parents=True, exist_ok=True)
    until, case, failed, count = time.time() + 60 * given.minutes, given.only or 0, 0, 0
    while True:
        command = [
            sys.executable,
            __file__,
            "--seed",
            str(given.seed),
            "--keep",
            str(base),
            "--cases",
            str(given.cases),
        ]
        command += ["--worker", str(case), str(until), *(["--only", str(case)] if given.only is not None else [])]
        first = case
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            watch = threading.Timer(0, lambda: None)
            for line in worker.stdout or ():
                if line.startswith("case "):
                    case = int(line.split()[1])
                    watch.cancel()
                    watch = threading.Timer(2 * _SECONDS, worker.kill)  # where an alarm does not reach: within SQLite
                    watch.start()
                else:
                    failed += line.startswith("FAILED")
                    print(line, end="", flush=True)
            watch.cancel()
        count += case - first + 1
        if worker.returncode:
            failed += 1
            print(f"FAILED case {case} ended the process: {worker.returncode}", flush=True)
        case += 1
        if given.only is not None or time.time() > until or case == given.cases:
            break
    print(f"{count} cases, {failed} failed; evidence in {base}")
    if not failed and given.keep is None:
        shutil.rmtree(base)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
