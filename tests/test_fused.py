"""The fused loss equals the plain one in value and gradient, for every loss with every signal."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from limbeck.errors import InputError, RecipeError
from limbeck.signal import DenseSignal, HiddenSignal, Signal, TextSignal, from_logits, topk_signal
from limbeck.train import fused
from limbeck.train.fused import fused_loss, position_losses
from limbeck.train.losses import LOSSES, Loss, LossSpec
from limbeck.train.pairing import head_logits, signal_loss

N, D, V = 7, 5, 23
PAIRS = [
    (name, kind)
    for name, declared in LOSSES.items()
    for kind, pairing in declared.pairings.items()
    if pairing.bias != "unusable"
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


class Student(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def options(self) -> dict[str, Any]:
        return {"head_bias": self.bias, "logit_scale": self.scale, "softcap": self.softcap}


def make_student(
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    n: int = N,
    v: int = V,
    dtype: torch.dtype = torch.float64,
) -> Student:
    bias_V = normal(v, seed=3, dtype=dtype).requires_grad_() if bias else None
    hidden, weight = normal(n, D, seed=1, dtype=dtype), normal(v, D, seed=2, dtype=dtype)
    return Student(hidden.requires_grad_(), weight.requires_grad_(), bias_V, scale, softcap)


def make_signal(kind: str, temperature: float = 1.0, n: int = N, v: int = V) -> Signal:
    teacher, head = normal(n, 3, seed=4), normal(v + 2, 3, seed=5)
    logits = teacher @ head[:v].T * 2
    if kind == "text":
        return TextSignal(logits.argmax(1).roll(1), v)
    if kind == "sampled":
        return from_logits(logits, 0.08, temperature, generator=seeded(6))
    if kind == "top_k":
        return topk_signal(logits, 4, temperature)
    if kind == "hidden":
        return HiddenSignal(teacher, head, v, normal(v + 2, seed=7), 1.3, 6.0)
    return DenseSignal(logits)


def plain(student: Student, signal: Signal | tuple[Signal, ...], loss: LossSpec, temperature: float = 1.0) -> Tensor:
    logits = head_logits(student.hidden, student.weight, student.bias, student.scale, student.softcap)
    return signal_loss(logits, signal, loss=loss, temperature=temperature, allow_biased=True)


def gradients(value: Tensor, student: Student) -> tuple[Tensor, ...]:
    leaves = [x for x in (student.hidden, student.weight, student.bias) if x is not None and x.requires_grad]
    return torch.autograd.grad(value, leaves)


def run(student: Student, signal: Signal | tuple[Signal, ...], loss: LossSpec, **more: Any) -> Tensor:
    options = student.options() | {"allow_biased": True} | more
    return fused_loss(student.hidden, student.weight, signal, loss=loss, **options)


def assert_same(
    student: Student,
    signal: Signal | tuple[Signal, ...],
    loss: LossSpec,
    temperature: float = 1.0,
    chunk: int | None = None,
    weights: Tensor | None = None,
) -> None:
    each = plain(student, signal, loss, temperature)
    expected = each.sum() if weights is None else (each * weights).sum()
    found = run(student, signal, loss, temperature=temperature, chunk=chunk, weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(found * 1.7, student), gradients(expected * 1.7, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("chunk", [1, 3, N])
def test_trap_13_fused_equals_plain_in_value_and_gradient(name: str, kind: str, chunk: int) -> None:
    assert_same(make_student(), make_signal(kind), name, chunk=chunk)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("block", [V, 2 * V, 1 << 20])
def test_trap_13_in_any_blocks_of_rows_with_all_that_a_head_can_have(
    name: str, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_BLOCK_NUMBERS", block)
    student = make_student(bias=True, scale=0.8, softcap=4.0)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    assert_same(student, make_signal(kind, 1.6), name, temperature=1.6, chunk=5, weights=weights)


@pytest.mark.parametrize(("bias", "scale", "softcap"), [(True, 1.0, None), (False, 0.1, None), (False, 1.0, 2.0)])
def test_trap_09_bias_scale_and_softcap_are_part_of_the_logits(bias: bool, scale: float, softcap: float | None) -> None:
    student = make_student(bias=bias, scale=scale, softcap=softcap)
    assert_same(student, make_signal("hidden"), "forward_kl", chunk=2)
    bare = make_student()
    options: dict[str, Any] = {"loss": "forward_kl"}
    ours = fused_loss(student.hidden, student.weight, make_signal("dense"), **options, **student.options())
    assert not torch.isclose(ours, fused_loss(bare.hidden, bare.weight, make_signal("dense"), **options))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [n for n, d in LOSSES.items() if d.parameter])
def test_parameters_reach_the_fused_form(name: str, share: float) -> None:
    assert_same(make_student(), make_signal("dense"), Loss(name, parameter=share), chunk=4)


def test_a_weighted_sum_over_several_signals_is_one_pass() -> None:
    terms = (
        Loss("forward_kl", weight=4 * 0.7, temperature=2.0, on="hidden"),
        Loss("reverse_kl", weight=0.2, on="hidden"),
        Loss("cross_entropy", weight=0.3, on="text"),
        Loss("skew_kl", parameter=0.2, weight=-0.5, on="top_k"),
    )
    signals = (make_signal("hidden"), make_signal("text"), make_signal("top_k"))
    assert_same(make_student(bias=True, softcap=5.0), signals, terms, chunk=3)


def test_top_k_of_the_whole_vocabulary() -> None:
    logits = normal(N, V, seed=9)
    for name in LOSSES:
        assert_same(make_student(), topk_signal(logits, V), name, chunk=2)


def test_the_gradient_by_finite_differences() -> None:
    student = make_student(bias=True, softcap=3.0)
    signal = make_signal("sampled")

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_loss(hidden, weight, signal, loss="forward_kl", chunk=3, head_bias=bias, softcap=3.0)

    assert student.bias is not None
    assert torch.autograd.gradcheck(loss, (student.hidden, student.weight, student.bias), fast_mode=True)


def test_default_chunks_cover_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CHUNK_BYTES", V * 8 * 3)
    monkeypatch.setattr(fused, "_LEAST_CHUNK", 2)
    assert_same(make_student(), make_signal("sampled"), "forward_kl")


def test_trap_08_a_head_padded_wider_than_the_vocabulary_is_cut_to_it() -> None:
    student = make_student(v=V + 4, bias=True)
    assert_same(student, make_signal("hidden"), "reverse_kl", chunk=3)
    for grad in gradients(run(student, make_signal("text"), "cross_entropy"), student)[1:]:
        assert torch.equal(grad[V:], torch.zeros_like(grad[V:]))


def test_trap_12_weight_zero_leaves_out_a_position_whatever_its_numbers_are() -> None:
    student = make_student()
    with torch.no_grad():
        student.hidden[2] = math.nan
        student.hidden[4] = math.inf
    weights = torch.tensor([1, 1, 0, 1, 0, 1, 1.0])
    rest = weights.nonzero()[:, 0]
    for kind in ("text", "sampled", "hidden"):
        name = "cross_entropy" if kind == "text" else "forward_kl"
        signal = make_signal(kind)
        found = run(student, signal, name, weights=weights)
        expected = run(student._replace(hidden=student.hidden[rest]), signal.index_select(rest), name)
        torch.testing.assert_close(found, expected)
        grad_hidden, grad_weight = gradients(found, student)
        assert torch.equal(grad_hidden[[2, 4]], torch.zeros(2, D, dtype=torch.float64))
        assert grad_weight.isfinite().all()


@pytest.mark.parametrize("kind", ["text", "sampled", "top_k", "hidden", "dense"])
def test_trap_12_nothing_supervised_gives_zero_with_a_gradient_path(kind: str) -> None:
    student = make_student(bias=True)
    name = "cross_entropy" if kind == "text" else "forward_kl"
    none = make_signal(kind).slice(0, 0)
    masked = run(student, make_signal(kind), name, weights=torch.zeros(N))
    for value in (masked, run(student._replace(hidden=student.hidden[:0]), none, name)):
        assert value.item() == 0
        for grad in torch.autograd.grad(value, [student.hidden, student.weight, student.bias]):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_that_the_teacher_rules_out_stay_finite() -> None:
    logits = normal(N, V, seed=9)
    logits[:, 5] = -math.inf
    for name in LOSSES:
        if name != "reverse_kl":
            assert_same(make_student(), DenseSignal(logits), name, chunk=4)
    assert run(make_student(), DenseSignal(logits), "reverse_kl").isinf()


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    student, signal = make_student(), make_signal("sampled")
    whole = gradients(run(student, signal, "forward_kl"), student)
    monkeypatch.setattr(fused, "_HeadGradient", None)
    frozen = student._replace(weight=student.weight.detach())
    (hidden_only,) = gradients(run(frozen, signal, "forward_kl"), frozen)
    torch.testing.assert_close(hidden_only, whole[0])
    with torch.no_grad():
        assert not run(student, signal, "forward_kl").requires_grad


def test_a_second_backward_gives_the_same_gradient() -> None:
    student = make_student()
    value = fused_loss(student.hidden, student.weight, make_signal("sampled"), loss="forward_kl") / 3
    first = torch.autograd.grad(value, [student.hidden, student.weight], retain_graph=True)
    for one, two in zip(first, gradients(value, student), strict=True):
        assert torch.equal(one, two)


def test_tied_heads_add_the_gradients_of_both_uses() -> None:
    weight, signal = normal(V, D, seed=2).requires_grad_(), make_signal("sampled")
    tokens = torch.tensor([3, 0, 3, 9, 1, 2, 22])
    tied = fused_loss(torch.tanh(weight[tokens]), weight, signal, loss="forward_kl", chunk=2)
    expected = signal_loss(torch.tanh(weight[tokens]) @ weight.T, signal, loss="forward_kl").sum()
    (ours,), (theirs,) = torch.autograd.grad(tied, weight), torch.autograd.grad(expected, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_position_losses_are_what_is_summed() -> None:
    student = make_student(bias=True, scale=0.7)
    signal = make_signal("sampled", 2.0)
    each = position_losses(
        student.hidden,
        student.weight,
        signal,
        loss="forward_kl",
        temperature=2.0,
        chunk=2,
        **student.options(),
    )
    torch.testing.assert_close(each, plain(student, signal, "forward_kl", 2.0), rtol=1e-10, atol=1e-10)
    assert not each.requires_grad


# Narrower types. The reference is the plain loss in float64, from logits rounded once, as products round.


def rounded_once(student: Student) -> tuple[Student, Tensor]:
    """The student in float64, and its logits rounded to bfloat16 in value, not in gradient."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (student.hidden, student.weight))
    exact = Student(hidden, weight)
    logits = exact.hidden @ exact.weight.T
    return exact, logits + (logits.bfloat16().double() - logits).detach()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_trap_12_bfloat16_inputs_are_worked_on_in_float32(name: str, kind: str) -> None:
    n, v = 24, 300
    half = make_student(n=n, v=v, dtype=torch.bfloat16)
    exact, logits = rounded_once(half)
    signal = make_signal(kind, n=n, v=v)
    found = fused_loss(half.hidden, half.weight, signal, loss=name, chunk=7, allow_biased=True)
    expected = signal_loss(logits, signal, loss=name, allow_biased=True).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients(found, half), gradients(expected, exact), strict=True):
        # The gradient by the logits is rounded to bfloat16, 2^-9 of each at worst, before it is summed.
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2**-7


