"""Laws of the losses: closed forms, an independent version, gradient checks, the traps of other trainers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import InputError, RecipeError
from limbeck.signal import DenseSignal, from_logits, topk_signal
from limbeck.train import losses
from limbeck.train.losses import LOSSES, Loss
from limbeck.train.pairing import signal_loss

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "generalized_jsd": losses.generalized_jsd,
    "skew_kl": losses.skew_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "total_variation": losses.total_variation,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two(rows: int = 5, vocab: int = 7, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher, float64."""
    logits = torch.randn(2, rows, vocab, generator=seeded(seed), dtype=torch.float64) * scale
    return logits[0], logits[1]


def logs(*probs: float) -> Tensor:
    return torch.tensor([probs], dtype=torch.float64).log()


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) by its definition, one token at a time."""
    return math.fsum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a > 0)


def slow(name: str, p: np.ndarray, q: np.ndarray, share: float) -> float:
    """Each divergence from probabilities of teacher p and student q, by its definition."""
    if name == "forward_kl":
        return slow_kl(p, q)
    if name == "reverse_kl":
        return slow_kl(q, p)
    if name == "generalized_jsd":
        if share in (0, 1):
            return slow_kl(q, p) if share else slow_kl(p, q)
        m = share * p + (1 - share) * q
        return share * slow_kl(p, m) + (1 - share) * slow_kl(q, m)
    if name == "skew_kl":
        return slow_kl(p, share * p + (1 - share) * q)
    if name == "skew_reverse_kl":
        return slow_kl(q, (1 - share) * p + share * q)
    return 0.5 * math.fsum(abs(p - q))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.73, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_definition(name: str, share: float, temperature: float) -> None:
    student, teacher = two()
    parameter = LOSSES[name].parameter
    found = DIVERGENCES[name](student, teacher, temperature=temperature, **({parameter: share} if parameter else {}))
    expected = [
        slow(name, softmax(t / temperature), softmax(s / temperature), share)
        for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_closed_forms_of_two_tokens() -> None:
    # Teacher (1/2, 1/2), student (1/4, 3/4).
    student, teacher = logs(0.25, 0.75), logs(0.5, 0.5)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert losses.forward_kl(student, teacher).item() == pytest.approx(forward, rel=1e-12)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(reverse, rel=1e-12)
    assert losses.total_variation(student, teacher).item() == pytest.approx(0.25, rel=1e-12)
    assert losses.cross_entropy(student, torch.tensor([0])).item() == pytest.approx(math.log(4), rel=1e-12)
    # Half of each: the mixture is (3/8, 5/8).
    jsd = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5) + 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
    assert losses.generalized_jsd(student, teacher).item() == pytest.approx(jsd, rel=1e-12)


def test_closed_forms_of_distributions_that_share_no_token() -> None:
    # KL to a mixture that holds a share a of oneself is then ln(1/a).
    student, teacher = logs(0.0, 0.3, 0.7), logs(1.0, 0.0, 0.0)
    assert losses.forward_kl(student, teacher).item() == math.inf
    assert losses.reverse_kl(student, teacher).item() == math.inf
    assert losses.total_variation(student, teacher).item() == 1
    assert losses.generalized_jsd(student, teacher).item() == pytest.approx(math.log(2), rel=1e-12)
    assert losses.skew_kl(student, teacher, alpha=0.1).item() == pytest.approx(math.log(10), rel=1e-12)
    assert losses.skew_reverse_kl(student, teacher, alpha=0.1).item() == pytest.approx(math.log(10), rel=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 20), shift=st.floats(-50, 50))
def test_divergences_are_zero_at_the_teacher_positive_elsewhere_and_blind_to_a_shift(
    name: str, seed: int, scale: float, shift: float
) -> None:
    student, teacher = two(3, 6, scale, seed)
    assert DIVERGENCES[name](teacher, teacher).abs().max() < 1e-12
    value = DIVERGENCES[name](student, teacher)
    assert (value > -1e-14).all()
    torch.testing.assert_close(DIVERGENCES[name](student + shift, teacher - shift), value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_cross_entropy_equals_the_definition(temperature: float) -> None:
    student, ids = two()[0], [3, 0, 6, 6, 2]
    found = losses.cross_entropy(student, torch.tensor(ids), temperature=temperature)
    expected = [-math.log(softmax(s / temperature)[i]) for s, i in zip(student.numpy(), ids, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "share"),
    [(n, share) for n in DIVERGENCES for share in ((0.0, 0.3, 1.0) if LOSSES[n].parameter else (None,))],
)
def test_gradient_by_finite_differences(name: str, share: float | None) -> None:
    student, teacher = two(3, 5, 1.0)
    student.requires_grad_()
    parameter = LOSSES[name].parameter
    given = {parameter: share} if parameter else {}
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher, temperature=1.6, **given), student)


def test_gradients_in_closed_form() -> None:
    # By the student's logits: (q - p) / T of forward KL, q (ln q - ln p - KL(q || p)) / T of reverse KL.
    student, teacher = two()
    student.requires_grad_()
    q, p = torch.softmax(student.detach() / 1.6, 1), torch.softmax(teacher / 1.6, 1)
    log_ratio = (q / p).log()
    expected = {
        losses.forward_kl: (q - p) / 1.6,
        losses.reverse_kl: q * (log_ratio - (q * log_ratio).sum(1, keepdim=True)) / 1.6,
    }
    for function, grad in expected.items():
        value = function(student, teacher, temperature=1.6)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], grad)


def test_gradient_of_cross_entropy_by_finite_differences() -> None:
    student = two(3, 5, 1.0)[0].requires_grad_()
    ids = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda s: losses.cross_entropy(s, ids, temperature=0.7), student)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = (x.requires_grad_() for x in two())
    DIVERGENCES[name](student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "reverse_kl"])
def test_a_token_the_teacher_rules_out_leaves_value_and_gradient_finite(name: str) -> None:
    student, teacher = two()
    student.requires_grad_()
    teacher[:, 2] = -math.inf
    value = DIVERGENCES[name](student, teacher)
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert losses.reverse_kl(student, teacher).isinf().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_that_both_rule_out_counts_for_nothing(name: str) -> None:
    student, teacher = two()
    dead_s, dead_t = student.clone(), teacher.clone()
    dead_s[:, 2] = dead_t[:, 2] = -math.inf
    dead_s.requires_grad_()
    value = DIVERGENCES[name](dead_s, dead_t)
    (grad,) = torch.autograd.grad(value.sum(), dead_s)
    rest = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(value, DIVERGENCES[name](student[:, rest], teacher[:, rest]))
    assert torch.equal(grad[:, 2], torch.zeros(5, dtype=torch.float64))


# The traps: mistakes found in other trainers, by their number in docs/correctness.md.


def test_trap_04_beta_0_is_forward_kl_beta_1_is_reverse_kl_and_beta_weighs_the_teacher() -> None:
    student, teacher = two()
    assert torch.equal(losses.generalized_jsd(student, teacher, beta=0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.generalized_jsd(student, teacher, beta=1), losses.reverse_kl(student, teacher))
    # The limits that these ends stand for: of the value over beta, and over 1 - beta.
    for beta, end in ((1e-7, losses.forward_kl), (1 - 1e-7, losses.reverse_kl)):
        value = losses.generalized_jsd(student, teacher, beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(value, end(student, teacher), rtol=1e-5, atol=1e-8)
    # Where they share no token, KL(teacher || m) is ln(1 / beta) only if beta is the teacher's share.
    value = losses.generalized_jsd(logs(0.0, 1.0), logs(1.0, 0.0), beta=0.2)
    assert value.item() == pytest.approx(0.2 * math.log(1 / 0.2) + 0.8 * math.log(1 / 0.8), rel=1e-12)


def test_trap_04_alpha_0_of_the_skewed_divergences_is_plain_kl() -> None:
    student, teacher = two()
    assert torch.equal(losses.skew_kl(student, teacher, alpha=0), losses.forward_kl(student, teacher))
    assert torch.equal(losses.skew_reverse_kl(student, teacher, alpha=0), losses.reverse_kl(student, teacher))


def leaky() -> tuple[Tensor, Tensor]:
    """A student in proportion to the teacher on its two likeliest tokens, which leaks nearly all mass."""
    return logs(0.0006, 0.0003, 0.9991), logs(0.66, 0.33, 0.01)


def test_trap_05_top_k_sees_mass_that_leaks_out_of_the_list_and_says_it_is_biased() -> None:
    student, teacher = leaky()
    signal = topk_signal(teacher, 2)
    with pytest.raises(RecipeError, match="biased: the tail is one bucket"):
        signal_loss(student, signal, loss="forward_kl")
    value = signal_loss(student, signal, loss="forward_kl", allow_biased=True)
    torch.testing.assert_close(value, losses.forward_kl(student, teacher), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 9), scale=st.floats(0.1, 12))
def test_trap_05_top_k_is_never_negative_and_never_above_the_divergence(seed: int, k: int, scale: float) -> None:
    student, teacher = two(4, 9, scale, seed)
    for name, function in DIVERGENCES.items():
        value = signal_loss(student, topk_signal(teacher, k), loss=name, allow_biased=True)
        assert (value >= -1e-6).all()
        assert (value <= function(student, teacher) * (1 + 1e-4) + 1e-6).all()
        if k == 9:
            torch.testing.assert_close(value, function(student, teacher), rtol=1e-4, atol=1e-6)


def test_trap_06_top_k_reverse_kl_does_not_reward_leaving_the_list() -> None:
    student, teacher = leaky()
    student.requires_grad_()
    loss = signal_loss(student, topk_signal(teacher, 2), loss="reverse_kl", allow_biased=True)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    # Descending moves mass from the tail back into the list.
    assert grad[0, 2] > 0
    assert (grad[0, :2] < 0).all()


def test_trap_08_heads_padded_to_different_widths_compare_over_the_shared_range() -> None:
    student, teacher = two()
    padded_s = torch.cat([student, torch.zeros(5, 3, dtype=torch.float64)], dim=1)
    padded_t = torch.cat([teacher, torch.full((5, 1), 30.0, dtype=torch.float64)], dim=1)
    cut = losses.shared_range(padded_s, padded_t, 7)
    assert torch.equal(losses.forward_kl(*cut), losses.forward_kl(student, teacher))
    signal = DenseSignal(teacher)
    assert torch.equal(signal_loss(padded_s, signal, loss="reverse_kl"), losses.reverse_kl(student, teacher))
    with pytest.raises(InputError, match=r"shared_range"):
        losses.forward_kl(padded_s, padded_t)
    with pytest.raises(InputError, match=r"teacher_logits\s+found: +8 ids\s+expected: at least 9"):
        losses.shared_range(padded_s, padded_t, 9)


def test_trap_10_no_factor_temperature_squared_is_hidden_and_the_gradient_shows_which_was_asked_for() -> None:
    # At a high temperature the gradient of KL falls as 1 / T^2; the explicit weight brings it back.
    student, teacher = two(4, 6, 1.0)
    student.requires_grad_()

    def gradient(loss: str | Loss, temperature: float) -> Tensor:
        value = signal_loss(student, DenseSignal(teacher), loss=loss, temperature=temperature)
        return torch.autograd.grad(value.sum(), student)[0]

    s, t = student.detach(), teacher
    limit = (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)) / 6
    torch.testing.assert_close(gradient("forward_kl", 1e3) * 1e6, limit, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gradient(Loss("forward_kl", weight=1e6), 1e3), limit, rtol=1e-2, atol=1e-3)


def test_trap_10_probabilities_taken_at_one_temperature_are_not_compared_at_another() -> None:
    student, teacher = two()
    for signal in (from_logits(teacher, 0.1, 0.7, generator=seeded(0)), topk_signal(teacher, 3, 0.7)):
        with pytest.raises(RecipeError, match=r"temperature 1\.0 against probabilities taken at 0\.7"):
            signal_loss(student, signal, loss="forward_kl", allow_biased=True)
        assert len(signal_loss(student, signal, loss="forward_kl", temperature=0.7, allow_biased=True)) == 5


def test_trap_11_reduction_is_per_position() -> None:
    # Not divided by the vocabulary, not by the batch: one position's value does not change with its company.
    student, teacher = two(6, 50)
    for function in DIVERGENCES.values():
        alone = torch.stack([function(s, t) for s, t in zip(student, teacher, strict=True)])
        torch.testing.assert_close(function(student, teacher), alone)
        grid = function(student.view(2, 3, 50), teacher.view(2, 3, 50))
        torch.testing.assert_close(grid.flatten(), alone)
    # Padding the vocabulary with tokens of no probability leaves the value: no mean over the vocabulary.
    wide = [torch.cat([x, torch.full((6, 5000), -200.0, dtype=torch.float64)], dim=1) for x in (student, teacher)]
    torch.testing.assert_close(losses.forward_kl(wide[0], wide[1]), losses.forward_kl(student, teacher))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_12_half_precision_logits_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    # A divergence of about a thousandth of a nat over 20,000 tokens drowns in a bfloat16 softmax.
    teacher = (torch.randn(3, 20_000, generator=seeded(0)) * 3).to(dtype)
    student = (teacher.float() + torch.randn(3, 20_000, generator=seeded(1)) * 0.05).to(dtype)
    found = DIVERGENCES[name](student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), DIVERGENCES[name](student.double(), teacher.double()), rtol=1e-3, atol=1e-6
    )
    assert (found > 0).all()


def test_trap_12_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, 0.0, -1e4]])
    teacher = torch.tensor([[-1e4, 0.0, 1e4]])
    assert losses.forward_kl(student, teacher).item() == pytest.approx(2e4)
    assert losses.generalized_jsd(student, teacher).item() == pytest.approx(math.log(2))
    assert losses.total_variation(student, teacher).item() == 1
