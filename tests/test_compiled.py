"""Compiled passes say what the eager kernels and the plain losses say. What a GPU compiles runs on the CPU here."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from test_fused import PAIRS, N, V, assert_same, make_signal, make_student, normal, run

from limbeck import doctor
from limbeck.models import Processor, compiling
from limbeck.signal import DenseSignal, SampledSignal
from limbeck.train import compiled
from limbeck.train.fused import position_losses
from limbeck.train.losses import LOSSES, Loss
from limbeck.train.pairing import signal_loss


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes as they are written, on any device, not compiled."""
    monkeypatch.setattr(compiled, "chosen", lambda _device: True)
    monkeypatch.setattr(compiled, "compiled", lambda function: function)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_equal_to_the_plain_loss_in_value_and_gradient(name: str, kind: str) -> None:
    assert_same(make_student(), make_signal(kind), name, chunk=3)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    student = make_student(bias=True, scale=0.8, softcap=4.0)
    assert_same(student, make_signal(kind, 1.6), Loss(name, weight=0.7), temperature=1.6, chunk=5, weights=weights)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", [n for n, d in LOSSES.items() if d.parameter])
def test_parameters_reach_the_passes(name: str, share: float) -> None:
    assert_same(make_student(), make_signal("dense"), Loss(name, parameter=share), chunk=4)


@pytest.mark.usefixtures("passes")
def test_equal_entries_of_a_position_add_up() -> None:
    two = torch.full((N,), 2, dtype=torch.int32)
    none = torch.zeros(N, dtype=torch.int32)
    signal = SampledSignal(
        none, two, torch.full((2 * N,), 4, dtype=torch.int32), torch.zeros(0), torch.zeros(N), 0.3, V
    )
    assert_same(make_student(), signal, "cross_entropy", chunk=3)


@pytest.mark.usefixtures("passes")
def test_rows_that_the_teacher_rules_out_stay_finite() -> None:
    logits = normal(N, V, seed=9)
    logits[:, 5] = -torch.inf
    for name in LOSSES:
        if name != "reverse_kl":
            assert_same(make_student(), DenseSignal(logits), name, chunk=4)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("kind", ["sampled", "top_k", "hidden"])
def test_without_a_gradient_the_value_is_the_same(kind: str) -> None:
    student, signal = make_student(bias=True), make_signal(kind)
    found = position_losses(
        student.hidden, student.weight, signal, loss="forward_kl", chunk=2, allow_biased=True, **student.options()
    )
    logits = student.hidden @ student.weight.T + student.bias
    expected = signal_loss(logits, signal, loss="forward_kl", allow_biased=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_as_on_a_gpu_it_is_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "chosen", lambda _device: True)
    compiling.compiled.cache_clear()
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        assert_same(make_student(softcap=3.0), make_signal("hidden"), "forward_kl", chunk=3)
    compiling.compiled.cache_clear()
    assert compiling.__name__ not in {r.name for r in caplog.records}  # or the eager form had stood in


def test_where_compiling_fails_the_eager_form_goes_on_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(function: Callable, **_: object) -> Callable:
        def call(*_args: object) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no such processor")

        return call

    monkeypatch.setattr(compiled, "chosen", lambda _device: True)
    monkeypatch.setattr(torch, "compile", refuses)
    compiling.compiled.cache_clear()
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        assert_same(make_student(), make_signal("dense"), "reverse_kl", chunk=3)
        run(make_student(), make_signal("dense"), "reverse_kl")
    compiling.compiled.cache_clear()
    assert [("no such processor" in r.getMessage(), "LIMBECK_COMPILE=0" in r.getMessage()) for r in caplog.records] == [
        (True, True)
    ]


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_COMPILE", "0")
    compiling._found.cache_clear()
    assert "LIMBECK_COMPILE=0" in str(compiling.missing())
    assert not compiling.usable(torch.device("cuda"))
    monkeypatch.delenv("LIMBECK_COMPILE")
    compiling._found.cache_clear()
    assert not compiling.usable(torch.device("cpu"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_a_cpu_compiles_for_a_long_training_or_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for switch, tokens, expected in (
        (None, compiling.LONG - 1, False),
        (None, compiling.LONG, True),
        ("1", 1, True),
        ("0", compiling.LONG, False),
    ):
        if switch is None:
            monkeypatch.delenv("LIMBECK_COMPILE", raising=False)
        else:
            monkeypatch.setenv("LIMBECK_COMPILE", switch)
        compiling._found.cache_clear()
        with compiling.on_cpu(tokens):
            assert compiling.usable(cpu) is expected, (switch, tokens)
        assert not compiling.usable(cpu)
    monkeypatch.delenv("LIMBECK_COMPILE")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    compiling._found.cache_clear()
    with compiling.on_cpu(compiling.LONG):
        assert not compiling.usable(cpu)
    assert "C++ compiler" in str(compiling.missing("cpu"))
    compiling._found.cache_clear()


def test_the_doctor_says_what_a_gpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Processor("cuda", "some GPU", 8, bf16=True, instructions=())
    monkeypatch.setattr(sys.modules[Processor.__module__], "processor", lambda: found)
    monkeypatch.setenv("LIMBECK_COMPILE", "0")
    said = {finding.name: finding for finding in doctor.examine()}
    assert "switched off by LIMBECK_COMPILE=0" in said["loss, layers"].value
    assert said["loss, layers"].remedy == ""
    assert "padded" in said["attention"].value
    monkeypatch.delenv("LIMBECK_COMPILE")
    monkeypatch.setattr(compiling, "find_spec", lambda _name: None)
    lacking = next(finding for finding in doctor.examine() if finding.name == "loss, layers")
    assert "triton" in lacking.value
    assert "triton" in lacking.remedy


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("0", "switched off by LIMBECK_COMPILE=0"),
        ("false", "switched off by LIMBECK_COMPILE=false, which is neither 0 nor 1"),
    ],
)
def test_a_switch_that_is_neither_on_nor_off_is_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, said: str, why: str
) -> None:
    monkeypatch.setenv(compiling.SWITCH, said)
    assert {compiling.missing("cpu"), compiling.missing("cuda")} == {why}
