"""What the student learns from: live teachers, every loss, layouts, and its own answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import kill_after_checkpoints
from transformers import AutoModelForCausalLM

from limbeck import run as run_recipe
from limbeck.errors import RecipeError
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.records import Rollout, Split
from limbeck.render.batches import collate, collate_packed, padding_share, tiles, width_of
from limbeck.render.examples import make_example, read_examples
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.train.feed import Feed
from limbeck.train.losses import generalized_jsd, reverse_kl
from limbeck.train.rollouts import prompt_length
from limbeck.train.schedule import Schedule, make_schedule
from limbeck.train.stage import train


def prepared(tiny_run: Path, place: Path, **changes: object) -> tuple[Recipe, RunDir]:
    """A run up to training, by a live teacher unless `signal` says otherwise."""
    told = RunDir(tiny_run).recipe().model_dump(mode="json")
    told["signal"] = changes.pop("signal", {"kind": "hidden"})
    told["train"] |= changes
    recipe = Recipe.model_validate(told)
    place.mkdir()
    shutil.copy(tiny_run / "journal.db", place)  # the answers are the same
    run_recipe(recipe, place, until="student")
    return recipe, RunDir(place)


def trained(recipe: Recipe, run: RunDir) -> dict[str, torch.Tensor]:
    train(recipe, run)
    return load_file(run / "student" / "model.safetensors")


def curve(run: RunDir) -> list[float]:
    return [step["loss"] for step in json.loads((run / "training.json").read_text())["steps"]]


def logits_by_hand(directory: Path, example) -> torch.Tensor:
    """Float64 logits at the positions that predict the supervised tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(example.tokens_T.astype(np.int64))[None]).logits[0]
    return logits_TV[np.flatnonzero(example.mask_T) - 1]


LOSSES = [
    ("reverse_kl", lambda s, t: reverse_kl(s, t)),
    ({"name": "generalized_jsd", "beta": 0.25}, lambda s, t: generalized_jsd(s, t, beta=0.25)),
    (
        [
            {"name": "reverse_kl", "weight": 0.5, "temperature": 2.0},
            {"name": "cross_entropy", "weight": 2.0, "on": "text"},
        ],
        lambda s, t: 0.5 * reverse_kl(s, t, temperature=2.0),
    ),
]


@pytest.mark.parametrize(("loss", "by_hand"), LOSSES, ids=["reverse", "jsd", "sum"])
def test_first_loss_by_an_independent_float64_loop(tiny_run, tmp_path, loss, by_hand):
    """Example by example, from full logits of teacher and student, before any update."""
    recipe, run = prepared(tiny_run, tmp_path / "run", loss=loss, epochs=0.3)
    train(recipe, run)
    examples = read_examples(run / "examples").train
    lengths = [len(e.tokens_T) for e in examples]
    from limbeck.seeds import derive_seed

    order = make_schedule(lengths, batch_size=8, epochs=1, pieces=1, seed=derive_seed(recipe.seed, "train", "order"))
    total, count = 0.0, 0
    for example in (examples[i] for i in order.steps[0]):
        student_NV = logits_by_hand(run / "beginning", example)
        total += float(by_hand(student_NV, logits_by_hand(Path(recipe.teachers[0].model), example)).sum())
        if isinstance(loss, list):
            targets_N = torch.from_numpy(example.tokens_T[example.mask_T].astype(np.int64))
            total += 2.0 * float(torch.nn.functional.cross_entropy(student_NV, targets_N, reduction="sum"))
        count += example.supervised
    assert curve(run)[0] == pytest.approx(total / count, rel=1e-4)


def test_live_teacher_is_what_a_full_store_would_hold(tiny_run, tmp_path):
    """Threshold sampling keeps every probability exactly as tau goes to 0, so both sources give one gradient. What is
    stored of a head is rounded to 8 bits without bias, hence the tolerance."""
    stored = prepared(tiny_run, tmp_path / "stored", signal={"kind": "sampled", "tau": 2e-5}, epochs=0.3)
    live = prepared(tiny_run, tmp_path / "live", epochs=0.3)
    train(*stored)
    train(*live)
    assert curve(stored[1])[0] == pytest.approx(curve(live[1])[0], rel=0.02)


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@given(lengths, st.sampled_from([0.0, 0.02, 0.2]))
def test_tiles_hold_every_sequence_once_and_pad_no_more_than_allowed(step, most):
    found = tiles(step, most=most)
    assert sorted(i for tile in found for i in tile) == list(range(len(step)))
    assert padding_share(step, found) <= most + 1e-9


