"""Loss and training step on a GPU, limbeck against plain logits, Liger and TRL: `python benchmarks/gpu.py --out DIR`.

Part `loss`: forward and backward of the loss alone, 8,192 positions of 2,048 numbers, vocabularies of 128,256 and
262,144, everything in bfloat16, on random numbers. Milliseconds by CUDA events, medians after a warm-up that compiles;
memory is the most that was allocated at a time, less what was there before: the gradients that come out are in it.

Part `step`: whole optimiser steps with `gpu_steps.py`, each case once after warm-up steps.

Peers run where their packages are installed and are left out, by name, elsewhere. On a CPU (`--small` for sizes that
finish) there are times but no memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from bench import say_machine, table, write_report
from torch import Tensor

from limbeck.models import compiling
from limbeck.signal.sampling import threshold_sample, topk_signal
from limbeck.signal.types import HiddenSignal
from limbeck.train.fused import fused_loss

PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "trl", "flash-attn")


class Sizes(NamedTuple):
    """Of the loss alone."""

    positions: int
    width: int
    teachers_width: int
    vocabulary: int


SIZES = (Sizes(8192, 2048, 3072, 128_256), Sizes(8192, 2048, 3072, 262_144))
SMALL = (Sizes(96, 32, 48, 600),)


class Figures(NamedTuple):
    """Of one case."""

    milliseconds: float
    peak_bytes: float
    nats: float
    """The loss, to see that two cases compute the same."""


Case = Callable[[Tensor, Tensor], Tensor]
"""From the student's hidden states and head to the mean loss a position."""


def machine(device: str) -> dict[str, str]:
    """The machine in words."""
    words = {"versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES)}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        words = {
            "card": f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} units"
        } | words
        words["driver's CUDA"] = str(torch.version.cuda)
        words["compiled kernels"] = compiling.missing() or "used"
    return words


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"


def matrix_peak(device: str, side: int) -> float:
    """Operations a second of a bf16 product of two square matrices of random numbers, the best of 20."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [milliseconds(device, lambda: torch.mm(a, b)) / 1e3 for _ in range(23)][3:]
    return 2 * side**3 / min(seconds)


def milliseconds(device: str, work: Callable[[], object]) -> float:
    """How long it takes, by the device's own clock."""
    if device == "cpu":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(device: str, case: Case, sizes: Sizes, *, warm: int = 2, rounds: int = 7) -> Figures:
    """Forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = _normal(generator, sizes.positions, sizes.width).requires_grad_()
    weight = (_normal(generator, sizes.vocabulary, sizes.width) * 0.06).requires_grad_()
    nats = 0.0

    def work() -> None:
        nonlocal nats
        loss = case(hidden, weight)
        torch.autograd.grad(loss, (hidden, weight))
        nats = loss.detach()

    for _ in range(warm):
        work()
    gc.collect()
    before = 0
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(device, work) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else float("nan")
    return Figures(statistics.median(times), peak, float(nats))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)


class Teacher(NamedTuple):
    """Hidden states, head, and what is derived from them."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor


def teacher_of(device: str, sizes: Sizes) -> Teacher:
    generator = torch.Generator(device).manual_seed(1)
    hidden = _normal(generator, sizes.positions, sizes.teachers_width)
    weight = _normal(generator, sizes.vocabulary, sizes.teachers_width) * 0.07
    return Teacher(hidden, weight, (hidden @ weight[: min(sizes.vocabulary, 5000)].T).argmax(1))


