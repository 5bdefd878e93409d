"""The law of learning rates: no step has 0, the highest is reached, and each is what a closed form says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import get_args

import ours
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from steps import BATCH, arguments, write_order
from test_benchmarks_quality import options_for, where
from test_train import curve, fresh, weights
from transformers import get_scheduler

from limbeck.recipe import Train
from limbeck.rundir import RunDir
from limbeck.train.rates import share_of_peak
from limbeck.train.stage import train

__all__ = ["where"]  # a fixture

SCHEDULES: Sequence[str] = get_args(Train.model_fields["schedule"].annotation)
LIBRARYS = {"constant": "constant_with_warmup"}
"""What transformers calls a schedule; its own `constant` knows no warm-up."""


def shares(schedule: str, warmup: int, steps: int) -> list[float]:
    return [share_of_peak(step, schedule=schedule, warmup=warmup, steps=steps) for step in range(steps)]


def closed_form(schedule: str, warmup: int, steps: int) -> list[float]:
    """As docs/train.md says it; fractions, but for the cosine."""
    rising = [Fraction(i + 1, warmup + 1) for i in range(warmup)]
    gone = [Fraction(i, steps - warmup) for i in range(steps - warmup)]
    falls = {
        "linear": lambda p: 1 - p,
        "constant": lambda _: 1,
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    }
    return [float(share) for share in rising + [falls[schedule](p) for p in gone]]


lengths = st.tuples(st.integers(1, 400), st.integers(0, 400)).map(lambda pair: (max(pair[0], pair[1] + 1), pair[1]))
"""Steps, and fewer of warm-up."""


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(lengths=lengths)
def test_no_step_has_a_rate_of_0_and_the_highest_is_reached(schedule, lengths):
    steps, warmup = lengths
    found = shares(schedule, warmup, steps)
    assert all(0 < share <= 1 for share in found)
    assert found[warmup] == 1
    assert all(a < b for a, b in pairwise(found[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(found[warmup:]))
    assert found == pytest.approx(closed_form(schedule, warmup, steps), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(lengths=lengths)
def test_it_is_the_librarys_schedule_of_one_step_more_at_each_end(schedule, lengths):
    """And from the end of the warm-up on the library's of as many steps."""
    steps, warmup = lengths
    found = shares(schedule, warmup, steps)
    assert found == pytest.approx(librarys(schedule, warmup + 1, steps + 1)[1:], rel=1e-9)
    assert found[warmup:] == pytest.approx(librarys(schedule, warmup, steps)[warmup:], rel=1e-9)


def librarys(schedule: str, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made = get_scheduler(LIBRARYS.get(schedule, schedule), optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    (share,) = made.lr_lambdas
    return [share(step) for step in range(steps)]


@given(steps=st.integers(1, 50), more=st.integers(0, 9), schedule=st.sampled_from(SCHEDULES))
def test_a_warm_up_as_long_as_the_training_ends_at_the_highest_rate(steps, more, schedule):
    found = shares(schedule, steps + more, steps)
    assert found == pytest.approx([(i + 1) / steps for i in range(steps)], rel=1e-12)


def test_a_schedule_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match="polynomial, expected linear, cosine or constant"):
        share_of_peak(3, schedule="polynomial", warmup=2, steps=9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_has_these_rates_and_its_first_batch_moves_weights_by_the_first(tiny_run, tmp_path, schedule):
    """Two steps, the first in the warm-up. AdamW's first step moves a weight by rate x g / (|g| + 1e-8), so the most
    that any moved is the rate."""
    settings = {"schedule": schedule, "warmup": 0.5, "epochs": 1, "batch_size": 17, "checkpoint_every": 1}
    recipe, run = fresh(tiny_run, tmp_path / "run", **settings)
    train(recipe, run)
    told = [step["learning_rate"] for step in json.loads((run / "training.json").read_text())["steps"]]
    peak = recipe.train.learning_rate
    assert told == pytest.approx([peak / 2, peak], rel=1e-12)
    before = load_file(run / "beginning" / "model.safetensors")
    after = load_file(run / "checkpoints" / "checkpoint-1" / "model.safetensors")
    moved = max(float((after[name] - weight).abs().max()) for name, weight in before.items())
    assert moved == pytest.approx(peak / 2, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_resumed_in_its_warm_up_ends_with_the_same_bits(tiny_run, tmp_path, schedule):
    """8 steps, 6 of warm-up, gone on with from what lay on the disk after the fourth."""
    settings = {"schedule": schedule, "warmup": 0.8, "checkpoint_every": 4}
    recipe, whole = fresh(tiny_run, tmp_path / "whole", **settings)
    train(recipe, whole)
    _, resumed = fresh(tiny_run, tmp_path / "resumed")
    shutil.copytree(whole / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-8")
    assert (resumed / "checkpoints" / "checkpoint-4" / "complete").is_file()
    train(recipe, resumed)
    assert curve(resumed) == curve(whole)
    assert rates(resumed) == rates(whole)
    expected = [recipe.train.learning_rate * share for share in closed_form(schedule, 6, 8)]
    assert rates(whole) == pytest.approx(expected, rel=1e-12)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def rates(run: RunDir) -> list[float]:
    return [step["learning_rate"] for step in json.loads((run / "training.json").read_text())["steps"]]


def test_a_benchmark_that_gives_both_sides_the_same_steps_gives_them_the_librarys_rates(where: Path, tmp_path: Path):
    """And one that does not lets limbeck's be above 0. 12 steps, of which 5 % is one of warm-up."""
    order = [[(i + n) % (2 * BATCH) for i in range(BATCH)] for n in range(12)]
    write_order(tmp_path / "order.json", order)
    found = {
        path: ours.live(options_for(where, tmp_path, order=path, epochs=6))["learning_rates"]
        for path in (tmp_path / "order.json", None)
    }
    told = arguments("", steps=12, learning_rate=1e-3, seed=0)
    assert (told["warmup_steps"], told["lr_scheduler_type"]) == (1, "cosine")
    assert found[tmp_path / "order.json"] == pytest.approx([1e-3 * s for s in librarys("cosine", 1, 12)], rel=1e-12)
    assert found[None] == pytest.approx([1e-3 * s for s in closed_form("cosine", 1, 12)], rel=1e-12)
