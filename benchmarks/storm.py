"""A storm of 429s that halves the allowed rate twice: `python benchmarks/storm.py`.

limbeck's test server lets 400, then 200, then 100 requests a second pass (`--rate` sets the first), each for
`--seconds`, and refuses the rest with 429 and without a word on when to come back. Printed are the answers a second in
the second half of each stretch beside what was allowed, how many were refused, and whether every prompt has its answer,
once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from limbeck.collect.collect import collect
from limbeck.collect.prompts import gather
from limbeck.recipe import Recipe
from limbeck.records import Completion
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.testing import Faults, Limit, Server, Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=400, help="requests a second at first")
    parser.add_argument("--seconds", type=float, default=8, help="of each of the three stretches")
    parser.add_argument("--connections", type=int, default=100)
    given = parser.parse_args()
    rates = [given.rate, given.rate / 2, given.rate / 4]
    limits = tuple(
        Limit(after=n * given.seconds, requests_per_minute=int(60 * rate), burst=0.1, headers=False)
        for n, rate in enumerate(rates)
    )
    asked = int(sum(rates) * given.seconds)
    with (
        tempfile.TemporaryDirectory() as place,
        Server(Settings(words=240, delay=0.05), Faults(limits=limits)) as server,
    ):
        began = time.time() - server.service.now
        run = RunDir(Path(place) / "run")
        run.root.mkdir()
        recipe = _recipe(server.url, Path(place) / "prompts.jsonl", asked, given.connections)
        gather(recipe, run)
        collect(recipe, run)
        answered = [completion.prompt_id for completion in read_records(run / "completions.parquet", Completion)]
        times = [charge.time - began for charge in server.bill.charges]
        print(f"{asked} prompts, {len(answered)} answers to {len(set(answered))}, billed {server.bill.requests},"
              f" refused {server.bill.outcomes['429']}")  # fmt: skip
    for n, rate in enumerate(rates):
        first, last = (n + 0.5) * given.seconds, min((n + 1) * given.seconds, max(times))
        settled = sum(first <= at < last for at in times) / (last - first)
        print(f"allowed {rate:.0f} a second: settled at {settled:.1f} ({settled / rate - 1:+.1%})")


def _recipe(url: str, prompts: Path, asked: int, connections: int) -> Recipe:
    rows = ({"prompt": f"What is {n} and {n + 1}?"} for n in range(asked))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    teacher = {"kind": "openai", "base_url": f"{url}/v1", "model": "toy", "terms": "own-model", "attempts": 20}
    return Recipe.model_validate(
        {
            "name": "storm",
            "teacher": teacher,
            "prompts": [{"kind": "file", "path": str(prompts)}],
            "collect": {"max_tokens": 1024, "concurrency": connections},
            "student": {"kind": "pretrained", "model": "none"},
            "signal": {"kind": "text"},
            "train": {"loss": "cross_entropy"},
        }
    )


if __name__ == "__main__":
    main()
