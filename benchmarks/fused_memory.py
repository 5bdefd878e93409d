"""Memory and time of a loss over a large vocabulary, fused against plain logits: `python benchmarks/fused_memory.py`.

Each case runs in a process of its own: forward and backward of forward KL against a threshold sample (and against the
teacher's hidden states), for 4,096 positions of a model of the size of Gemma 3 270M (640 wide, 262,144 tokens). Peak
memory is the most that was resident from where the loss began (Linux counts the peak anew there), less what was
resident at that moment; the gradients that come out are in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench import peak_bytes

from limbeck.signal.sampling import threshold_sample
from limbeck.signal.types import HiddenSignal
from limbeck.train.fused import fused_loss
from limbeck.train.pairing import signal_loss

CASES = ("fused sampled", "plain sampled", "fused hidden", "plain hidden")


def one(case: str, positions: int, width: int, vocabulary: int) -> dict[str, float]:
    """Seconds and peak bytes of one case."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.05).to(torch.bfloat16).requires_grad_()
    if case.endswith("hidden"):
        teacher = torch.randn(positions, width, generator=generator).to(torch.bfloat16)
        signal = HiddenSignal(teacher, weight.detach().clone(), vocabulary)
    else:
        few = threshold_sample(
            torch.randn(64, vocabulary, generator=generator).mul_(3).softmax(-1), 0.02, generator=generator
        )
        signal = few.index_select(torch.arange(positions) % 64)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak, VmHWM, to what is resident now
    before = peak_bytes()
    start = time.perf_counter()
    if case.startswith("fused"):
        loss = fused_loss(hidden, weight, signal, loss="forward_kl")
    else:
        loss = signal_loss(hidden @ weight.T, signal, loss="forward_kl").sum()
    loss.backward()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": float(peak_bytes() - before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(one(options.case, options.positions, options.width, options.vocabulary)))
        return
    sizes = ["--positions", options.positions, "--width", options.width, "--vocabulary", options.vocabulary]
    results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, *map(str, sizes)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                results[case].append(json.loads(done.stdout))
    print("| case | seconds, median | peak GiB, median | runs |\n|---|---|---|---|")
    for case, runs in results.items():
        if runs:
            seconds, peak = (statistics.median(r[k] for r in runs) for k in ("seconds", "peak_bytes"))
            print(f"| {case} | {seconds:.2f} | {peak / 2**30:.2f} | {len(runs)} |")
        else:
            print(f"| {case} | did not finish | | 0 |")


if __name__ == "__main__":
    main()
