"""Divergences between teacher and student, and which signals each can use without bias.

Conventions that hold for every function here.

- Arguments are raw logits [..., V] of the student and of the teacher over the same V token ids; results are
  nats a position [...], never averaged. Gradients reach the student only.
- Both distributions are softmax(logits / temperature). No factor temperature^2 is applied: where one is
  wanted (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2, to keep gradients of one size), it is the
  `weight` of the `Loss`, in plain sight.
- Everything is computed in float32, or float64 for float64 logits, whatever the inputs are. 0 log 0 is 0; a
  teacher logit of -inf is a token the teacher rules out. A divergence that is infinite comes out as
  infinity: KL(student || teacher) is, as soon as the student gives any mass to a token that the teacher
  rules out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from limbeck.errors import InputError, Problem, RecipeError
from limbeck.signal.types import SignalKind


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), nats a position."""
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher), nats a position."""
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_q, log_p)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalized Jensen-Shannon divergence, nats a position (Agarwal et al., arXiv 2306.13649).

    With the mixture m = beta * teacher + (1 - beta) * student, it is beta * KL(teacher || m) + (1 - beta) *
    KL(student || m), which vanishes towards both ends. As in TRL and Liger, the ends stand for the
    divergences whose direction the gradient takes there: beta = 0 is forward KL, the limit of the value
    over beta, and beta = 1 is reverse KL, the limit of the value over 1 - beta.
    """
    _check_share("beta", beta)
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(teacher || alpha * teacher + (1 - alpha) * student), nats a position (DistiLLM, arXiv 2402.03898).

    alpha = 0 is forward KL. It is never more than ln(1 / alpha).
    """
    _check_share("alpha", alpha)
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(student || (1 - alpha) * teacher + alpha * student), nats a position (DistiLLM, arXiv 2402.03898).

    alpha = 0 is reverse KL: alpha is the share of the distribution on the left, as in `skew_kl`.
    """
    _check_share("alpha", alpha)
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return _kl(log_q, _log_mixture(log_p, log_q, 1 - alpha))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Total variation distance, half the sum of |teacher - student| over tokens: a share from 0 to 1, not
    nats.
    """
    log_q, log_p = log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def cross_entropy(student_logits: Tensor, target_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Minus the student's log-probability of each target token, nats a position; `target_ids` [...] all in
    range.
    """
    check_temperature(temperature)
    log_q = torch.log_softmax(wide(student_logits) / temperature, dim=-1)
    return -log_q.gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1)


