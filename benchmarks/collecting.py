"""Answers a second from one endpoint: a bare aiohttp loop, limbeck's stage `collect`, and others, beside each other.

    python benchmarks/collecting.py --connections 100 --requests 6000
    python benchmarks/collecting.py --connections 500 --requests 20000 --peer-rounds 0

The server (benchmarks/answering.py) has one core, each client the others: on two cores, a client has one. With `--cores
all` clients may use the server's too. Every run is a process of its own, and they take turns. The bare loop sends the
same bytes as limbeck and reads the answers as JSON.
Of `collect` there are two figures: until every answer is journaled, and until completions.parquet is there too. Peers
are asked fewer requests and in fewer rounds, because they take long; benchmarks/peers/environment.py makes what they
live in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp
import orjson

HERE = Path(__file__).resolve().parent


class Pace(NamedTuple):
    """What one way of asking came to."""

    answers: int
    seconds: float
    processor: float
    """Seconds."""
    memory: float
    """MiB at the most."""
    journaled: float | None = None
    """Seconds until the last answer was on the disk."""


PEERS = {
    "openai_httpx": ("openai 2.30, httpx", "curator", 300),
    "openai_httpx 3": ("openai 3.57, httpx2", "distilabel", 2000),
    "openai_aiohttp": ("openai 3.57, aiohttp", "distilabel", 2000),
    "curator": ("Bespoke Curator 0.1.31", "curator", 2000),
    "distilabel": ("distilabel 1.5.3", "distilabel", 2000),
}
"""What they are called, which environment they live in, and how many requests they are asked, or as many as there are
connections."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cores", choices=["own", "all"], default="own", help="what clients may use: not the server's, or all"
    )
    parser.add_argument("--peer-rounds", type=int, default=1, help="rounds in which the others are asked too")
    parser.add_argument("--as", dest="role", choices=["bare", "collect"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        work = _bare if given.role == "bare" else _collect
        print(json.dumps(work(given.url, given.connections, given.requests)._asdict()))
        return
    _compare(given)


def _compare(given: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with _server(cores[0]) as (url, server):
        os.sched_setaffinity(0, set(cores if given.cores == "all" else cores[1:]) or set(cores))
        ours = [sys.executable, __file__, "--connections", str(given.connections), "--url", url]
        commands = {
            name: [*ours, "--requests", str(given.requests), "--as", role]
            for name, role in (("bare aiohttp", "bare"), ("limbeck collect", "collect"))
        }
        peers = _peers(url, given.connections) if given.peer_rounds else {}
        found: dict[str, list[Pace]] = {name: [] for name in [*commands, *peers]}
        for number in range(given.rounds):
            for name, command in (commands | peers if number < given.peer_rounds else commands).items():
                busy, wall = _processor(server), time.perf_counter()
                pace = _run(command)
                load = (_processor(server) - busy) / pace.seconds
                found[name].append(pace)
                print(f"{name}: {pace}, server busy {load:.0%}, {time.perf_counter() - wall:.0f} s", flush=True)
    _tell(found, given)


def _tell(found: dict[str, list[Pace]], given: argparse.Namespace) -> None:
    """Medians over the rounds, as a table; ratios are medians of each round's ratio to the bare loop beside it."""
    print(f"\n{given.connections} connections, medians of {given.rounds} rounds, {given.peer_rounds} of the others")
    print("\n| | answers a second | of the bare loop | processor ms an answer | MiB |\n|---|---|---|---|---|")
    bare = [pace.answers / pace.seconds for pace in found["bare aiohttp"]]
    for name, paces in found.items():
        rows = [(name, [pace.answers / pace.seconds for pace in paces])]
        if paces[0].journaled:
            rows.insert(0, (f"{name}, journaled", [p.answers / p.journaled for p in paces if p.journaled]))
        for label, rates in rows:
            share = statistics.median(rate / base for rate, base in zip(rates, bare, strict=False))
            spent = statistics.median(1000 * pace.processor / pace.answers for pace in paces)
            memory = statistics.median(pace.memory for pace in paces)
            print(f"| {label} | {statistics.median(rates):,.0f} | {share:.2f} | {spent:.2f} | {memory:.0f} |")


@contextmanager
def _server(core: int) -> Iterator[tuple[str, int]]:
    command = [sys.executable, str(HERE / "answering.py"), "--core", str(core)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.kill()


def _peers(url: str, connections: int) -> dict[str, list[str]]:
    sys.path.insert(0, str(HERE / "peers"))
    from environment import make  # type: ignore[import-not-found]

    commands = {}
    for key, (name, environment, asked) in PEERS.items():
        script = [str(HERE / "peers" / "collecting_peers.py"), key.partition(" ")[0], url]
        python = [str(make(environment)), "-W", "ignore"]
        commands[name] = [*python, *script, str(connections), str(max(connections, asked))]
    return commands


def _run(command: Sequence[str]) -> Pace:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Pace(**json.loads(done.stdout.splitlines()[-1]))


def _processor(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _collect(url: str, connections: int, requests: int) -> Pace:
    import genai_prices  # noqa: F401 - imports are in nobody's figures

    import limbeck.collect.endpoints.stage  # noqa: F401
    from limbeck.collect.collect import collect
    from limbeck.collect.prompts import gather
    from limbeck.progress import Progress
    from limbeck.recipe import Recipe
    from limbeck.rundir import RunDir

    last = 0.0

    class Clock(Progress):
        """A progress that nobody sees, and that knows when the last answer was journaled."""

        @contextmanager
        def line(self, name: str, total: float | None, unit: str) -> Iterator[Clock]:
            yield self

        def advance(self, units: float = 1) -> None:
            nonlocal last
            last = time.perf_counter()

        def note(self, text: str) -> None: ...

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        rows = ({"prompt": f"What is {n} and {n + 1}?"} for n in range(requests))
        (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = Recipe.model_validate(_recipe(url, root / "prompts.jsonl", connections))
        (root / "run").mkdir()
        run = RunDir(root / "run", progress=Clock(None))
        gather(recipe, run)
        wall, processor = time.perf_counter(), time.process_time()
        answers = collect(recipe, run)["answers"]
        seconds, processor = time.perf_counter() - wall, time.process_time() - processor
    assert isinstance(answers, int)
    return Pace(answers, seconds, processor, _memory(), last - wall)


def _recipe(url: str, prompts: Path, connections: int) -> dict[str, object]:
    return {
        "name": "collecting",
        "teacher": {"kind": "openai", "base_url": f"{url}/v1", "model": "toy", "terms": "own-model"},
        "prompts": [{"kind": "file", "path": str(prompts)}],
        "collect": {"max_tokens": 1024, "concurrency": connections},
        "student": {"kind": "pretrained", "model": "none"},
        "signal": {"kind": "text"},
        "train": {"loss": "cross_entropy"},
    }


def _bare(url: str, connections: int, requests: int) -> Pace:
    """As many workers as connections, nothing kept."""
    bodies = [
        orjson.dumps(
            {
                "model": "toy",
                "messages": [{"role": "user", "content": f"What is {n} and {n + 1}?"}],
                "max_tokens": 1024,
                "temperature": 0.7,
                "seed": n,
            }
        )
        for n in range(requests)
    ]
    answers = 0

    async def ask() -> None:
        waiting, address = iter(bodies), f"{url}/v1/chat/completions"
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), headers=headers) as session:

            async def work() -> None:
                nonlocal answers
                for body in waiting:
                    async with session.post(address, data=body) as response:
                        answers += "choices" in orjson.loads(await response.read())

            await asyncio.gather(*(work() for _ in range(connections)))

    wall, processor = time.perf_counter(), time.process_time()
    asyncio.run(ask())
    return Pace(answers, time.perf_counter() - wall, time.process_time() - processor, _memory())


if __name__ == "__main__":
    main()
