"""How true each stored form of a teacher's distribution is, what it costs, and what a student learns from it.

    python benchmarks/signals.py RUN [--positions 2500] [--steps 60]

Takes teacher, examples and beginning of a finished run (`make quickstart` leaves one in runs/quickstart). The teacher
says its whole distribution at the answer positions of the training examples; it is stored in every form of
`stored_forms`, and what comes back is compared with it.

- entries: different ids a position.
- bytes a position: limbeck's is a store written to the disk, everything counted: shards, index and manifest. Of the
  others it is what their formats need for ids and numbers; files and indices are not counted.
- squared error: mean over positions of sum((stored - p) ** 2), and its two parts. The variance is that of --draws
  draws, with their mean; the squared bias is the rest, and scatters about 0 for a form without bias.
- KL and agreement: of a student that starts from RUN/beginning and is trained for --steps steps from this form, all in
  the same order, against the live teacher on the held-out answers; with 95 % intervals over prompts. "exact" is a
  student of the live teacher, "text" one of the answer's tokens alone.

Students take most of the time, so only the forms that --train names get one. For every tau, random-sampling KD also
runs with as many draws as give it the same number of entries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from stored_forms import Drawn, Entries, Form, distillkit, draws_for, random_sampling, threshold, top_k
from students import Kept, KeptSource, Reached, measure, schedule_of, train_student
from torch import Tensor

from limbeck import models
from limbeck.records import Example
from limbeck.render.batches import collate
from limbeck.render.examples import ExampleSet, read_examples
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed
from limbeck.signal.annotate import plan_shards, signal_key
from limbeck.signal.encoding import SampledArrays
from limbeck.signal.head import head_logits, hidden_states
from limbeck.signal.store import Planned, SignalKey, SignalStore, SignalWriter
from limbeck.train.sources import LiveTeacher

CHUNK = 128
"""Positions whose dense means are held at a time."""
MATCHED = 1000
"""Positions on which the numbers of draws are settled."""


class Fidelity(NamedTuple):
    """Sums over positions."""

    positions: float = 0
    entries: float = 0
    nbytes: float = 0
    error: float = 0
    bias: float = 0
    variance: float = 0

    def plus(self, other: Fidelity) -> Fidelity:
        """Both together."""
        return Fidelity(*(a + b for a, b in zip(self, other, strict=True)))


class Collected(NamedTuple):
    """What the teacher's pass leaves of each form."""

    fidelity: dict[str, Fidelity]
    arrays: dict[str, dict[str, SampledArrays]]
    kept: dict[str, dict[str, Kept]]


def distributions(run: RunDir, examples: Sequence[Example], vocab_size: int) -> Iterator[tuple[Example, Tensor]]:
    """The teacher's distributions at the answer positions of each example."""
    recipe = run.recipe()
    model = models.load_model(recipe.local_teachers[0].model, recipe.local_teachers[0].precision)
    for example in examples:
        batch = collate([example], 0)
        with torch.inference_mode():
            hidden_ND = hidden_states(model, batch.tokens_BT)[batch.predict_BT]
            logits_NV = head_logits(model, hidden_ND)[:, :vocab_size].float()
            yield example, (logits_NV / recipe.train.temperature).softmax(-1).clone()


def fidelity(form: Form, probs_NV: Tensor, draws: int, generator: torch.Generator) -> Fidelity:
    """Entries, bytes, error, bias and variance of a form on these positions."""
    total = Fidelity()
    for p_CV in probs_NV.split(CHUNK):
        mean_CV, own = torch.zeros_like(p_CV), float(p_CV.square().sum(dtype=torch.float64))
        count = draws if form.random else 1
        error, squares, entries, nbytes = 0.0, 0.0, 0, 0.0
        for _ in range(count):
            drawn = form.draw(p_CV, generator)
            (_, ids_E, weights_E), rows_E = drawn.entries, drawn.entries.positions()
            p_E = p_CV[rows_E, ids_E.long()]
            missed = float(((weights_E - p_E).square() - p_E.square()).sum(dtype=torch.float64))
            error += (own + missed) / count
            squares += float(weights_E.square().sum(dtype=torch.float64))
            mean_CV.view(-1).index_add_(0, rows_E * p_CV.shape[1] + ids_E, weights_E / count)
            entries, nbytes = entries + len(ids_E), nbytes + drawn.nbytes
        spread = squares - count * float(mean_CV.square().sum(dtype=torch.float64))
        variance = spread / (count - 1) if count > 1 else 0.0
        total = total.plus(
            Fidelity(len(p_CV), entries / count, nbytes / count, error, error - variance, variance),
        )
    return total


