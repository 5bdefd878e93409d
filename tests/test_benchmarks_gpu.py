"""The benchmark for a GPU runs, small, without one, and its cases compute the same losses."""

from __future__ import annotations

import argparse

import gpu
import gpu_steps
import pytest
import torch
from test_fused import normal

from limbeck.signal.types import HiddenSignal
from limbeck.train.pairing import signal_loss


def test_the_losses_of_its_cases_are_those_of_closed_forms():
    sizes = gpu.SMALL[0]
    teacher = gpu.teacher_of("cpu", sizes)
    hidden = normal(sizes.positions, sizes.width, seed=1).bfloat16()
    weight = (normal(sizes.vocabulary, sizes.width, seed=2) * 0.1).bfloat16()
    logits = (hidden.double() @ weight.double().T).bfloat16().double()
    live = HiddenSignal(teacher.hidden_ND, teacher.weight_VD, sizes.vocabulary)
    expected = float(signal_loss(logits, live, loss="forward_kl").mean())
    cases = dict([*gpu.ours(teacher, sizes), *gpu.plain(teacher, sizes)])
    for name in ("limbeck, forward KL to the live teacher", "plain logits, forward KL to the live teacher"):
        assert float(cases[name](hidden, weight)) == pytest.approx(expected, rel=1e-3), name
    entropy = float(cases["plain logits, cross-entropy"](hidden, weight))
    picked = logits.log_softmax(1)[torch.arange(sizes.positions), teacher.targets_N]
    assert entropy == pytest.approx(float(-picked.mean()), rel=1e-3)


def test_it_runs_small_and_says_a_row_for_each_case(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    command = ["gpu.py", "--small", "--device", "cpu", "--rounds", "1", "--part", "loss", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    gpu.main()
    told = (tmp_path / "gpu.md").read_text()
    assert told in capsys.readouterr().out
    assert told.count("| limbeck, ") == 4
    assert "failed" not in told


def test_a_training_step_runs_small():
    options = argparse.Namespace(device="cpu", small=True, steps=5, only="limbeck, s", profile=False)
    told = gpu_steps.steps(options, 1e12)
    assert "| limbeck, stored samples |" in told
    assert "Annotating by the teacher" in told
    assert "failed" not in told
