"""Memory and time of the stage `prompts` for many rows: `python benchmarks/prompts.py --rows 1000000`.

Each number of rows is gathered by a fresh process, whose largest resident set the operating system counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "still",
    "mash",
    "wort",
    "copper",
    "vapour",
    "cut",
    "heart",
    "tail",
    "proof",
    "column",
    "reflux",
    "condenser",
    "grain",
    "yeast",
    "barrel",
    "angel",
]


def write_rows(path: Path, rows: int) -> None:
    """Rows of different prompts, about 300 bytes each, and one in ten a second time."""
    with open(path, "w", encoding="utf-8") as file:
        for n in range(rows):
            number = n if n % 10 else n // 2
            text = " ".join(WORDS[(number >> shift) % 16] for shift in range(40))
            file.write(json.dumps({"prompt": f"Question {number}: what about {text}?"}) + "\n")


def gather_rows(path: str, out: str) -> None:
    """In a process of its own: what preflight does with prompts, and the stage."""
    from limbeck import preflight
    from limbeck.collect.prompts import gather
    from limbeck.recipe import Recipe
    from limbeck.rundir import RunDir

    recipe = Recipe.model_validate({
        "name": "prompts", "teacher": {"model": "/nowhere"}, "student": {"kind": "pruned", "layers": 1},
        "prompts": [{"kind": "file", "path": path}], "evaluate": {"held_out": 1000},
    })  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    preflight._check_prompts(recipe, [])
    checked = time.monotonic()
    facts = gather(recipe, RunDir(out))
    told = {
        "prompts": facts["prompts"],
        "held_out": facts["held_out"],
        "check_seconds": round(checked - began, 1),
        "gather_seconds": round(time.monotonic() - checked, 1),
        "MiB_before": before // 1024,
        "MiB_most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(told))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    asked.add_argument("--inside", nargs=2, metavar=("FILE", "RUN"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.inside:
        gather_rows(*options.inside)
        return
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "rows.jsonl"
            write_rows(path, rows)
            command = [sys.executable, __file__, "--inside", str(path), place]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(json.dumps({"rows": rows, "file_MB": path.stat().st_size // 10**6} | json.loads(done.stdout)))


if __name__ == "__main__":
    main()
