"""limbeck's losses and fused loss against TRL's and Liger's own, in value and gradient. `benchmarks/losses.py` runs it.

In float64 and float32 the difference is between the two sides. In bfloat16 they round in different places, so there
each side's distance from the float64 loss of the same numbers is shown. limbeck rounds its logits once to bfloat16,
and so may be off by what that costs: 2^-9 of the greatest logit, for each of the two models. TRL's chunked kernel
projects in float32 on a CPU, and is closer; GKDTrainer under bf16=True and Liger round as limbeck does.

What is compared: TRL's `GKDTrainer.generalized_jsd_loss` (plain logits) and the torch fallback of its chunked
divergence kernel (the loss of `DistillationTrainer`); Liger's `LigerFusedLinearJSDLoss` in plain torch, both its soft
and its hard part, and its Triton kernel `LigerJSD` under Triton's interpreter. Its Triton kernels for KL and total
variation do not run in that interpreter, and need a GPU. Skew KL is defined by neither peer. TRL and Liger mean by
beta what limbeck means: the teacher's share of the mixture.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import LigerJSD
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from limbeck.signal import DenseSignal, HiddenSignal, TextSignal
from limbeck.train.fused import fused_loss
from limbeck.train.losses import Loss, forward_kl, generalized_jsd, reverse_kl
from limbeck.train.pairing import signal_loss

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 0.7, 2.0)


class Row(NamedTuple):
    """One comparison. Differences are relative to the greatest magnitude of the reference."""

    what: str
    value: float
    gradient: float
    tolerance: float
    peer: str = ""
    """In bfloat16: the peer's own distances from float64; `value` and `gradient` are then limbeck's."""

    @property
    def fits(self) -> bool:
        """Whether it is within the tolerance."""
        return max(self.value, self.gradient) <= self.tolerance


class Parts(NamedTuple):
    """What a fused loss starts from."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Parts:
        """All but the labels in another type."""
        return Parts(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in self))


Fused = Callable[[Parts], Tensor]


def by_beta(beta: float) -> Loss:
    return {0.0: Loss("forward_kl"), 1.0: Loss("reverse_kl")}.get(beta, Loss("generalized_jsd", beta))


def apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def plain(generator: torch.Generator) -> Iterator[Row]:
    """`GKDTrainer.generalized_jsd_loss` on whole logits in float64; every third position is masked."""
    student_BTV = 3 * torch.randn(3, 7, 211, generator=generator, dtype=torch.float64)
    teacher_BTV = student_BTV + torch.randn(3, 7, 211, generator=generator, dtype=torch.float64)
    labels_BT = torch.arange(21).reshape(3, 7).masked_fill(torch.arange(21).reshape(3, 7) % 3 == 0, -100)
    for beta in BETAS:
        for temperature in TEMPERATURES:

            def theirs(logits: Tensor, beta=beta, temperature=temperature) -> Tensor:
                return GKDTrainer.generalized_jsd_loss(
                    logits, teacher_BTV, labels_BT, beta, temperature, num_items_in_batch=14
                )

            def ours(logits: Tensor, beta=beta, temperature=temperature) -> Tensor:
                if beta in (0.0, 1.0):
                    loss_BT = (reverse_kl if beta else forward_kl)(logits, teacher_BTV, temperature=temperature)
                else:
                    loss_BT = generalized_jsd(logits, teacher_BTV, beta=beta, temperature=temperature)
                return loss_BT[labels_BT != -100].sum() / 14

            (mine, my_grad), (other, grad) = (with_gradient(f, student_BTV) for f in (ours, theirs))
            what = f"TRL generalized_jsd_loss, beta {beta}, temperature {temperature}, float64"
            yield Row(what, apart(mine, other), apart(my_grad, grad), 1e-10)


def triton(generator: torch.Generator) -> Iterator[Row]:
    """`LigerJSD`, which takes log-probabilities and averages over positions, in float32."""
    student_NV = 3 * torch.randn(9, 211, generator=generator)
    teacher_NV = student_NV + torch.randn(9, 211, generator=generator)
    for beta in BETAS:

        def theirs(logits: Tensor, beta=beta) -> Tensor:
            return LigerJSD(beta=beta)(logits.log_softmax(-1), teacher_NV.log_softmax(-1))

        def ours(logits: Tensor, beta=beta) -> Tensor:
            return signal_loss(logits, DenseSignal(teacher_NV), loss=by_beta(beta)).mean()

        (mine, my_grad), (other, grad) = (with_gradient(f, student_NV) for f in (ours, theirs))
        yield Row(f"Liger Triton JSD, beta {beta}, float32", apart(mine, other), apart(my_grad, grad), 1e-4)


