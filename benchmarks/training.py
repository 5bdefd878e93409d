"""Speed and memory of distillation, limbeck against TRL: `python benchmarks/training.py --data FILE --out DIR`.

Every case runs in a process of its own, in its own side's environment, one after the other and then all again
(`--rounds`); the table shows medians. Teacher SmolLM2-135M-Instruct, student its first 16 layers, 96 chats of about
230 tokens, 8 sequences a step, AdamW on float32 weights with bf16 products, torch's default threads.

    gkd                 TRL GKDTrainer, lmbda 0, beta 0, gradient checkpointing off
    gkd default         the same with gradient checkpointing, TRL's default
    gkd bf16 weights    the same as gkd, weights and moments in bf16 (coarser updates than all others)
    live                limbeck, the live teacher's hidden states
    live in halves      the same, each step computed in two pieces: the same gradient in less memory
    stored              limbeck, a threshold sample (tau 0.02) from the store
    annotate            writing that store, the whole stage with loading
    text                limbeck, the same steps as stored with plain cross-entropy on the text
    on-policy ...       TRL DistillationTrainer, 128 new tokens, in the same three forms
    on-policy limbeck   reverse KL to the live teacher; the answers of four steps are written at a time
    on-policy strict    the same, the answers of each step written by itself, as TRL does

Tokens a second. Fixed data: all tokens of the sequences trained on, prompt and completion, padding never counted,
over the time from the end of step 1 to the end of the last; reading batches, teacher, loss, optimiser are all in it,
loading models is not. On-policy: tokens the student wrote, over the same time, writing included. Stored, with
annotation over 3 epochs: with T the tokens of an epoch, A the seconds of the annotate stage and r the rate of
stored, 3T / (A + 3T / r). Memory is the greatest resident memory of the run's process from its start, imports and
loading included; for stored with annotation, the greater of the two.

The cost of distillation against cross-entropy: the seconds of all timed steps of stored over those of text, in each
round, same batches in the same order. Share of the peak: operations as `flops.py` counts them, over seconds, over
the best rate of torch.mm measured in the same round. `profile` shows where the rest goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import cast

import material
from bench import (
    HERE,
    Result,
    Run,
    add_peers,
    alternate,
    machine,
    median,
    peers_python,
    run_one,
    say_machine,
    spread,
    table,
    write_report,
)

PEERS: dict[str, tuple[str, ...]] = {
    "gkd": ("--case", "gkd"),
    "gkd default": ("--case", "gkd", "--checkpointing"),
    "gkd bf16 weights": ("--case", "gkd", "--weights", "bfloat16"),
    "on-policy": ("--case", "on-policy"),
    "on-policy default": ("--case", "on-policy", "--checkpointing"),
    "on-policy bf16 weights": ("--case", "on-policy", "--weights", "bfloat16"),
}
OURS = {
    "live": "live",
    "live in halves": "halves",
    "annotate": "annotate",
    "stored": "stored",
    "text": "text",
    "peak": "peak",
}
OURS |= {"on-policy limbeck": "on-policy", "on-policy strict": "strict"}

Results = dict[str, list[Result]]


def runs_of(options: argparse.Namespace, where: Path) -> list[Run]:
    """All cases that were asked for; every one of limbeck's stands next to one of TRL's."""
    common = ("--material", str(where), "--epochs", str(options.epochs), "--steps", str(options.steps))
    common += ("--skip", str(options.skip))
    theirs = [
        Run(name, (str(peers_python(options.peers)), str(HERE / "peers" / "trl_runs.py"), *case, *common))
        for name, case in PEERS.items()
    ]
    mine = [Run(name, (sys.executable, str(HERE / "ours.py"), "--case", case, *common)) for name, case in OURS.items()]
    mixed = [run for n in range(max(len(theirs), len(mine))) for side in (theirs, mine) for run in side[n : n + 1]]
    return [run for run in mixed if not options.only or run.name in options.only]


def over_epochs(results: Results, epochs: int = 3) -> list[Result]:
    """Of each round: stored, with annotation counted over so many epochs."""
    return [
        {
            "tokens_per_second": epochs * tokens / (_number(one, "seconds") + epochs * tokens / rate),
            "peak_bytes": max(_number(one, "peak_bytes"), _number(two, "peak_bytes")),
        }
        for one, two in zip(results.get("annotate", []), results.get("stored", []), strict=False)
        for tokens, rate in [(_number(one, "tokens"), _number(two, "tokens_per_second"))]
    ]


def _number(result: Result, key: str) -> float:
    return float(cast("float", result[key]))


def speed_table(results: Results) -> str:
    rows = []
    for name, found in results.items():
        if found and name not in ("annotate", "peak"):
            key = rate_of(name)
            memory = f"{median(found, 'peak_bytes') / 2**30:.2f}"
            rows.append([name, f"{median(found, key):,.0f}", spread(found, key), memory, str(len(found))])
    return table(["case", "tokens/s, median", "least to greatest", "peak GiB, median", "runs"], rows)


def rate_of(name: str) -> str:
    """On-policy counts what the student wrote."""
    return "supervised_per_second" if name.startswith("on-policy") else "tokens_per_second"


def ratio_table(results: Results) -> str:
    """Each of limbeck's cases against each of TRL's that does the same."""
    rows = []
    for mine in ("live", "live in halves", "stored, annotation over 3 epochs", "on-policy limbeck", "on-policy strict"):
        kind = "on-policy" if mine.startswith("on-policy") else "gkd"
        for theirs in (name for name in PEERS if name.startswith(kind)):
            if results.get(mine) and results.get(theirs):
                key = rate_of(mine)
                speed = median(results[mine], key) / median(results[theirs], key)
                memory = median(results[mine], "peak_bytes") / median(results[theirs], "peak_bytes")
                rows.append([mine, f"TRL {theirs}", f"{speed:.2f}", f"{memory:.2f}"])
    return table(["limbeck", "against", "times as fast", "share of its memory"], rows)


def step_cost(results: Results) -> str:
    """A step from the store against a step of cross-entropy, round by round."""
    pairs = list(zip(results.get("stored", []), results.get("text", []), strict=False))
    if not pairs:
        return ""
    ratios = [_number(one, "seconds") / _number(two, "seconds") for one, two in pairs]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    return f"A step from the store takes {statistics.median(ratios):.3f} times one of cross-entropy (rounds: {shown})."


def peak_share(results: Results) -> str:
    rows = []
    for name in ("live", "live in halves", "stored", "text"):
        pairs = list(zip(results.get(name, []), results.get("peak", []), strict=False))
        if pairs:
            reached = [_number(one, "flops") / _number(one, "seconds") for one, _ in pairs]
            shares = [rate / _number(top, "flops_per_second") for rate, (_, top) in zip(reached, pairs, strict=True)]
            best = median([top for _, top in pairs], "flops_per_second")
            shown = [f"{x / 1e9:,.0f}" for x in (statistics.median(reached), best)]
            rows.append([name, *shown, f"{statistics.median(shares):.3f}"])
    return table(["case", "GFLOP/s reached", "GFLOP/s of torch.mm in bf16", "share of the peak"], rows)


def profile_table(found: Result | None) -> str:
    if found is None:
        return ""
    shares, calls = cast("dict[str, float]", found["shares"]), cast("dict[str, int]", found["calls"])
    rows = [[f"`{name}`", f"{share:.3f}", str(calls[name])] for name, share in shares.items()]
    return table(["operation, 2 steps of stored", "share of all operations' own time", "calls"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_options(parser, chats=96, held_out=32)
    add_peers(parser)
    parser.add_argument("--rounds", type=int, default=3, help="times that every case is run (default: 3)")
    parser.add_argument("--epochs", type=float, default=1, help="of training in a run (default: 1, which is 12 steps)")
    parser.add_argument("--steps", type=int, default=0, help="stop every run after so many steps; 0 is never")
    parser.add_argument("--skip", type=int, default=1, help="first steps left out of rates (default: 1)")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS, "profile"], help="run these cases only")
    options = parser.parse_args()
    where = material.prepared(parser, options)
    results: Results = alternate(runs_of(options, where), options.rounds, options.out / "logs")
    profiled = None
    if not options.only or "profile" in options.only:
        command = (sys.executable, str(HERE / "ours.py"), "--case", "profile", "--material", str(where))
        profiled = run_one(Run("profile", command), options.out / "logs", 0)
    results["stored, annotation over 3 epochs"] = over_epochs(results)
    words = machine(peers_python(options.peers))
    parts = [say_machine(words), speed_table(results), ratio_table(results), step_cost(results)]
    parts += [peak_share(results), profile_table(profiled)]
    data: Result = {"machine": words, "results": results, "profile": profiled}
    write_report(options.out, "training", "\n\n".join(filter(None, parts)), data)
    wanted = [run.name for run in runs_of(options, where)]
    return 1 if any(len(results[name]) < options.rounds for name in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
