"""Losses against signals: unbiased where they say so, refused where they are not."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from test_losses import seeded, two

from limbeck.errors import InputError, RecipeError
from limbeck.signal import DenseSignal, TextSignal, threshold_sample
from limbeck.signal.types import SignalKind
from limbeck.train import losses
from limbeck.train.losses import LOSSES, Loss, check_pairing, terms_of
from limbeck.train.pairing import signal_loss


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_a_sampled_signal_gives_the_loss_in_expectation(name: str) -> None:
    draws = 4000
    student, teacher = two(1, 60, 2.0)
    p = torch.softmax(teacher, dim=1).expand(draws, -1)
    signal = threshold_sample(p, 0.05, generator=seeded(1))
    value = signal_loss(student.expand(draws, -1), signal, loss=name)
    exact = losses.forward_kl(student, teacher)[0]
    if name == "cross_entropy":
        exact = exact + torch.special.entr(p[0]).sum()
    assert float(value.std()) > 0
    assert abs(float(value.mean() - exact)) < 5 * float(value.std()) / math.sqrt(draws) + 1e-6


def test_the_gradient_of_a_sampled_signal_is_the_gradient_of_forward_kl_in_expectation() -> None:
    draws = 4000
    student, teacher = two(1, 30, 2.0)
    many = student.expand(draws, -1).clone().requires_grad_()
    signal = threshold_sample(torch.softmax(teacher, dim=1).expand(draws, -1), 0.05, generator=seeded(1))
    (grads,) = torch.autograd.grad(signal_loss(many, signal, loss="forward_kl").sum(), many)
    one = student.clone().requires_grad_()
    (exact,) = torch.autograd.grad(losses.forward_kl(one, teacher).sum(), one)
    error = grads.std(0) / math.sqrt(draws)
    # A token so rare that it was never drawn shows no spread; it can be off by about tau a draw.
    assert ((grads.mean(0) - exact[0]).abs() < 5 * error + 2 * 0.05 / draws).all()


def test_text_gives_the_gradient_of_forward_kl_in_expectation() -> None:
    student, teacher = two(1, 6, 1.0)
    p = torch.softmax(teacher, dim=1)[0]
    one = student.clone().requires_grad_()
    (exact,) = torch.autograd.grad(losses.forward_kl(one, teacher).sum(), one)
    each = student.expand(6, -1).clone().requires_grad_()
    value = signal_loss(each, TextSignal(torch.arange(6), 6), loss="cross_entropy")
    (grads,) = torch.autograd.grad(value.sum(), each)
    torch.testing.assert_close((p[:, None] * grads).sum(0), exact[0])


def test_a_weighted_sum_is_the_sum_of_its_terms_each_on_its_own_signal_and_temperature() -> None:
    student, teacher = two()
    text, dense = TextSignal(torch.tensor([1, 0, 6, 2, 3]), 7), DenseSignal(teacher)
    terms = (
        Loss("forward_kl", weight=0.7 * 4, temperature=2.0, on="dense"),
        Loss("cross_entropy", weight=0.3, on="text"),
        Loss("generalized_jsd", parameter=0.2, weight=-1.5),
    )
    expected = (
        2.8 * losses.forward_kl(student, teacher, temperature=2)
        + 0.3 * losses.cross_entropy(student, text.ids_N)
        - 1.5 * losses.generalized_jsd(student, teacher, beta=0.2)
    )
    torch.testing.assert_close(signal_loss(student, (dense, text), loss=terms), expected)


def test_cross_entropy_against_a_distribution_is_forward_kl_plus_entropy() -> None:
    student, teacher = two()
    entropy = torch.special.entr(torch.softmax(teacher, dim=1)).sum(1)
    value = signal_loss(student, DenseSignal(teacher), loss="cross_entropy")
    torch.testing.assert_close(value, losses.forward_kl(student, teacher) + entropy)


@pytest.mark.parametrize("name", LOSSES)
def test_every_pairing_is_declared_and_kept(name: str) -> None:
    for kind in get_args(SignalKind):
        pairing = LOSSES[name].pairings[kind]
        if pairing.bias == "none":
            assert check_pairing(name, kind) == (pairing,)
            continue
        with pytest.raises(RecipeError, match=pairing.bias):
            check_pairing(name, kind)
        if pairing.bias == "biased":
            assert check_pairing(name, kind, allow_biased=True) == (pairing,)
        else:
            with pytest.raises(RecipeError, match="unusable"):
                check_pairing(name, kind, allow_biased=True)


def test_all_refused_terms_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        check_pairing((Loss("reverse_kl"), Loss("forward_kl"), Loss("skew_kl", on="top_k")), "sampled")
    assert [p.where for p in caught.value.problems] == [
        "loss reverse_kl with signal sampled",
        "loss skew_kl with signal top_k",
    ]


@pytest.mark.parametrize("kinds", [("text", "top_k"), ("text", "sampled", "top_k", "hidden")])
def test_a_remedy_names_nothing_that_cannot_be_had(kinds: tuple[SignalKind, ...]) -> None:
    """Every kind and every loss that a remedy names is taken, allow_biased is named only where it helps."""
    for name, kind in itertools.product(LOSSES, kinds):
        pairing = LOSSES[name].pairings[kind]
        if pairing.bias == "none":
            continue
        with pytest.raises(RecipeError) as caught:
            check_pairing(name, kind, kinds=kinds)
        (remedy,) = (p.remedy for p in caught.value.problems)
        named = set(re.findall(r"\w+", remedy))
        free = {k for k, other in LOSSES[name].pairings.items() if other.bias == "none"}
        if usable := free & set(kinds):
            assert named & set(get_args(SignalKind)) == usable
        else:
            for other in named & set(LOSSES):
                check_pairing(other, kind, kinds=kinds)
        assert ("allow_biased" in named) == (pairing.bias == "biased")
        assert usable or named & {*LOSSES, "allow_biased"}


def test_text_is_not_called_forward_kl() -> None:
    with pytest.raises(RecipeError, match="cross_entropy"):
        check_pairing("forward_kl", "text")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: terms_of("kl"), "forward_kl, reverse_kl"),
        (lambda: terms_of(()), "at least one term"),
        (lambda: Loss("forward_kl", parameter=0.5), "has no parameter"),
        (lambda: Loss("skew_kl", parameter=1.5), "alpha"),
        (lambda: Loss("forward_kl", weight=math.nan), "weight nan"),
        (lambda: losses.generalized_jsd(*two(), beta=-0.1), "beta"),
        (lambda: losses.forward_kl(*two(), temperature=0), "temperature"),
        (
            lambda: signal_loss(two()[0], DenseSignal(two()[1]), loss=Loss("forward_kl", on="text")),
            "cross_entropy",
        ),
        (
            lambda: signal_loss(two()[0], DenseSignal(two()[1]), loss=Loss("cross_entropy", on="text")),
            "of kind text",
        ),
        (lambda: signal_loss(two()[0][:3], DenseSignal(two()[1]), loss="forward_kl"), r"\[5, 7 or more\]"),
        (
            lambda: signal_loss(two()[0], (DenseSignal(two()[1]), TextSignal(torch.tensor([0]), 7)), loss="forward_kl"),
            "1 positions over 7 ids",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()