def with_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    return value, torch.autograd.grad(value, leaf)[0]


def parts(generator: torch.Generator, n: int, vocab: int, width: int, *, bias: bool = False) -> Parts:
    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*sizes, generator=generator, dtype=torch.float64)

    hidden, weight = draw(n, width), draw(vocab, width, scale=0.4)
    near = hidden + draw(n, width, scale=0.3), weight + draw(vocab, width, scale=0.05)
    biases = (draw(vocab), draw(vocab)) if bias else (None, None)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[::4] = -100
    return Parts(hidden, weight, biases[0], *near, biases[1], labels).to(torch.bfloat16).to(torch.float64)


def run(loss: Fused, given: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """The value, and its gradients by hidden states and head, concatenated."""
    leaves = [given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()]
    value = loss(given._replace(hidden=leaves[0], weight=leaves[1]))
    return value.detach(), *torch.autograd.grad(value, leaves)


def limbeck_fused(beta: float, temperature: float = 1.0, scale: float = 1.0, softcap: float | None = None) -> Fused:
    def loss(given: Parts) -> Tensor:
        valid = given.labels != -100
        signal = HiddenSignal(
            given.teacher_hidden[valid],
            given.teacher_weight,
            len(given.teacher_weight),
            given.teacher_bias,
            scale,
            softcap,
        )
        total = fused_loss(
            given.hidden[valid],
            given.weight,
            signal,
            loss=by_beta(beta),
            temperature=temperature,
            chunk=20,
            head_bias=given.bias,
            logit_scale=scale,
            softcap=softcap,
        )
        return total / valid.sum()

    return loss


def trl_chunked(beta: float, temperature: float = 1.0, scale: float = 1.0, softcap: float | None = None) -> Fused:
    def loss(given: Parts) -> Tensor:
        valid = given.labels != -100
        return _chunked_divergence_loss(
            given.hidden[None],
            given.teacher_hidden[None],
            given.weight,
            given.teacher_weight,
            valid[None].long(),
            beta,
            num_items_in_batch=int(valid.sum()),
            student_lm_head_bias=given.bias,
            teacher_lm_head_bias=given.teacher_bias,
            student_logit_scale=scale,
            teacher_logit_scale=scale,
            student_final_logit_softcapping=softcap,
            teacher_final_logit_softcapping=softcap,
            temperature=temperature,
        )[0]

    return loss


def trl_gkd(beta: float) -> Fused:
    """As `GKDTrainer` does it under bf16=True: the head's product in the type of the inputs, the rest in float32."""

    def loss(given: Parts) -> Tensor:
        student_1NV = (given.hidden @ given.weight.T)[None].float()
        teacher_1NV = (given.teacher_hidden @ given.teacher_weight.T)[None].float()
        return GKDTrainer.generalized_jsd_loss(student_1NV, teacher_1NV, given.labels[None], beta)

    return loss


def liger_jsd(beta: float, temperature: float = 1.0, *, hard: bool = False) -> Fused:
    def loss(given: Parts) -> Tensor:
        function = LigerFusedLinearJSDLoss(
            weight_hard_loss=float(hard),
            weight_soft_loss=float(not hard),
            beta=beta,
            temperature=temperature,
            compiled=False,
            chunk_size=16,
        )
        return function(
            given.hidden,
            given.weight,
            given.teacher_hidden,
            given.teacher_weight,
            given.labels,
            given.bias,
            given.teacher_bias,
        )

    return loss


def limbeck_cross_entropy(given: Parts) -> Tensor:
    valid = given.labels != -100
    signal = TextSignal(given.labels[valid], len(given.weight))
    total = fused_loss(given.hidden[valid], given.weight, signal, loss="cross_entropy", head_bias=given.bias)
    return total / valid.sum()


def same_precision(what: str, ours: Fused, theirs: Fused, given: Parts, tolerance: float) -> Row:
    mine, other = run(ours, given), run(theirs, given)
    gradient = max(apart(a, b) for a, b in zip(mine[1:], other[1:], strict=True))
    return Row(what, apart(mine[0], other[0]), gradient, tolerance)


def from_float64(what: str, ours: Fused, theirs: Fused, given: Parts, truth: Fused) -> Row:
    """Both in bfloat16 against `truth` in float64, which starts from the same bfloat16 numbers."""
    true = run(truth, given)
    heads = (given.hidden, given.weight), (given.teacher_hidden, given.teacher_weight)
    rounding = sum(float((hidden @ weight.T).abs().max()) * 2**-9 for hidden, weight in heads)
    distances = []
    for side in (ours, theirs):
        found = run(side, given.to(torch.bfloat16))
        distances.append((apart(found[0], true[0]), max(map(apart, found[1:], true[1:]))))
    return Row(what, *distances[0], rounding, f"{distances[1][0]:.1e}, {distances[1][1]:.1e}")


def plain_truth(beta: float) -> Fused:
    """The plain form of limbeck, which float64 comparisons above hold to TRL's."""

    def loss(given: Parts) -> Tensor:
        valid = given.labels != -100
        signal = HiddenSignal(given.teacher_hidden[valid], given.teacher_weight, len(given.teacher_weight))
        return signal_loss(given.hidden[valid] @ given.weight.T, signal, loss=by_beta(beta)).mean()

    return loss


def fused(generator: torch.Generator) -> Iterator[Row]:
    small = parts(generator, 48, 307, 24).to(torch.float32)
    biased = parts(generator, 48, 307, 24, bias=True).to(torch.float32)
    wide = parts(generator, 12, 40_000, 16).to(torch.float32)  # beyond one tile of TRL's, which is 32,768 ids wide
    for beta in BETAS:
        for temperature in TEMPERATURES:
            ours, name = limbeck_fused(beta, temperature), f"beta {beta}, temperature {temperature}, float32"
            yield same_precision(f"TRL chunked, {name}", ours, trl_chunked(beta, temperature), small, 1e-4)
            yield same_precision(f"Liger fused JSD, {name}", ours, liger_jsd(beta, temperature), small, 1e-4)
        pairs = limbeck_fused(beta, 1.0, 0.5, 4.0), trl_chunked(beta, 1.0, 0.5, 4.0)
        yield same_precision(f"TRL chunked, beta {beta}, bias, scale 0.5, softcap 4, float32", *pairs, biased, 1e-4)
        pairs = limbeck_fused(beta), liger_jsd(beta)
        yield same_precision(f"Liger fused JSD, beta {beta}, bias, float32", *pairs, biased, 1e-4)
        pairs = limbeck_fused(beta), trl_chunked(beta)
        yield same_precision(f"TRL chunked, beta {beta}, 40,000 ids, float32", *pairs, wide, 1e-4)
    hard = limbeck_cross_entropy, liger_jsd(0.5, hard=True)
    yield same_precision("Liger hard loss (cross-entropy), bias, float32", *hard, biased, 1e-4)
    rounded = parts(generator, 64, 4099, 64)
    for beta in BETAS:
        truth = plain_truth(beta)
        pairs = limbeck_fused(beta), trl_chunked(beta)
        yield from_float64(f"TRL chunked, beta {beta}, bfloat16", *pairs, rounded, truth)
        pairs = limbeck_fused(beta), trl_gkd(beta)
        yield from_float64(f"TRL GKDTrainer, beta {beta}, bfloat16", *pairs, rounded, truth)
        pairs = limbeck_fused(beta), liger_jsd(beta)
        yield from_float64(f"Liger fused JSD, beta {beta}, bfloat16", *pairs, rounded, truth)


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    rows = [*plain(generator), *triton(generator), *fused(generator)]
    print("| against | value | gradient | allowed | peer from float64: value, gradient | |\n|---|---|---|---|---|---|")
    for row in rows:
        found = f"{row.value:.1e} | {row.gradient:.1e} | {row.tolerance:.1e}"
        print(f"| {row.what} | {found} | {row.peer} | {'' if row.fits else 'BEYOND'} |")
    beyond = sum(not row.fits for row in rows)
    print(f"\n{len(rows)} comparisons, {beyond} beyond tolerance")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
