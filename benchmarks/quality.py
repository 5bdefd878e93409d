"""Quality at equal tokens, limbeck against TRL: `python benchmarks/quality.py --data FILE --out DIR`.

The same student is trained on the same chats, for the same epochs, with the same learning-rate schedule (warm-up over
5 % of the steps, then a cosine), by TRL's GKDTrainer (lmbda 0, beta 0), by limbeck against the live teacher, and by
limbeck from a store of threshold samples.
All students are then measured by limbeck's own evaluation on held-out chats: KL from the live teacher in nats a token,
and the share of positions at which both find the same token most likely. Students are measured in bf16, whatever wrote
them.

Both sides get the same chats in every step (`--order same`): limbeck's order, written to a file that TRL's side reads.
TRL then leaves out one token of each chat that it would learn from otherwise, the line break after the end of the turn.
What each trainer was really set to is compared (weights at the beginning, bit by bit; optimiser; learning rate, tokens
and learned tokens of every step), and any difference ends the measurement with 1; losses and gradient norms of every
step stand in a table. `limbeck halves` is limbeck with each step computed in two pieces, the same gradient but for
rounding: it shows how far rounding alone takes two trainings apart. Learning rates are then transformers' own on both
sides, with 0 at the first step of the warm-up, so that all sides learn nothing from the first batch. With `--order own`
each side runs as it comes: it orders its batches its own way, TRL learns from the line breaks, and limbeck's learning
rate is above 0 from the first step on.

Chats are as in `training.py`, only more. Training is repeated with several seeds, which differ by their order. The last
table gives limbeck minus TRL on the same held-out prompts, with a 95 % interval over prompts, and one over seeds (by
Student's t), which holds what rounding and order do. Below 0 is better for KL, above 0 for agreement.
`--keep` takes trainings of the same command from OUT instead of repeating them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
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
from steps import BATCH, write_order

from limbeck import models
from limbeck.evaluate.compare import shared_width, sum_over_example, warm_up
from limbeck.evaluate.figures import Row, by_prompt
from limbeck.evaluate.statistics import Interval, ratio_interval, student_t
from limbeck.ledger.canonical import digest_json
from limbeck.records import Message, Prompt
from limbeck.render.examples import read_examples
from limbeck.train.schedule import make_schedule

SIDES = ("TRL GKD", "limbeck live", "limbeck stored", "limbeck halves")
EQUAL = ("settings", "learning_rates", "step_tokens", "step_supervised")
"""What must be the same on all sides where they share an order."""


class Measured(NamedTuple):
    """A student on each of P held-out prompts: sums over positions, and how many positions."""

    kl_P: NDArray[np.float64]
    agree_P: NDArray[np.float64]
    positions_P: NDArray[np.float64]


def order_of(options: argparse.Namespace, where: Path, seed: int) -> Path:
    """The file with limbeck's order of that seed.

    Raises:
        ValueError: a chat is not the example of the same number.
    """
    examples = read_examples(where / "examples").train
    lines = (where / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    for number, (line, example) in enumerate(zip(lines, examples, strict=True)):
        question, answer = json.loads(line)["messages"]
        prompt = Prompt.id_of((Message(**question),))
        if digest_json([prompt, answer["content"]]) != example.completion:
            raise ValueError(
                f"{where}: line {number + 1} of chats.jsonl is not example {number}; make the material anew"
            )
    lengths = [len(e.tokens_T) for e in examples]
    steps = make_schedule(lengths, batch_size=BATCH, epochs=options.epochs, pieces=1, seed=seed).steps
    order = [list(step) for step in steps[: options.steps or None]]
    path = options.out / "orders" / f"{seed}-{digest_json(order)[-12:]}.json"
    write_order(path, order)
    return path


def commands(options: argparse.Namespace, where: Path, seed: int) -> list[tuple[Run, Path]]:
    """Each side's training run, and where it puts its student."""
    common = ("--material", str(where), "--epochs", str(options.epochs), "--steps", str(options.steps))
    common += ("--learning-rate", str(options.learning_rate), "--seed", str(seed))
    if options.order == "same":
        common += ("--order", str(order_of(options, where, seed)))
    ours = (sys.executable, str(HERE / "ours.py"), "--case")
    theirs = (str(peers_python(options.peers)), str(HERE / "peers" / "trl_runs.py"), "--case", "gkd")
    runs = []
    for name in options.sides:
        student = options.out / "students" / f"{name.replace(' ', '-')}-{seed}"
        start = theirs if name == SIDES[0] else (*ours, name.split()[1])
        runs.append((Run(name, (*start, *common, "--save", str(student))), student))
    return runs