def ours(teacher: Teacher, sizes: Sizes) -> Iterator[tuple[str, Case]]:
    """Limbeck's cases."""
    n, v = sizes.positions, sizes.vocabulary
    some = (teacher.hidden_ND[:256] @ teacher.weight_VD.T).float()
    device = some.device
    sampled = threshold_sample(torch.softmax(some, 1), 0.02, generator=torch.Generator(device).manual_seed(2))
    sampled = sampled.index_select(torch.arange(n, device=device) % len(some))
    likely = topk_signal(some, min(50, v // 4)).index_select(torch.arange(n, device=device) % len(some))
    live = HiddenSignal(teacher.hidden_ND, teacher.weight_VD, v)
    each_N = torch.full((n,), 1 / n, device=device)  # as the trainer divides
    del some
    signals = {"a threshold sample": sampled, "the live teacher": live, "the teacher's top 50": likely}
    for name, signal in signals.items():
        yield (
            f"limbeck, forward KL to {name}",
            lambda hidden, weight, signal=signal: fused_loss(
                hidden, weight, signal, loss="forward_kl", weights=each_N, allow_biased=True
            ),
        )


def plain(teacher: Teacher, sizes: Sizes) -> Iterator[tuple[str, Case]]:
    """All logits at once, in float32 as transformers and TRL compute a loss."""

    def forward_kl(hidden: Tensor, weight: Tensor) -> Tensor:
        log_q = (hidden @ weight.T).float().log_softmax(-1)
        with torch.no_grad():
            log_p = (teacher.hidden_ND @ teacher.weight_VD.T).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / sizes.positions

    yield "plain logits, forward KL to the live teacher", forward_kl
    yield (
        "plain logits, cross-entropy",
        lambda hidden, weight: torch.nn.functional.cross_entropy((hidden @ weight.T).float(), teacher.targets_N),
    )


def liger(teacher: Teacher, _sizes: Sizes) -> Iterator[tuple[str, Case]]:
    """Liger's fused losses, those that are installed. beta = 0 is the forward KL."""
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return
    chunks, theirs = import_module("liger_kernel.chunked_loss"), import_module("liger_kernel.transformers")
    for accum in (None, torch.float32):
        note = ", sums in float32" if accum else ""
        jsd = theirs.LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=accum)
        yield (
            f"Liger LigerFusedLinearJSD{note}, forward KL to the live teacher",
            lambda h, w, jsd=jsd: jsd(h, w, teacher.hidden_ND, teacher.weight_VD, None),
        )
        entropy = theirs.LigerFusedLinearCrossEntropyLoss(accum_dtype=accum)
        yield (
            f"Liger LigerFusedLinearCrossEntropyLoss{note}",
            lambda h, w, entropy=entropy: entropy(w, h, teacher.targets_N),
        )
    chunked = chunks.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    yield (
        "Liger LigerFusedLinearJSDLoss, forward KL to the live teacher",
        lambda h, w: chunked(h, w, teacher.hidden_ND, teacher.weight_VD, teacher.targets_N),
    )


def losses(device: str, all_sizes: tuple[Sizes, ...], only: str, rounds: int) -> str:
    """The table of part `loss`."""
    from limbeck.signal.types import TextSignal

    rows = []
    for sizes in all_sizes:
        teacher = teacher_of(device, sizes)
        text = TextSignal(teacher.targets_N, sizes.vocabulary)
        each_N = torch.full((sizes.positions,), 1 / sizes.positions, device=device)
        cases = [
            *ours(teacher, sizes),
            (
                "limbeck, cross-entropy",
                lambda h, w, s=text, e=each_N: fused_loss(h, w, s, loss="cross_entropy", weights=e),
            ),
            *liger(teacher, sizes),
            *plain(teacher, sizes),
        ]
        for name, case in cases:
            if only not in name:
                continue
            found = attempt(name, lambda case=case, sizes=sizes: measure(device, case, sizes, rounds=rounds))
            rows.append([f"{sizes.vocabulary:,}", name, *shown(found)])
            free(device)
        del teacher, cases, text
        free(device)
    return table(["vocabulary", "loss, forward and backward", "ms", "peak GiB", "loss, nats"], rows)


def shown(found: Figures | str) -> list[str]:
    if isinstance(found, str):
        return [found, "", ""]
    return [f"{found.milliseconds:,.1f}", f"{found.peak_bytes / 2**30:.2f}", f"{found.nats:.4f}"]


def attempt(name: str, work: Callable[[], Figures]) -> Figures | str:
    """The figures, or why there are none: a peer may not fit the memory, or not the versions that are here."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        return work()
    except torch.OutOfMemoryError:
        return "out of memory"
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        print(f"{name}: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
        return f"failed: {type(error).__name__}"


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("loss", "step", "all"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="sizes that a CPU finishes in seconds")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions of a loss")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a case")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, about (part step)")
    parser.add_argument("--profile", action="store_true", help="part step: where the time of a case goes, by kernel")
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.md and gpu.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    words = machine(options.device)
    peak = matrix_peak(options.device, 256 if options.small else 8192)
    words["bf16 products"] = f"{peak / 1e12:,.2f} TFLOP/s"
    parts = [say_machine(words)]
    if options.part != "step":
        parts.append(losses(options.device, SMALL if options.small else SIZES, options.only, options.rounds))
    if options.part != "loss":
        from gpu_steps import steps

        parts.append(steps(options, peak))
    write_report(options.out, "gpu", "\n\n".join(parts), dict(words))


if __name__ == "__main__":
    main()