@given(lengths, st.sampled_from([0.0, 0.02, 0.2]))
def test_a_pass_is_widened_only_as_far_as_allowed(pass_, most):
    width = width_of(pass_, most=most)
    assert max(pass_) <= width < max(pass_) + 8
    padded = 1 - sum(pass_) / (width * len(pass_))
    assert width == max(pass_) or padded <= most + 1e-9
    round_ = -(-max(pass_) // 8) * 8
    assert width == round_ or 1 - sum(pass_) / (round_ * len(pass_)) > most - 1e-9


def test_a_wider_pass_predicts_the_same():
    rows = (([5, 6, 7], [False, True, True]), ([8, 9], [False, True]))
    examples = [
        make_example(np.int32(row), np.array(mask), prompt_id="", completion=str(n), teacher="", split=Split.TRAIN)
        for n, (row, mask) in enumerate(rows)
    ]
    narrow, wide = collate(examples, 0), collate(examples, 0, width=8)
    assert wide.tokens_BT.shape == (2, 8)
    assert torch.equal(wide.tokens_BT[:, :3], narrow.tokens_BT)
    assert torch.equal(wide.targets_N, narrow.targets_N)
    assert torch.equal(wide.predict_BT[:, :3], narrow.predict_BT)
    assert not wide.predict_BT[:, 3:].any()
    assert not wide.attention_BT[:, 3:].any()


def test_no_pass_is_wider_than_the_longest_sequence_that_there_is():
    rows = [
        make_example(np.arange(n, dtype=np.int32), np.arange(n) > 0, prompt_id="", completion=str(n), teacher="",
                     split=Split.TRAIN)
        for n in (61, 61, 59)
    ]  # fmt: skip
    for steps, width in (((0, 1),), 61), (((2, 2),), 60):
        feed = Feed(rows, Schedule(steps=steps, prompts=((),), steps_per_epoch=1))
        assert [batch.tokens_BT.shape[1] for batch in feed[0].passes] == [width]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.sampled_from([0.02, 0.2]))