def shared_range(student_logits: Tensor, teacher_logits: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Both logits cut to the ids below `vocab`, the tokenizer's size; the loss's softmax renormalises them.

    Heads of one tokenizer are padded to different widths, and what a padded row says means nothing. A head
    with fewer ids than the tokenizer raises `InputError`.
    """
    problems = [
        Problem(name, f"{logits.shape[-1]} ids", f"at least {vocab}", "this head has another tokenizer")
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits))
        if logits.shape[-1] < vocab
    ]
    if problems:
        raise InputError("the heads do not cover the tokenizer", problems)
    return student_logits[..., :vocab], teacher_logits[..., :vocab]


Bias = Literal["none", "biased", "unusable"]


class Pairing(NamedTuple):
    """What a loss makes of a signal: `none` if its expectation is the loss itself, else why not."""

    bias: Bias
    why: str = ""


_EXACT = Pairing("none")
_COARSE = Pairing("biased", "the tail is one bucket: a lower bound, blind to how the student spreads its tail")
_NOT_LINEAR = Pairing(
    "unusable", "it is not linear in the teacher's probabilities, and a sample leaves most of them out"
)
_NO_TEACHER = Pairing("unusable", "text holds no distribution of the teacher")
_NO_ENTROPY = Pairing(
    "unusable",
    "text has the gradient of forward KL in expectation, but without the teacher's entropy not its value; "
    "that loss is cross_entropy",
)
_WHOLE: Mapping[SignalKind, Pairing] = {
    "text": _NO_TEACHER,
    "sampled": _NOT_LINEAR,
    "top_k": _COARSE,
    "hidden": _EXACT,
    "dense": _EXACT,
}


class Declaration(NamedTuple):
    """A loss as a function of two logits, what each signal is to it, and its parameter if it has one."""

    function: Callable[..., Tensor] | None
    pairings: Mapping[SignalKind, Pairing]
    parameter: str | None = None
    default: float | None = None


LOSSES: Mapping[str, Declaration] = {
    "forward_kl": Declaration(forward_kl, {**_WHOLE, "text": _NO_ENTROPY, "sampled": _EXACT}),
    "reverse_kl": Declaration(reverse_kl, _WHOLE),
    "generalized_jsd": Declaration(generalized_jsd, _WHOLE, "beta", 0.5),
    "skew_kl": Declaration(skew_kl, _WHOLE, "alpha", 0.1),
    "skew_reverse_kl": Declaration(skew_reverse_kl, _WHOLE, "alpha", 0.1),
    "total_variation": Declaration(total_variation, _WHOLE),
    "cross_entropy": Declaration(None, {**_WHOLE, "text": _EXACT, "sampled": _EXACT}),
}
"""Every loss by name. `cross_entropy` against a distribution is forward KL plus the teacher's entropy."""


@dataclass(frozen=True)
class Loss:
    """One term: a loss with its parameter, its weight in a sum, and what it is computed against.

    `on` picks a signal where several are given; without it a term takes the first. `temperature` overrides
    the call's. A weight of temperature^2 is the factor of Hinton et al., if it is wanted.
    """

    name: str
    parameter: float | None = None
    weight: float = 1.0
    on: SignalKind | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            problem = Problem("loss", repr(self.name), f"one of {', '.join(LOSSES)}")
            raise RecipeError("no such loss", [problem])
        declared = LOSSES[self.name]
        if self.parameter is not None and declared.parameter is None:
            problem = Problem(f"loss {self.name}", f"parameter {self.parameter}", "none: this loss has no parameter")
            raise RecipeError("a parameter too many", [problem])
        if declared.parameter is not None:
            _check_share(declared.parameter, self.value)
        if not math.isfinite(self.weight):
            problem = Problem(f"loss {self.name}", f"weight {self.weight}", "a finite number")
            raise RecipeError("not a weight", [problem])

    @property
    def value(self) -> float:
        """The parameter, or the loss's default; 0 for a loss that has none."""
        default = LOSSES[self.name].default
        return self.parameter if self.parameter is not None else default or 0.0


LossSpec = str | Loss | Sequence[Loss]
"""A loss by name, with its parameter, or a weighted sum of several."""


def terms_of(loss: LossSpec) -> tuple[Loss, ...]:
    """The terms of the weighted sum that `loss` is; `RecipeError` for an unknown name or no terms."""
    terms = (Loss(loss),) if isinstance(loss, str) else (loss,) if isinstance(loss, Loss) else tuple(loss)
    if not terms:
        raise RecipeError("a loss without terms", [Problem("loss", "an empty list", "at least one term")])
    return terms


def check_pairing(
    loss: LossSpec,
    signal_kind: SignalKind,
    *,
    allow_biased: bool = False,
    kinds: Collection[SignalKind] = get_args(SignalKind),
) -> tuple[Pairing, ...]:
    """How each term of `loss` pairs with its signal: the kind it names, or else `signal_kind`. `kinds` are those that
    can be had instead, which a remedy names.

    Raises `RecipeError` for a biased pairing without `allow_biased`, and for one that has no meaning at all.
    """
    terms = terms_of(loss)
    taken: list[SignalKind] = [term.on or signal_kind for term in terms]
    pairings = tuple(LOSSES[t.name].pairings[kind] for t, kind in zip(terms, taken, strict=True))
    problems = []
    for term, kind, pairing in zip(terms, taken, pairings, strict=True):
        if pairing.bias == "none" or (pairing.bias == "biased" and allow_biased):
            continue
        where, found = f"loss {term.name} with signal {kind}", f"{pairing.bias}: {pairing.why}"
        problems.append(Problem(where, found, "a pairing without bias", _remedy(term.name, kind, pairing, kinds)))
    if problems:
        raise RecipeError("this loss cannot be computed from this signal", problems)
    return pairings


def _remedy(name: str, kind: SignalKind, pairing: Pairing, kinds: Collection[SignalKind]) -> str:
    """What to do instead of a biased or unusable pairing."""
    ways = []
    if usable := [k for k, p in LOSSES[name].pairings.items() if p.bias == "none" and k in kinds]:
        ways.append(f"use a signal of kind {', '.join(usable)}")
    elif losses := [other for other, declared in LOSSES.items() if declared.pairings[kind].bias == "none"]:
        ways.append(f"use the loss {', '.join(losses)}")
    if pairing.bias == "biased":
        ways.append("set allow_biased: true beside the loss, which the report then states")
    return ", or ".join(ways) or "use another loss with another kind of signal"


def wide(logits: Tensor) -> Tensor:
    """The logits in float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, in one type; the teacher's without gradient."""
    check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        problem = Problem(
            "teacher_logits",
            f"shape {list(teacher_logits.shape)}",
            f"the student's, {list(student_logits.shape)}",
            "cut heads of one tokenizer that are padded differently with shared_range",
        )
        raise InputError("logits that cannot be compared", [problem])
    dtype = torch.promote_types(wide(student_logits[:0]).dtype, wide(teacher_logits[:0]).dtype)
    log_q = torch.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    return log_q, torch.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)


def expectation(probs: Tensor, values: Tensor) -> Tensor:
    """Sum of probability times value; a token of no probability adds nothing, whatever its value."""
    return (probs * values.masked_fill(probs == 0, 0)).sum(dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return expectation(log_a.exp(), log_a - log_b)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Logarithm of share * p + (1 - share) * q."""
    a = log_p + (math.log(share) if share > 0 else -math.inf)
    b = log_q + (math.log1p(-share) if share < 1 else -math.inf)
    # Where both are 0 the gradient of logaddexp is not a number, though nothing depends on the value there.
    nowhere = (a == -torch.inf) & (b == -torch.inf)
    log_m = torch.logaddexp(a.masked_fill(nowhere, 0), b.masked_fill(nowhere, 0))
    return log_m.masked_fill(nowhere, -torch.inf)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise RecipeError("not a share", [Problem(name, str(share), "a number from 0 to 1")])


def check_temperature(temperature: float) -> None:
    """`RecipeError` unless it is a positive number."""
    if not 0 < temperature < math.inf:
        problem = Problem("temperature", str(temperature), "a positive number")
        raise RecipeError("not a temperature", [problem])