def train(run: Run, student: Path, options: argparse.Namespace, seed: int) -> Result | None:
    """The run's figures; with `--keep`, those that the same command left before."""
    kept = student.with_suffix(".json")
    if options.keep and kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["command"] == list(run.command):
            return before["result"]
    kept.unlink(missing_ok=True)
    result = run_one(run, options.out / "logs", seed)
    if result is not None:
        kept.write_text(json.dumps({"command": run.command, "result": result}), encoding="utf-8")
    return result


def unequal(found: dict[str, Result]) -> list[str]:
    """Where sides of one seed differ in what must be the same."""
    if len(found) < 2:
        return []
    (first, one), *others = found.items()
    lines = []
    for name, other in others:
        for key in EQUAL:
            a, b = one[key], other[key]
            if key == "learning_rates":
                close = np.allclose(cast("list[float]", a), cast("list[float]", b), rtol=1e-12, atol=0)
            else:
                close = a == b
            if not close:
                lines.append(f"{key}: {first} has {a}, {name} has {b}")
    return lines


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


def steps_of(found: dict[str, Result], seed: int) -> str:
    """Losses and gradient norms of every step, side by side."""
    if not found:
        return ""
    one = next(iter(found.values()))
    columns = [one["learning_rates"], one["step_tokens"], one["step_supervised"]]
    columns += [r["losses"] for r in found.values()] + [r["gradient_norms"] for r in found.values()]
    head = [f"seed {seed}: step", "learning rate", "tokens", "supervised", *(f"loss, {n}" for n in found)]
    rows = [
        [str(number), f"{rate:.2e}", f"{tokens:,}", f"{learned:,}", *(f"{v:.3f}" for v in rest)]
        for number, (rate, tokens, learned, *rest) in enumerate(zip(*cast("list[list]", columns), strict=True), 1)
    ]
    return table([*head, *(f"gradient norm, {n}" for n in found)], rows)


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


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval by Student's t; no interval for a single value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None)
    reach = student_t(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach)


def differences(found: dict[tuple[str, int], Measured], seeds: list[int]) -> str:
    """What limbeck has more than TRL, each seed by itself, and the mean over seeds with both intervals."""
    rows = []
    for name in SIDES[1:]:
        both = [(found[name, s], found[SIDES[0], s]) for s in seeds if (name, s) in found and (SIDES[0], s) in found]
        for what, sums in (("KL, nats a token", "kl_P"), ("agreement", "agree_P")):
            if not both:
                continue
            positions_P = both[0][0].positions_P
            each_SP = np.stack([getattr(a, sums) - getattr(b, sums) for a, b in both])
            each_S = (each_SP.sum(axis=1) / positions_P.sum()).tolist()
            prompts = ratio_interval(each_SP.mean(axis=0), positions_P, seed=0)
            by_seed = ", ".join(f"{v:.4f}" for v in each_S)
            rows.append([f"{name} - {SIDES[0]}", what, by_seed, show(prompts), show(over_seeds(each_S))])
    return table(["difference", "of", "by seed", "mean, interval over prompts", "mean, interval over seeds"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    material.add_options(parser, chats=384, held_out=64)
    add_peers(parser)
    parser.add_argument("--epochs", type=float, default=2, help="of training (default: 2, which is 96 steps)")
    parser.add_argument("--steps", type=int, default=0, help="stop every run after so many steps; 0 is never")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each (default: 0 1 2)")
    parser.add_argument("--order", choices=("same", "own"), default="same", help="of batches (default: %(default)s)")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES[:3], help="who trains (default: all but halves)"
    )
    parser.add_argument("--keep", action="store_true", help="repeat no training of the same command")
    options = parser.parse_args()
    where = material.prepared(parser, options)
    found = {("before", 0): measure(where / "student", where)}
    figures: dict[tuple[str, int], Result] = {}
    for seed in options.seeds:
        for run, student in commands(options, where, seed):
            result = train(run, student, options, seed)
            if result is not None:
                figures[run.name, seed] = result
                found[run.name, seed] = measure(student, where)
    seeds = {seed: {n: r for (n, s), r in figures.items() if s == seed} for seed in options.seeds}
    wrong = [f"seed {s}: {line}" for s, r in seeds.items() if options.order == "same" for line in unequal(r)]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    words = machine(peers_python(options.peers))
    curves = [steps_of(r, s) for s, r in seeds.items()] if options.order == "same" else []
    parts = [say_machine(words), *curves, scores(found, figures), differences(found, options.seeds)]
    report = "\n\n".join(filter(None, parts))
    data: Result = {
        "machine": words,
        "unequal": wrong,
        "trained": [{"side": name, "seed": seed, **result} for (name, seed), result in figures.items()],
        "measured": [
            {"side": name, "seed": seed, **{k: v.tolist() for k, v in m._asdict().items()}}
            for (name, seed), m in found.items()
        ],
    }
    write_report(options.out, "quality", report, data)
    return 0 if len(figures) == len(options.sides) * len(options.seeds) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