def test_tiles_are_as_few_as_can_be(step, most):
    """Against every way of cutting the sorted sequence."""
    ordered = sorted(range(len(step)), key=lambda i: step[i])
    fewest = len(step)
    for cuts in range(1 << (len(step) - 1)):
        ends = [i + 1 for i in range(len(step) - 1) if cuts >> i & 1] + [len(step)]
        groups = [ordered[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        if padding_share(step, groups) <= most:
            fewest = min(fewest, len(groups))
    assert len(tiles(step, most=most)) == fewest


def test_packed_rows_predict_what_padded_ones_do():
    generator = np.random.default_rng(0)
    examples = []
    for n, (length, first) in enumerate([(9, 4), (5, 1), (12, 11)]):
        tokens_T = generator.integers(0, 50, length).astype(np.int32)
        mask_T = np.arange(length) >= first
        examples.append(make_example(tokens_T, mask_T, prompt_id="", completion=str(n), teacher="", split=Split.TRAIN))
    padded, packed = collate(examples, 0), collate_packed(examples)
    assert torch.equal(packed.targets_N, padded.targets_N)
    assert packed.tokens_BT.shape == (1, 26)
    assert torch.equal(packed.tokens_BT[packed.predict_BT], padded.tokens_BT[padded.predict_BT])
    assert packed.positions_BT[packed.predict_BT].tolist() == [3, 4, 5, 6, 7, 0, 1, 2, 3, 10]


@pytest.mark.parametrize("change", [{"layout": "packed"}, {"activation_checkpointing": True}], ids=str)
def test_how_it_is_computed_does_not_change_what_is_learned(tiny_run, tmp_path, change):
    """Packed equals unpacked, recomputed equals kept: in the loss of every step and in the weights after some."""
    plain = trained(*prepared(tiny_run, tmp_path / "plain", epochs=1, batch_size=6))
    other = trained(*prepared(tiny_run, tmp_path / "other", epochs=1, batch_size=6, **change))
    assert curve(RunDir(tmp_path / "plain")) == pytest.approx(curve(RunDir(tmp_path / "other")), rel=1e-4)
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


ON_POLICY = {"share": 0.5, "max_tokens": 6, "every": 2}


def test_the_student_learns_from_its_own_answers(tiny_run, tmp_path):
    """Every rollout is the continuation of a training prompt, in the journal, and counted; reverse KL falls."""
    recipe, run = prepared(
        tiny_run, tmp_path / "run", loss="reverse_kl", epochs=12, on_policy=ON_POLICY | {"share": 1.0}
    )
    train(recipe, run)
    rows = list(read_records(run / "rollouts.parquet", Rollout))
    steps = json.loads((run / "training.json").read_text())["steps"]
    assert len(rows) == sum(len(step) for step in make_order(recipe, run).prompts)
    assert {row.prompt_id for row in rows} <= {e.prompt_id for e in read_examples(run / "examples").train}
    assert all(0 <= row.step - row.written_at < 2 for row in rows)
    assert steps[-1]["tokens"] == sum(len(row.tokens) for row in rows)
    assert all(len(row.tokens) == 6 for row in rows if row.finish_reason == "length")
    losses = curve(run)
    assert np.mean(losses[-12:]) < 0.8 * np.mean(losses[:4])


def make_order(recipe: Recipe, run: RunDir):
    from limbeck.train.stage import _schedule

    return _schedule(recipe, read_examples(run / "examples"))


def test_rollouts_are_drawn_from_the_student_as_it_is(tiny_run, tmp_path):
    """Greedily, the first stretch's answers are those of the beginning by transformers' own generate."""
    greedy = ON_POLICY | {"share": 1.0, "temperature": 1e-6}
    recipe, run = prepared(tiny_run, tmp_path / "run", epochs=0.3, on_policy=greedy)
    train(recipe, run)
    model = AutoModelForCausalLM.from_pretrained(run / "beginning", dtype=torch.float32)
    rows = {(row.step, row.slot): row for row in read_records(run / "rollouts.parquet", Rollout)}
    examples = read_examples(run / "examples").train
    for slot, index in enumerate(make_order(recipe, run).prompts[0]):
        prompt = torch.from_numpy(examples[index].tokens_T[: prompt_length(examples[index])].astype(np.int64))[None]
        written = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert list(rows[0, slot].tokens) == written[0, prompt.shape[1] :].tolist()


def test_killed_while_writing_and_learning_it_ends_with_the_same_bits(tiny_run, tmp_path):
    """Trap 18 with on-policy: rollouts, sampler and weights come back; nothing is written twice."""
    for name in ("whole", "killed"):
        prepared(tiny_run, tmp_path / name, loss="reverse_kl", on_policy=ON_POLICY, epochs=3)
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    train(whole.recipe(), whole)
    kill_after_checkpoints(killed, (1, 2))
    assert curve(whole) == curve(killed)
    a, b = (load_file(run / "student" / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    told = [
        [(row.step, row.slot, row.tokens, row.request_id) for row in read_records(run / "rollouts.parquet", Rollout)]
        for run in (whole, killed)
    ]
    assert told[0] == told[1]
    shutil.rmtree(killed.root)


REFUSED = [
    ({"loss": "forward_kl"}, {"kind": "text"}, "train.loss"),
    ({"loss": "reverse_kl"}, {"kind": "sampled"}, "train.loss"),
    ({"on_policy": {}}, {"kind": "sampled"}, "train.on_policy"),
    ({"on_policy": {}, "loss": [{"name": "cross_entropy", "on": "text"}]}, {"kind": "hidden"}, "train.loss"),
]


@pytest.mark.parametrize(("changes", "kind", "place"), REFUSED, ids=str)
def test_what_cannot_be_learned_without_bias_is_refused_before_anything_is_spent(
    tiny_run, tmp_path, changes, kind, place
):
    told = RunDir(tiny_run).recipe().model_dump(mode="json")
    told["train"] |= changes
    with pytest.raises(RecipeError) as refused:
        preflight(Recipe.model_validate(told | {"signal": kind}))
    assert any(problem.where.startswith(place) for problem in refused.value.problems)


def test_a_live_teacher_is_one_teacher(tiny_run, tmp_path):
    teacher = RunDir(tiny_run).recipe().model_dump(mode="json")["teacher"]
    shutil.copytree(teacher["model"], tmp_path / "other")
    told = RunDir(tiny_run).recipe().model_dump(mode="json") | {
        "signal": {"kind": "hidden"},
        "teacher": [teacher, teacher | {"model": str(tmp_path / "other")}],
    }
    with pytest.raises(RecipeError, match=r"hidden with 2 teachers"):
        preflight(Recipe.model_validate(told))
