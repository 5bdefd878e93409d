"""Quality at equal tokens, limbeck against TRL: `python benchmarks/quality.py --data FILE --out DIR`.

The same student is trained on the same chats, for the same epochs, with the same learning-rate schedule, by TRL's
GKDTrainer (lmbda 0, beta 0), by limbeck against the live teacher, and by limbeck from a store of threshold samples.
Each side orders its batches its own way. All students are then measured by limbeck's own evaluation on held-out
chats: KL from the live teacher in nats a token, and the share of positions at which both find the same token most
likely. Students are measured in bf16, whatever wrote them.

Chats are as in `training.py`, only more. Training differs from seed to seed by its order, so it is repeated with
several; the last table gives limbeck minus TRL on the same held-out prompts, with a 95 % interval over prompts.
Below 0 is better for KL, above 0 for agreement. The tokens each side trained on are shown, so that one can see that
they are equal; TRL's labels hold one token more of each chat, the line break after the end of the turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple, cast

import material
import numpy as np
from bench import (
    HERE,
    Result,
    Run,
    add_peers,
    machine,
    peers_python,
    run_one,
    say_machine,
    table,
    write_report,
)
from numpy.typing import NDArray

from limbeck import models
from limbeck.evaluate.compare import shared_width, sum_over_example, warm_up
from limbeck.evaluate.figures import Row, by_prompt
from limbeck.evaluate.statistics import Interval, ratio_interval
from limbeck.render.examples import read_examples

SIDES = ("TRL GKD", "limbeck live", "limbeck stored")


class Measured(NamedTuple):
    """A student on each of P held-out prompts: sums over positions, and how many positions."""

    kl_P: NDArray[np.float64]
    agree_P: NDArray[np.float64]
    positions_P: NDArray[np.float64]


def commands(options: argparse.Namespace, where: Path, seed: int) -> list[tuple[Run, Path]]:
    """Each side's training run, and where it puts its student."""
    common = ("--material", str(where), "--epochs", str(options.epochs), "--steps", str(options.steps))
    common += ("--learning-rate", str(options.learning_rate), "--seed", str(seed))
    ours = (sys.executable, str(HERE / "ours.py"), "--case")
    theirs = (str(peers_python(options.peers)), str(HERE / "peers" / "trl_runs.py"), "--case", "gkd")
    starts = {"TRL GKD": theirs, "limbeck live": (*ours, "live"), "limbeck stored": (*ours, "stored")}
    runs = []
    for name in SIDES:
        student = options.out / "students" / f"{name.replace(' ', '-')}-{seed}"
        runs.append((Run(name, (*starts[name], *common, "--save", str(student))), student))
    return runs


def measure(student: Path, where: Path) -> Measured:
    """By limbeck's evaluation, against the live teacher."""
    teacher = models.load_model(str(where / "teacher"), "bf16")
    subject = models.load_model(str(student), "bf16")
    held_out = read_examples(where / "examples").held_out
    width = shared_width(teacher, subject, len(models.load_tokenizer(str(where / "teacher"))))
    warm_up(subject, held_out[0])
    rows = [Row(e.prompt_id, sum_over_example(teacher, subject, e, vocabulary=width)) for e in held_out]
    kl_P, positions_P = by_prompt(rows, lambda s: s.kl, lambda s: s.positions)
    return Measured(kl_P, by_prompt(rows, lambda s: s.agree, lambda s: s.positions)[0], positions_P)


def show(interval: Interval) -> str:
    ends = "" if interval.low is None else f" ({interval.low:.4f} to {interval.high:.4f})"
    return f"{interval.value:.4f}{ends}"


def scores(found: dict[tuple[str, int], Measured], trained: dict[tuple[str, int], Result]) -> str:
    rows = []
    for (name, seed), m in found.items():
        result = trained.get((name, seed), {})
        tokens = (
            [f"{sum(cast('list[int]', result[k])):,}" for k in ("step_tokens", "step_supervised")] if result else []
        )
        kl, agree = (ratio_interval(sums, m.positions_P, seed=0) for sums in (m.kl_P, m.agree_P))
        rows.append([name, str(seed) if result else "", *(tokens or ["0", "0"]), show(kl), show(agree)])
    return table(["student", "seed", "tokens", "supervised", "KL, nats a token", "agreement"], rows)


def differences(found: dict[tuple[str, int], Measured], seeds: list[int]) -> str:
    """What limbeck has more than TRL: the mean over seeds on each prompt, and its interval over prompts."""
    rows = []
    for name in SIDES[1:]:
        both = [(found[name, s], found[SIDES[0], s]) for s in seeds if (name, s) in found and (SIDES[0], s) in found]
        if both:
            positions_P = both[0][0].positions_P
            kl_P = sum(a.kl_P - b.kl_P for a, b in both) / len(both)
            agree_P = sum(a.agree_P - b.agree_P for a, b in both) / len(both)
            shown = [show(ratio_interval(np.asarray(x), positions_P, seed=0)) for x in (kl_P, agree_P)]
            spread = [(a.kl_P.sum() - b.kl_P.sum()) / positions_P.sum() for a, b in both]
            rows.append([f"{name} - {SIDES[0]}", *shown, f"{statistics.median(spread):.4f}", str(len(both))])
    return table(["difference", "KL, nats a token", "agreement", "KL, median over seeds", "seeds"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_options(parser, chats=384, held_out=64)
    add_peers(parser)
    parser.add_argument("--epochs", type=float, default=2, help="of training (default: 2, which is 96 steps)")
    parser.add_argument("--steps", type=int, default=0, help="stop every run after so many steps; 0 is never")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each (default: 0 1 2)")
    options = parser.parse_args()
    where = material.prepared(parser, options)
    found = {("before", 0): measure(where / "student", where)}
    trained: dict[tuple[str, int], Result] = {}
    for seed in options.seeds:
        for run, student in commands(options, where, seed):
            result = run_one(run, options.out / "logs", seed)
            if result is not None:
                trained[run.name, seed] = result
                found[run.name, seed] = measure(student, where)
    words = machine(peers_python(options.peers))
    parts = [say_machine(words), scores(found, trained), differences(found, options.seeds)]
    report = "\n\n".join(filter(None, parts))
    data: Result = {
        "machine": words,
        "trained": [{"side": name, "seed": seed, **result} for (name, seed), result in trained.items()],
        "measured": [
            {"side": name, "seed": seed, **{k: v.tolist() for k, v in m._asdict().items()}}
            for (name, seed), m in found.items()
        ],
    }
    write_report(options.out, "quality", report, data)
    return 0 if len(trained) == len(SIDES) * len(options.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
