"""Memory and time of the stage `prompts` for many rows: `python benchmarks/prompts.py --rows 1000000`.

Each number of rows is gathered by a fresh process, whose largest resident set the operating system counts. `--format`
takes them from JSONL, CSV, Parquet or a data set, `--template` makes them of two columns, and `--collect` has a server
in another process answer them. `--alike 10000` measures something else: how long it takes to find which of so many
written prompts are too much like one before.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, islice
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


def texts(rows: int) -> Iterator[dict[str, str]]:
    """Rows of different prompts, about 300 bytes each, and one in ten a second time."""
    for n in range(rows):
        number = n if n % 10 else n // 2
        text = " ".join(WORDS[(number >> shift) % 16] for shift in range(40))
        yield {"number": str(number), "text": text, "prompt": f"Question {number}: what about {text}?"}


def write_rows(place: Path, rows: int, form: str) -> dict[str, str]:
    """Write them, a piece at a time; returns the source of the recipe."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = place / ("set" if form == "dataset" else f"rows.{form}")
    if form == "dataset":
        path.mkdir()
    if form == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in texts(rows))
    elif form == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["number", "text", "prompt"])
            writer.writeheader()
            writer.writerows(texts(rows))
    else:
        schema = pa.schema([(name, pa.string()) for name in ("number", "text", "prompt")])
        file = path / "train.parquet" if form == "dataset" else path
        with pq.ParquetWriter(file, schema) as writer:
            all_ = texts(rows)
            while some := list(islice(all_, 10_000)):
                writer.write_table(pa.Table.from_pylist(some, schema))
    return {"kind": "dataset" if form == "dataset" else "file", "path": str(path)}


def gather_rows(source: str, out: str, url: str) -> None:
    """In a process of its own: what preflight does with prompts, and the stage; with a server, collecting too."""
    from limbeck import preflight
    from limbeck.collect.collect import collect
    from limbeck.collect.prompts import gather
    from limbeck.recipe import Recipe
    from limbeck.rundir import RunDir

    teacher = (
        {"kind": "openai", "base_url": f"{url}/v1", "model": "toy", "terms": "own-model"}
        if url
        else {"model": "/nowhere"}
    )
    learning = {"signal": {"kind": "text"}, "train": {"loss": "cross_entropy"}} if url else {}
    recipe = Recipe.model_validate({
        "name": "prompts", "teacher": teacher, "prompts": [json.loads(source)], "evaluate": {"held_out": 1000},
        "collect": {"max_tokens": 64, "concurrency": 100},
        "student": {"kind": "pretrained", "model": "nowhere"} if url else {"kind": "pruned", "layers": 1}, **learning,
    })  # fmt: skip
    before = most()
    began = time.monotonic()
    problems = []
    preflight._check_prompts(recipe, problems)
    assert not problems, problems
    checked = time.monotonic()
    facts = gather(recipe, RunDir(out))
    told = {
        "prompts": facts["prompts"],
        "held_out": facts["held_out"],
        "check_seconds": round(checked - began, 1),
        "gather_seconds": round(time.monotonic() - checked, 1),
        "MiB_before": before,
        "MiB_most": most(),
    }
    if url:
        began = time.monotonic()
        told["answers"] = collect(recipe, RunDir(out))["answers"]
        told |= {"collect_seconds": round(time.monotonic() - began, 1), "MiB_most_collecting": most()}
    print(json.dumps(told))


def most() -> int:
    """The largest resident set so far, in MiB. Not that of `getrusage`, which a process takes over from its parent."""
    (told,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(told) // 1024


def find_alike(count: int, limit: float = 0.7) -> None:
    """Texts of about twenty words drawn by Zipf's law from 20,000, one in ten of them made of one before by changing a
    few words: how many are kept, and how long that takes. With up to 5,000, also by comparing each with each.
    """
    from limbeck.collect.written.likeness import Likeness, alike

    draw, words = random.Random(1), [f"w{rank}" for rank in range(20_000)]
    sums = list(accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    made: list[list[str]] = []
    for _ in range(count):
        if made and draw.random() < 0.1:
            text = list(draw.choice(made))
            for _ in range(draw.randrange(1, 6)):
                text[draw.randrange(len(text))] = draw.choice(words)
        else:
            text = draw.choices(words, cum_weights=sums, k=max(4, int(draw.lognormvariate(2.9, 0.5))))
        made.append(text)
    began, found = time.monotonic(), Likeness(limit)
    for text in made:
        if not found.near(text):
            found.add(text)
    told = {"texts": count, "kept": len(found), "seconds": round(time.monotonic() - began, 2), "MiB_most": most()}
    if count <= 5000:
        began, kept = time.monotonic(), list[list[str]]()
        for text in made:
            if not any(alike(text, other, limit) for other in kept):
                kept.append(text)
        assert len(kept) == len(found)
        told["seconds_each_with_each"] = round(time.monotonic() - began, 2)
    print(json.dumps(told))


def measure(rows: int, form: str, *, template: bool, collecting: bool) -> None:
    """One line of figures, from a process of its own."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        source: dict[str, object] = dict(write_rows(Path(place), rows, form))
        if template:
            source["template"] = {"prompt": "Question {{ number }}: what about {{ text }}?"}
        url = ""
        if collecting:
            from limbeck.testing import Server, Settings

            url = stack.enter_context(Server(Settings(words=12))).url
        command = [sys.executable, __file__, "--inside", json.dumps(source), place, url]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(json.dumps({"rows": rows, "format": form, "template": template} | json.loads(done.stdout)))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    asked.add_argument("--format", choices=["jsonl", "csv", "parquet", "dataset"], default="jsonl")
    asked.add_argument("--template", action="store_true")
    asked.add_argument("--collect", action="store_true")
    asked.add_argument("--alike", type=int, nargs="+")
    asked.add_argument("--inside", nargs=3, metavar=("SOURCE", "RUN", "URL"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.inside:
        gather_rows(*options.inside)
        return
    for count in options.alike or ():
        find_alike(count)
    for rows in options.rows if not options.alike else ():
        measure(rows, options.format, template=options.template, collecting=options.collect)


if __name__ == "__main__":
    main()