def collect(
    run: RunDir,
    examples: Sequence[Example],
    forms: Sequence[Form],
    vocab_size: int,
    *,
    positions: int,
    draws: int,
    keep: Collection[str],
) -> Collected:
    """One pass of the teacher over the examples: fidelity on the first `positions`, and of the forms named in `keep`
    a draw of every position. Stores are of every position that is gone through, for their size tells on their bytes.
    """
    names = [f.name for f in forms]
    found = Collected({n: Fidelity() for n in names}, {n: {} for n in names}, {n: {} for n in keep})
    left = positions
    for example, probs_NV in distributions(run, examples, vocab_size):
        entropy_N = torch.special.entr(probs_NV).sum(dim=1)
        for form in (f for f in forms if left > 0 or f.name in keep or found.arrays[f.name]):
            generator = torch.Generator().manual_seed(derive_seed(0, "benchmark", form.name, example.id) % 2**63)
            drawn: Drawn = form.draw(probs_NV, generator)
            if drawn.arrays is not None:
                found.arrays[form.name][example.id] = drawn.arrays
            if form.name in keep:
                found.kept[form.name][example.id] = Kept(drawn.entries, entropy_N)
            if left > 0:
                more = fidelity(form, probs_NV[:left], draws, generator)
                found.fidelity[form.name] = found.fidelity[form.name].plus(more)
        left -= len(probs_NV)
        if left <= 0 and not keep:
            break
    return found


def bytes_on_disk(key: SignalKey, tau: float, examples: Sequence[Example], arrays: dict[str, SampledArrays]) -> float:
    """Bytes a position of a store of these examples, as the annotate stage would write it."""
    key = key.model_copy(update={"kind": "sampled", "tau": tau, "temperature": 1.0})
    plan = plan_shards([e for e in examples if e.id in arrays], list(key.teachers))
    with tempfile.TemporaryDirectory() as scratch:
        shards = [[e for batch in shard for e in batch] for shard in plan]
        writer = SignalWriter(
            Path(scratch) / "signals", key, [[Planned(e.id, e.supervised) for e in s] for s in shards]
        )
        for number, shard in enumerate(shards):
            writer.write(number, [arrays[e.id] for e in shard])
        writer.finish()
        store = SignalStore.open(Path(scratch) / "signals", expect=key)
        return store.bytes_on_disk / store.manifest.counts.positions


def text_entries(example: Example) -> Entries:
    """The answer's tokens, each of weight 1."""
    ids_N = torch.from_numpy(example.tokens_T[example.mask_T]).int()
    return Entries(torch.ones(len(ids_N), dtype=torch.int64), ids_N, torch.ones(len(ids_N)))


def students(run: RunDir, examples: ExampleSet, found: Collected, vocab_size: int, steps: int) -> dict[str, Reached]:
    """A student of every form that was kept, of the exact teacher and of the text, and the beginning itself."""
    recipe, schedule = run.recipe(), schedule_of(run, examples, steps)
    teacher = models.load_model(recipe.local_teachers[0].model, recipe.local_teachers[0].precision)
    texts = {e.id: Kept(text_entries(e), torch.zeros(e.supervised)) for e in examples.train}
    kept = {name: KeptSource(k, vocab_size, recipe.train.temperature) for name, k in found.kept.items()}
    sources = {
        "exact": LiveTeacher(teacher, vocab_size),
        **kept,
        "text": KeptSource(texts, vocab_size, recipe.train.temperature),
    }
    beginning = models.load_model(str(run / "beginning"), recipe.train.precision)
    reached = {"untrained": measure(run, examples, beginning)}
    for name, source in sources.items():
        reached[name] = train_student(run, examples, schedule, source)
        print(json.dumps({"form": name, "steps": steps} | reached[name]._asdict()), file=sys.stderr, flush=True)
    return reached


def all_forms(run: RunDir, examples: Sequence[Example], taus: Sequence[float], vocab_size: int) -> list[Form]:
    """Every form. The numbers of draws that match each tau are settled on the first positions."""
    chunks: list[Tensor] = []
    for _, probs_NV in distributions(run, examples, vocab_size):
        chunks.append(probs_NV)
        if sum(map(len, chunks)) >= MATCHED:
            break
    generator, count = torch.Generator().manual_seed(0), sum(map(len, chunks))
    ours = [threshold(tau) for tau in taus]
    unique = [sum(len(form.draw(p, generator).entries.ids_E) for p in chunks) / count for form in ours]
    matched = [
        random_sampling(draws_for(u, chunks), note=f" (for tau {t:g})") for t, u in zip(taus, unique, strict=True)
    ]
    return [
        *ours,
        *matched,
        random_sampling(50),
        random_sampling(50, power=0.8),
        distillkit(128, 16, (0, 1, 2, 3, 4, 0.5), vocab_size),
        distillkit(50, 1, (0, 1, 0.5), vocab_size),
        top_k(12),
        top_k(50),
    ]


