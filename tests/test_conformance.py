"""docs/correctness.md: the traps of losses and signals, by their numbers there.

Each test computes the mistake by hand beside an independent oracle, and shows on its own data that the two differ
before it asks which of them limbeck agrees with. What needs a trainer is in test_conformance_training.py.
"""

from __future__ import annotations

import ast
import math
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny
import torch
from test_losses import leaky, logs, seeded, slow_kl, softmax, two
from torch import Tensor

from limbeck import models
from limbeck.errors import ModelError, RecipeError
from limbeck.records import Message
from limbeck.render.chat import ChatRenderer, Rendered
from limbeck.signal import DenseSignal, HiddenSignal, from_logits, topk_signal
from limbeck.train import losses
from limbeck.train.fused import fused_loss
from limbeck.train.losses import check_pairing
from limbeck.train.pairing import signal_loss

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "correctness.md"


def gradient(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), by, retain_graph=True)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities with full support, by its definition."""
    return (p * (p / q).log()).sum(-1)


def test_the_page_has_every_trap_and_every_test_that_it_names_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = re.split(r"^## (?=\d+\. )", text, flags=re.MULTILINE)[1:]
    assert [int(section.split(".")[0]) for section in sections] == list(range(1, 21))
    missing = []
    for section in sections:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", section)
        assert named, f"no test for trap {section.splitlines()[0]}"
        assert re.findall(r"^\*(\w[\w ]*)\*[:,]", section, re.MULTILINE) == ["Wrong", "Seen in", "Tests"]
        for file, test in named:
            tree = (
                ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).exists() else ast.Module([], [])
            )
            there = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            missing += [f"{file}::{test}"] if test not in there else []
    missing += [file for file in re.findall(r"`((?:tests|benchmarks)/\w+\.py)`", text) if not (ROOT / file).exists()]
    assert not missing


def test_every_test_that_carries_a_traps_number_is_on_the_page_under_it() -> None:
    sections = re.split(r"^## (?=\d+\. )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    carrying = re.compile(r"^def (test_trap_(\d\d)[a-z]?(?:_and_(\d\d))?_\w+)", re.MULTILINE)
    found = [
        (number, f"`tests/{path.name}::{name}`")
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        for name, *numbers in carrying.findall(path.read_text(encoding="utf-8"))
        for number in filter(None, numbers)
    ]
    assert {number for number, _ in found} >= {"03", "04", "05", "12", "20"}
    assert [told for number, told in found if told not in sections[int(number)]] == []


def test_trap_03_the_end_of_the_turn_is_learned_where_it_is_also_the_padding() -> None:
    words = tiny.tokenizer()
    pad = words.pad_token_id
    assert pad == words.eos_token_id
    chat = (Message(role="user", content="What is the sea?"),)
    out = ChatRenderer(words, "m").render(chat, "Water.", stopped=True, created=datetime(2026, 3, 1, tzinfo=UTC))
    assert isinstance(out, Rendered)
    tokens_T, learned_T = torch.from_numpy(out.tokens_T), torch.from_numpy(out.mask_T)
    by_id_T = learned_T & (tokens_T != pad)  # the mistake: what has the padding's id is padding
    written = words.encode("Water.", add_special_tokens=False)
    assert tokens_T[by_id_T].tolist() == written
    assert tokens_T[learned_T].tolist() == [*written, pad]
    assert pad in tokens_T[~learned_T].tolist(), "the prompt's own ends of turn are read, and not learned"


def test_trap_03_a_teacher_that_ends_its_answers_otherwise_is_refused() -> None:
    # As a base model beside its instruction-tuned relative: one vocabulary, two ends.
    base, instruct = tiny.tokenizer(), tiny.tokenizer()
    base.eos_token = "<|endoftext|>"
    assert base.get_vocab() == instruct.get_vocab(), "comparing vocabularies would not see it"
    with pytest.raises(ModelError, match="eos_token"):
        models.refuse_other_tokenizer("student", instruct, base)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_trap_04_beta_is_the_teachers_share_and_its_ends_have_a_gradient(beta: float) -> None:
    student, teacher = two()
    student.requires_grad_()
    p, q = torch.softmax(teacher, 1), torch.softmax(student, 1)

    def by_formula(share: float) -> Tensor:
        m = share * p + (1 - share) * q
        return share * kl(p, m) + (1 - share) * kl(q, m)

    value = losses.generalized_jsd(student, teacher, beta=beta)
    if 0 < beta < 1:
        torch.testing.assert_close(value, by_formula(beta))
        if beta != 0.5:  # the mistake: the student's share
            assert not torch.allclose(value, by_formula(1 - beta), rtol=0.01)
    else:
        assert gradient(by_formula(beta), student).abs().max() < 1e-12, "the formula alone teaches nothing at an end"
        expected = kl(q, p) if beta else kl(p, q)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient(value, student), gradient(expected, student))


def test_trap_05a_renormalising_both_sides_is_blind_to_leaked_mass_and_a_tail_bucket_is_not() -> None:
    student, teacher = leaky()
    p, q = (torch.softmax(x, 1) for x in (teacher, student))
    top = [0, 1]
    renormalised = kl(p[:, top] / p[:, top].sum(), q[:, top] / q[:, top].sum())
    assert q[:, top].sum().item() == pytest.approx(0.0009)
    assert renormalised.abs().item() < 1e-12
    assert kl(p, q).item() == pytest.approx(6.887, abs=1e-3)
    ours = signal_loss(student, topk_signal(teacher, 2), loss="forward_kl", allow_biased=True)
    torch.testing.assert_close(ours, kl(p, q), rtol=1e-6, atol=0)


def test_trap_05b_a_truncated_sum_is_negative_and_clamping_it_stops_learning() -> None:
    student, teacher = logs(0.55, 0.33, 0.12).requires_grad_(), logs(0.5, 0.3, 0.2)
    p, q = torch.softmax(teacher, 1), torch.softmax(student, 1)
    truncated = (p * (p / q).log())[:, :2].sum(1)
    assert truncated.item() == pytest.approx(-0.0762, abs=1e-4)
    assert kl(p, q).item() == pytest.approx(0.0259, abs=1e-4)
    assert gradient(truncated.clamp_min(0), student).abs().max() == 0
    ours = signal_loss(student, topk_signal(teacher, 2), loss="forward_kl", allow_biased=True)
    torch.testing.assert_close(ours, kl(p, q), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, student), q.detach() - p, rtol=1e-5, atol=1e-7)


def test_trap_05c_a_renormalised_teacher_is_another_teacher_and_a_threshold_sample_is_this_one() -> None:
    teacher = two(1, 60, 1.5)[1]
    p = torch.softmax(teacher, 1)[0]
    top = p.topk(8)
    renormalised = torch.zeros_like(p).scatter(0, top.indices, top.values / top.values.sum())
    assert (renormalised - p).abs().sum() > 0.4
    draws = 20_000
    signal = from_logits(teacher.expand(draws, -1), 0.05, generator=seeded(3))
    mean = signal.to_dense().double().mean(0)
    error = (p * (0.05 - p).clamp_min(0) / draws).sqrt()  # of a weight of 0.05 with probability p / 0.05
    assert ((mean - p).abs() < 5 * error + 1e-6).all()
    assert ((renormalised - p).abs() > 5 * error + 1e-6).any()


def test_trap_06_truncated_reverse_kl_is_minimised_by_leaving_the_list_and_ours_is_not() -> None:
    # With the teacher's list scaled by s, the truncated sum is P s ln s: its minimum is at s = 1 / e.
    teacher = logs(0.6, 0.3, 0.1)

    def descend(truncated: bool) -> Tensor:
        student = teacher.clone().requires_grad_()
        for _ in range(600):
            q = torch.softmax(student, 1)
            if truncated:
                value = (q * (q / torch.softmax(teacher, 1)).log())[:, :2].sum(1)
            else:
                value = signal_loss(student, topk_signal(teacher, 2), loss="reverse_kl", allow_biased=True)
            student = (student - 0.5 * gradient(value, student)).detach().requires_grad_()
        return torch.softmax(student.detach(), 1)[0]

    assert descend(truncated=True)[:2].sum().item() == pytest.approx(0.9 / math.e, abs=1e-3)
    torch.testing.assert_close(descend(truncated=False), torch.softmax(teacher, 1)[0], rtol=0, atol=1e-6)
    with pytest.raises(RecipeError, match="biased"):
        check_pairing("reverse_kl", "top_k")


def test_trap_07_estimators_from_sampled_tokens_have_other_gradients_and_are_refused() -> None:
    # The expectation over all tokens that the student may draw, exactly.
    student, teacher = two(1, 9, 1.0)
    student.requires_grad_()
    log_p, log_q = torch.log_softmax(teacher, 1), torch.log_softmax(student, 1)
    drawn, ratio = log_q.exp().detach(), log_p - log_q
    k1, k3 = -ratio, ratio.exp() - 1 - ratio
    exact = gradient(losses.reverse_kl(student, teacher), student)
    torch.testing.assert_close(gradient(kl(log_q.exp(), log_p.exp()), student), exact)
    # As values both are right.
    torch.testing.assert_close((drawn * k1).sum(), losses.reverse_kl(student, teacher)[0])
    torch.testing.assert_close((drawn * k3).sum(), losses.reverse_kl(student, teacher)[0])
    assert gradient(drawn * k1, student).abs().max() < 1e-15
    torch.testing.assert_close(gradient(drawn * k3, student), gradient(losses.forward_kl(student, teacher), student))
    assert (gradient(drawn * k3, student) - exact).abs().max() > 0.01
    # An advantage that is one number a position, whatever was drawn, has no gradient either.
    advantage = kl(drawn, log_p.exp())
    assert gradient(drawn * advantage * log_q, student).abs().max() < 1e-15
    for kind in ("text", "sampled"):
        for loss in ("reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "total_variation"):
            with pytest.raises(RecipeError, match="unusable"):
                check_pairing(loss, kind, allow_biased=True)


def test_trap_08_padded_rows_of_a_head_take_no_part() -> None:
    student, teacher = two()
    expected = [slow_kl(softmax(t), softmax(s)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    for fill in (0.0, 5.0):  # the mistakes: zeros for what a head lacks, or whatever stands there
        padded_s = torch.cat([student, torch.full((5, 3), fill, dtype=torch.float64)], 1)
        wrong = losses.forward_kl(padded_s, torch.cat([teacher, padded_s[:, 7:]], 1))
        assert (wrong - torch.tensor(expected)).abs().max() > 0.05
        ours = signal_loss(padded_s, DenseSignal(teacher), loss="forward_kl")
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_trap_10_the_factor_of_temperature_squared_is_a_weight_and_never_hidden() -> None:
    student, teacher = two()
    expected = [slow_kl(softmax(t / 2), softmax(s / 2)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    plain = signal_loss(student, DenseSignal(teacher), loss="forward_kl", temperature=2.0)
    torch.testing.assert_close(plain, torch.tensor(expected, dtype=torch.float64))
    assert (4 * plain - plain).min() > 0.01, "the factor would show"
    weighed = signal_loss(student, DenseSignal(teacher), loss=losses.Loss("forward_kl", weight=4.0, temperature=2.0))
    torch.testing.assert_close(weighed, 4 * plain)


def test_trap_11_the_reductions_of_kl_div_are_off_by_the_vocabulary_and_by_the_length() -> None:
    vocab, batch, length = 32_000, 2, 5
    student, teacher = two(batch * length, vocab, 1.0)
    log_q = torch.log_softmax(student, 1).view(batch, length, vocab)
    p = torch.softmax(teacher, 1).view(batch, length, vocab)
    expected = kl(p, log_q.exp()).mean()
    ours = losses.forward_kl(student, teacher).mean()
    torch.testing.assert_close(ours, expected)
    # "mean", spelt out, since torch warns of it.
    assert (ours / torch.nn.functional.kl_div(log_q, p, reduction="none").mean()).item() == pytest.approx(vocab)
    assert (torch.nn.functional.kl_div(log_q, p, reduction="batchmean") / ours).item() == pytest.approx(length)


def test_trap_12_a_softmax_in_bfloat16_loses_small_divergences_and_ours_does_not() -> None:
    vocab = 152_064
    teacher = (torch.randn(16, vocab, generator=seeded(0)) * 3).bfloat16()
    student = (teacher.float() + torch.randn(16, vocab, generator=seeded(1)) * 0.05).bfloat16()

    def by(dtype: torch.dtype) -> Tensor:
        log_p, log_q = (x.to(dtype).log_softmax(1) for x in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(1).double()

    exact = by(torch.float64)
    assert (by(torch.bfloat16) - exact).abs().mean() > 0.5 * exact.mean()
    torch.testing.assert_close(losses.forward_kl(student, teacher).double(), exact, rtol=1e-2, atol=0)
    # The fused path: an identity as the student's head hands these very logits over.
    few = 300
    cut_s, cut_t = student[:, :few].clone(), teacher[:, :few].clone()
    signal = HiddenSignal(cut_t, torch.eye(few, dtype=torch.bfloat16), few)
    fused = fused_loss(cut_s, torch.eye(few, dtype=torch.bfloat16), signal, loss="forward_kl")
    expected = losses.forward_kl(cut_s.double(), cut_t.double()).sum()
    torch.testing.assert_close(fused.double(), expected, rtol=1e-3, atol=0)


def test_trap_12_zero_times_minus_infinity_is_nothing() -> None:
    student, teacher = logs(0.2, 0.3, 0.5).requires_grad_(), logs(0.4, 0.6, 0.0)
    log_p, log_q = torch.log_softmax(teacher, 1), torch.log_softmax(student, 1)
    assert (log_p.exp() * (log_p - log_q)).sum().isnan(), "the mistake"
    value = losses.forward_kl(student, teacher)
    assert value.item() == pytest.approx(0.4 * math.log(2) + 0.6 * math.log(2))
    torch.testing.assert_close(gradient(value, student), log_q.exp().detach() - log_p.exp())


def test_trap_13_the_drift_between_two_copies_would_show() -> None:
    # As in trl#5731: half cross-entropy, half JSD at another temperature, where JSD was asked for.
    hidden, head = (torch.randn(n, 4, generator=seeded(n), dtype=torch.float64) for n in (6, 11))
    hidden.requires_grad_()
    teacher = torch.randn(6, 11, generator=seeded(1), dtype=torch.float64)
    p, q = torch.softmax(teacher, 1), torch.softmax(hidden @ head.T, 1)
    m = (p + q) / 2
    jsd = (kl(p, m) + kl(q, m)).sum() / 2
    cooled = losses.generalized_jsd(hidden @ head.T, teacher, temperature=0.9).sum()
    drifted = 0.5 * losses.cross_entropy(hidden @ head.T, teacher.argmax(1)).sum() + 0.5 * cooled
    fused = fused_loss(hidden, head, DenseSignal(teacher), loss="generalized_jsd", chunk=2)
    assert (drifted - jsd).abs() > 0.1 * jsd
    torch.testing.assert_close(fused, jsd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(fused, hidden), gradient(jsd, hidden), rtol=1e-10, atol=1e-10)


def test_trap_17_text_is_not_sent_to_a_teacher_in_the_students_ids() -> None:
    # Equally wide, and other ids for one text: nothing would crash.
    teacher, student = tiny.tokenizer(), tiny.tokenizer(text=tiny.TEXT[:2])
    student.add_tokens([f"<{i}>" for i in range(len(teacher) - len(student))])
    text = "The capital of France"
    ids = student.encode(text, add_special_tokens=False)
    assert len(student) == len(teacher)
    assert teacher.decode(ids) != text
    with pytest.raises(ModelError, match="same tokenizer"):
        models.refuse_other_tokenizer("student", teacher, student)