def test_trap_12_a_small_divergence_over_bfloat16_logits_is_exact_given_the_logits() -> None:
    # Exactly representable logits: an identity head. Their divergence, a thousandth of a nat, must survive.
    v = 512
    student_logits = (normal(6, v, seed=1) * 3).bfloat16()
    teacher_logits = (student_logits.float() + normal(6, v, seed=2).float() * 0.05).bfloat16()
    found = fused_loss(student_logits, torch.eye(v).bfloat16(), DenseSignal(teacher_logits), loss="forward_kl")
    p, q = (torch.log_softmax(x.double(), dim=1) for x in (teacher_logits, student_logits))
    expected = (p.exp() * (p - q)).sum()
    assert 1e-4 < float(expected) / 6 < 1e-2
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_the_heads_gradient_is_summed_over_chunks_in_float32() -> None:
    # 160 chunks of one position: summed in bfloat16, each of the later ones would be rounded to a half.
    n, v = 160, 16
    hidden, weight = (
        torch.ones(n, D, dtype=torch.bfloat16),
        torch.zeros(v, D, dtype=torch.bfloat16).requires_grad_(),
    )
    signal = TextSignal(torch.zeros(n, dtype=torch.long), v)
    value = fused_loss(hidden, weight, signal, loss="cross_entropy", chunk=1)
    (grad,) = torch.autograd.grad(value, weight)
    expected = torch.full((v, D), n / v)
    expected[0] -= n
    torch.testing.assert_close(grad.float(), expected, rtol=4e-3, atol=0)


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_the_types_of_the_inputs() -> None:
    student = make_student(n=24, v=300, dtype=torch.float32)
    hidden = student.hidden.detach().bfloat16().requires_grad_()
    signal = make_signal("sampled", n=24, v=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused_loss(hidden, student.weight, signal, loss="forward_kl", chunk=7)
    half = Student(hidden.detach().requires_grad_(), student.weight.detach().bfloat16().requires_grad_())
    expected = fused_loss(half.hidden, half.weight, signal, loss="forward_kl", chunk=7)
    assert torch.equal(found, expected)
    grad_hidden, grad_weight = torch.autograd.grad(found, [hidden, student.weight])
    assert (grad_hidden.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    for ours, theirs in zip((grad_hidden, grad_weight), gradients(expected, half), strict=True):
        torch.testing.assert_close(ours.to(theirs), theirs)


def test_no_tensor_of_positions_by_vocabulary_is_made() -> None:
    n, v = 40, 2000
    student = make_student(n=n, v=v, dtype=torch.float32)
    for kind in ("text", "sampled", "top_k", "hidden"):
        signal = make_signal(kind, n=n, v=v)
        name = "cross_entropy" if kind == "text" else "forward_kl"
        sizes = []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                found = out if isinstance(out, tuple | list) else (out,)
                sizes.extend(t.numel() for t in found if isinstance(t, Tensor))  # noqa: B023
                return out

        with Watch():
            fused_loss(student.hidden, student.weight, signal, loss=name, chunk=4, allow_biased=True)
        assert 4 * v <= max(sizes) < n * v // 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(3, D)}, ["hidden", "[7, D]"]),
        ({"head_weight": torch.zeros(V, D + 1)}, ["head_weight", f"[V, {D}]"]),
        ({"head_weight": torch.zeros(V - 1, D)}, ["head_weight", f"at least the signal's {V}"]),
        ({"head_bias": torch.zeros(V + 1)}, ["head_bias", f"[{V}]"]),
        ({"weights": torch.ones(2), "chunk": 0, "softcap": -1.0}, ["weights", "chunk", "softcap"]),
    ],
)
def test_shapes_that_do_not_fit_are_all_named(change: dict, words: list[str]) -> None:
    arguments = {
        "hidden": torch.zeros(N, D),
        "head_weight": torch.zeros(V, D),
        "signal": make_signal("text"),
    } | change
    with pytest.raises(InputError) as caught:
        fused_loss(**arguments, loss="cross_entropy")
    for word in words:
        assert word in str(caught.value)


def test_a_biased_pairing_needs_leave() -> None:
    student = make_student()
    with pytest.raises(RecipeError, match="allow_biased"):
        fused_loss(student.hidden, student.weight, make_signal("top_k"), loss="forward_kl")
    with pytest.raises(RecipeError, match="unusable"):
        fused_loss(student.hidden, student.weight, make_signal("sampled"), loss="reverse_kl", allow_biased=True)
