"""Answers a second from one endpoint: a bare aiohttp loop, and journaled collecting, beside each other.

    python benchmarks/collecting.py --connections 100 --requests 6000
    python benchmarks/collecting.py --connections 500 --requests 20000

The test server runs in a process of its own and answers after 50 ms with 1.7 kB. The bare loop sends the same bytes and
reads the answers as JSON; collecting reads prompts, sends, journals with fsync, and writes completions.parquet. Printed
are requests a second, processor milliseconds a request, and the memory of the process at its most. The two take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import orjson

from limbeck.collect.collect import collect
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.prompts import gather
from limbeck.recipe import OpenAITeacher, Recipe
from limbeck.records import Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records

_SERVER = """
import time
from limbeck.testing import Server, Settings
with Server(Settings(delay=0.05, words=240, idempotency=False)) as server:
    print(server.url, flush=True)
    time.sleep(1e6)
"""


class Pace(NamedTuple):
    """What one way of asking came to."""

    a_second: float
    processor_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            _compare(server.stdout.readline().strip(), given.connections, given.requests, given.rounds)
        finally:
            server.kill()


def _compare(url: str, connections: int, requests: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        recipe = _recipe(url, root / "prompts.jsonl", connections, requests)
        teacher = recipe.teachers[0]
        assert isinstance(teacher, OpenAITeacher)
        endpoint = Endpoint(teacher, recipe.collect, recipe.seed)
        for number in range(rounds):
            run = RunDir(root / str(number))
            run.root.mkdir()
            gather(recipe, run)
            bodies = [endpoint.wire(endpoint.request(p, 0)) for p in read_records(run / "prompts.parquet", Prompt)]
            bare = _timed(lambda bodies=bodies: asyncio.run(_bare(endpoint.address, bodies, connections)), requests)
            ours = _timed(lambda run=run: collect(recipe, run), requests)
            print(f"{connections} connections, {requests} requests, round {number + 1} of {rounds}")
            for name, pace in (("bare aiohttp", bare), ("collect", ours)):
                print(f"  {name:<14}{pace.a_second:>8.0f} a second {pace.processor_ms:>7.2f} ms of processor a request")
            print(f"  share of bare {ours.a_second / bare.a_second:.2f}")
    print(f"memory at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, both together")


def _recipe(url: str, prompts: Path, connections: int, requests: int) -> Recipe:
    rows = ({"prompt": f"What is {n} and {n + 1}?"} for n in range(requests))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Recipe.model_validate(
        {
            "name": "collecting",
            "teacher": {"kind": "openai", "base_url": f"{url}/v1", "model": "toy", "terms": "own-model"},
            "prompts": [{"kind": "file", "path": str(prompts)}],
            "collect": {"max_tokens": 1024, "concurrency": connections},
            "student": {"kind": "pretrained", "model": "none"},
            "signal": {"kind": "text"},
            "train": {"loss": "cross_entropy"},
        }
    )


def _timed(work: Callable[[], object], requests: int) -> Pace:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Pace(requests / wall, 1000 * processor / requests)


async def _bare(address: str, bodies: Sequence[bytes], connections: int) -> None:
    """As many workers as connections, nothing kept."""
    waiting = iter(bodies)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections), headers=headers) as session:

        async def work() -> None:
            for body in waiting:
                async with session.post(address, data=body) as response:
                    orjson.loads(await response.read())

        await asyncio.gather(*(work() for _ in range(connections)))


if __name__ == "__main__":
    main()