def table(
    found: Collected, sizes: dict[str, float], reached: dict[str, Reached], ours: Sequence[str], peers: Sequence[str]
) -> str:
    """The figures in Markdown, and below it how each tau stands to its peer."""

    def interval(values: tuple[float | None, float | None, float | None] | None) -> str:
        if values is None or values[0] is None:
            return ""
        low, high = (("?" if v is None else f"{v:.3f}") for v in values[1:])
        return f"{values[0]:.3f} ({low} to {high})"

    lines = [
        "| form | entries | bytes a position | squared error | squared bias | variance | KL, nats | agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(["untrained", "text", *found.fidelity, "exact"]):
        f, r = found.fidelity.get(name), reached.get(name)
        if f is None and r is None:
            continue
        figures = ["", "", "", "", ""]
        if f is not None:
            n = f.positions
            size = sizes.get(name, f.nbytes / n)
            figures = [
                f"{f.entries / n:.1f}",
                f"{size:.1f}",
                *(f"{v / n:.5f}" for v in (f.error, f.bias, f.variance)),
            ]
        ends = [interval(r.kl), interval(r.agreement)] if r else ["", ""]
        lines.append("| " + " | ".join([name, *figures, *ends]) + " |")
    lines.append("")
    for name, peer in zip(ours, peers, strict=True):
        mine, other = found.fidelity[name], found.fidelity[peer]
        lines.append(
            f"{name}: {mine.error / other.error:.3f} of the squared error of {peer}, "
            f"at {mine.entries / mine.positions:.2f} entries against {other.entries / other.positions:.2f}; "
            f"{sizes[name]:.2f} bytes a position"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--positions", type=int, default=2500, help="answer positions the errors are measured on")
    parser.add_argument("--draws", type=int, default=4, help="draws of each random form at a position")
    parser.add_argument("--steps", type=int, default=60, help="steps of every student; 0 trains none")
    parser.add_argument("--tau", type=float, nargs="+", default=[0.01, 0.02, 0.025, 0.03, 0.04, 0.05])
    parser.add_argument("--only", nargs="+", default=[], help="only forms whose name contains one of these")
    trained = ["tau 0.02", "tau 0.05", "DistillKit", "top 12"]
    parser.add_argument("--train", nargs="+", default=trained, help="forms that get a student, in the same way")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    run = RunDir(options.run)
    examples = read_examples(run / "examples")
    key = signal_key(run.recipe(), examples)
    forms = all_forms(run, examples.train, options.tau, key.vocab_size)
    ours, peers = ([f.name for f in forms[a : a + len(options.tau)]] for a in (0, len(options.tau)))
    if options.only:
        forms = [f for f in forms if any(word in f.name for word in options.only)]
    names = [f.name for f in forms]
    pairs = [(a, b) for a, b in zip(ours, peers, strict=True) if a in names and b in names]
    used = examples.train
    if options.steps:
        steps = schedule_of(run, examples, options.steps).steps
        used = [examples.train[i] for i in sorted({i for step in steps for i in step})]
    found = collect(
        run,
        used,
        forms,
        key.vocab_size,
        positions=options.positions,
        draws=options.draws,
        keep=[n for n in names if options.steps and any(word in n for word in options.train)],
    )
    sizes = {
        name: bytes_on_disk(key, tau, examples.train, found.arrays[name])
        for tau, name in zip(options.tau, ours, strict=True)
        if name in names
    }
    reached = students(run, examples, found, key.vocab_size, options.steps) if options.steps else {}
    positions = max(f.positions for f in found.fidelity.values())
    print(f"{positions:.0f} answer positions, {options.draws} draws; students: {options.steps} steps\n")
    print(table(found, sizes, reached, [a for a, _ in pairs], [b for _, b in pairs]))
    if options.json:
        figures = {n: f._asdict() for n, f in found.fidelity.items()}
        told = {n: r._asdict() for n, r in reached.items()}
        options.json.write_text(json.dumps({"fidelity": figures, "bytes": sizes, "students": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
