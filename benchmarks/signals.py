"""How true each stored form of a teacher's distribution is, and what it costs: `python benchmarks/signals.py RUN`.

Takes the teacher and the examples of a finished run (`make quickstart` leaves one in runs/quickstart), computes the
teacher's whole distribution at each of a number of answer positions, stores it in every form, and compares what comes
back. Squared error is the mean over positions of sum((stored - p)^2); the bias is the same for the mean of many draws,
less what chance alone leaves, so an unbiased form shows 0.

The peers are written here from their papers: random-sampling KD (arXiv 2503.16870: draws with replacement from p,
weights counts / draws), and top-k, renormalised as most trainers do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck import models
from limbeck.render.batches import collate
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal.encoding import decode_sampled, encode_sampled
from limbeck.signal.head import head_logits, hidden_states
from limbeck.signal.sampling import threshold_sample

CHUNK = 128
DRAWS = 16


class Stored(NamedTuple):
    """One form of one chunk: what comes back, dense, its entries and its bytes a position."""

    dense_NV: Tensor
    entries: float
    nbytes: float


def threshold(tau: float) -> Callable[[Tensor, torch.Generator], Stored]:
    """The form of limbeck, through its encoding on disk."""

    def store(probs_NV: Tensor, generator: torch.Generator) -> Stored:
        signal = threshold_sample(probs_NV, tau, generator=generator)
        arrays = encode_sampled(signal, generator)
        back = decode_sampled(arrays, tau=tau, vocab_size=signal.vocab_size)
        return Stored(back.to_dense(), signal.entries_per_position, signal.nbytes_per_position)

    return store


def random_sampling(draws: int) -> Callable[[Tensor, torch.Generator], Stored]:
    """Random-sampling KD; 3 bytes an entry, as its paper packs them (17-bit id, 7-bit count)."""

    def store(probs_NV: Tensor, generator: torch.Generator) -> Stored:
        ids = torch.multinomial(probs_NV, draws, replacement=True, generator=generator)
        dense_NV = torch.zeros_like(probs_NV).scatter_add_(1, ids, torch.full(ids.shape, 1 / draws))
        unique = float((dense_NV > 0).sum(1).float().mean())
        return Stored(dense_NV, unique, 3 * unique)

    return store


def top_k(k: int) -> Callable[[Tensor, torch.Generator], Stored]:
    """The k most likely tokens, renormalised; 4 bytes an entry (16-bit id, 16-bit probability)."""

    def store(probs_NV: Tensor, generator: torch.Generator) -> Stored:
        top = probs_NV.topk(k)
        dense_NV = torch.zeros_like(probs_NV).scatter_(1, top.indices, top.values / top.values.sum(1, keepdim=True))
        return Stored(dense_NV, k, 4 * k)

    return store


FORMS = {
    "threshold, tau 0.02": threshold(0.02),
    "threshold, tau 0.03": threshold(0.03),
    "threshold, tau 0.05": threshold(0.05),
    "random sampling, 50 draws": random_sampling(50),
    "random sampling, 68 draws": random_sampling(68),
    "top 12, renormalised": top_k(12),
    "top 50, renormalised": top_k(50),
}


def distributions(run: RunDir, positions: int):
    """The teacher's distributions at answer positions of a run, a chunk at a time."""
    recipe = run.recipe()
    teacher = recipe.teachers[0]
    model = models.load_model(teacher.model, teacher.precision)
    left = positions
    for example in read_examples(run / "examples").train:
        batch = collate([example], 0)
        with torch.inference_mode():
            hidden_ND = hidden_states(model, batch.tokens_BT)[batch.predict_BT]
            for part_ND in hidden_ND.split(CHUNK):
                yield head_logits(model, part_ND[:left]).float().softmax(-1).clone()
                left -= len(part_ND)
                if left <= 0:
                    return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--positions", type=int, default=2500)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in FORMS}
    count = 0
    for probs_NV in distributions(RunDir(options.run), options.positions):
        count += len(probs_NV)
        for name, store in FORMS.items():
            mean_NV, error, once = torch.zeros_like(probs_NV), 0.0, None
            for _ in range(DRAWS):
                once = store(probs_NV, generator)
                mean_NV += once.dense_NV / DRAWS
                error += float((once.dense_NV - probs_NV).square().sum()) / DRAWS
            assert once is not None
            far = float((mean_NV - probs_NV).square().sum())
            bias = (far - error / DRAWS) * DRAWS / (DRAWS - 1)
            sums[name] += torch.tensor([once.entries * len(probs_NV), once.nbytes * len(probs_NV), error, bias])
    rows = {name: (total / count).tolist() for name, total in sums.items()}
    print(f"{count} answer positions\n")
    print(
        "| form | entries a position | bytes a position | squared error | of it squared bias |\n|---|---|---|---|---|"
    )
    for name, (entries, nbytes, error, bias) in rows.items():
        print(f"| {name} | {entries:.1f} | {nbytes:.1f} | {error:.5f} | {max(bias, 0):.5f} |")
    print("\n" + json.dumps({"positions": count, "rows": rows}))


if __name__ == "__main__":
    main()
