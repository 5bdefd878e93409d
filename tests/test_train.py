"""The laws of training: the exact denominator, the fixed order, and resuming to the same bits."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import limbeck
from limbeck.errors import RecipeError
from limbeck.recipe import Recipe
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal.store import SignalStore
from limbeck.train.schedule import cut, make_schedule
from limbeck.train.stage import _narrowed, train
from limbeck.train.trainer import DistillationTrainer, last_checkpoint


def fresh(tiny_run: Path, place: Path, **settings: object) -> tuple[Recipe, RunDir]:
    """A copy of the prepared run, with other training settings. Trains directly, without the ledger."""
    shutil.copytree(tiny_run, place)
    recipe = RunDir(place).recipe()
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)}), RunDir(place)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def curve(run: RunDir) -> list[float]:
    return [step["loss"] for step in json.loads((run / "training.json").read_text())["steps"]]


lengths = st.lists(st.integers(1, 300), min_size=4, max_size=60)


@given(lengths, st.integers(4, 9), st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_each_epoch_sees_every_example_once(lengths, batch_size, seed, pieces):
    assume(len(lengths) // -(-len(lengths) // batch_size) >= pieces)
    schedule = make_schedule(lengths, batch_size=batch_size, epochs=2, pieces=pieces, seed=seed)
    for epoch in (0, 1):
        steps = schedule.steps[epoch * schedule.steps_per_epoch : (epoch + 1) * schedule.steps_per_epoch]
        assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert all(len(part) for step in schedule.steps for part in cut([lengths[i] for i in step], pieces))


@given(lengths, st.sampled_from([1, 2, 3]))
def test_pieces_of_a_step_are_the_step_without_loss_or_overlap(step, pieces):
    parts = cut(step, pieces)
    assert sorted(i for part in parts for i in part) == list(range(len(step)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    longest = [max(step[i] for i in part) for part in parts]
    assert longest == sorted(longest)


@given(lengths, st.floats(0, 1), st.floats(0, 1), st.integers(4, 9), st.integers(0, 3))
def test_students_sequences_keep_to_their_share(lengths, start, end, batch_size, seed):
    """Over any number of first steps, the sequences the student writes are within half of what their shares add up to;
    both streams see every example once before any twice."""
    assume((start, end) != (0, 0))
    schedule = make_schedule(lengths, batch_size=batch_size, epochs=3, pieces=1, seed=seed, own=(start, end))
    due = written = 0.0
    for n, (step, prompts) in enumerate(zip(schedule.steps, schedule.prompts, strict=True)):
        due += (len(step) + len(prompts)) * (start + (end - start) * n / max(1, len(schedule.steps) - 1))
        written += len(prompts)
        assert abs(due - written) <= 0.5 + 1e-6
    for stream in (schedule.steps, schedule.prompts):
        seen = [i for step in stream for i in step]
        for first in range(0, len(seen), len(lengths)):
            epoch = seen[first : first + len(lengths)]
            assert len(set(epoch)) == len(epoch)


def test_more_pieces_than_sequences_is_refused():
    with pytest.raises(RecipeError, match=r"train\.accumulate"):
        make_schedule([5, 6, 7], batch_size=8, epochs=1, pieces=4, seed=0)


def test_first_loss_is_kl_by_an_independent_float64_loop(tiny_run, tmp_path):
    """Before any update, the logged loss of step 1 is the mean over its supervised tokens of
    -H - sum(weights * log q), computed here example by example from full float64 logits."""
    recipe, run = fresh(tiny_run, tmp_path / "run", epochs=1)
    train(recipe, run)
    examples, store = read_examples(run / "examples").train, SignalStore.open(run / "signals")
    from transformers import AutoModelForCausalLM

    from limbeck.seeds import derive_seed

    schedule = make_schedule(
        [len(e.tokens_T) for e in examples],
        batch_size=recipe.train.batch_size,
        epochs=1,
        pieces=1,
        seed=derive_seed(recipe.seed, "train", "order"),
    )
    model = AutoModelForCausalLM.from_pretrained(run / "beginning", dtype=torch.float64)
    total, count = 0.0, 0
    for i in schedule.steps[0]:
        example = examples[i]
        with torch.no_grad():
            logits_TV = model(torch.from_numpy(example.tokens_T.astype(np.int64))[None]).logits[0]
        positions = np.flatnonzero(example.mask_T)
        log_q_NV = logits_TV[positions - 1].log_softmax(-1)
        signal_of_one = store.take([example.id])
        total += float(-(signal_of_one.to_dense().double() * log_q_NV).sum() - signal_of_one.entropy_N.double().sum())
        count += len(positions)
    assert curve(run)[0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_does_not_change_the_gradient(tiny_run, tmp_path, accumulate):
    """Trap 2: ragged lengths, so a mean of means would differ."""
    results = []
    for name, pieces in (("whole", 1), ("pieces", accumulate)):
        recipe, run = fresh(tiny_run, tmp_path / name, accumulate=pieces, epochs=1, batch_size=8)
        train(recipe, run)
        results.append((curve(run), weights(run)))
    (curve_a, a), (curve_b, b) = results
    assert curve_a == pytest.approx(curve_b, rel=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


def test_the_student_learns(tiny_run, tmp_path):
    recipe, run = fresh(tiny_run, tmp_path / "run", epochs=6)
    train(recipe, run)
    losses = curve(run)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def kill_after_checkpoints(
    run: RunDir, counts: tuple[int, ...], learn: Callable[[str | Path], None] = forked.learn
) -> None:
    """Train, kill -9 it when so many checkpoints are complete, for each count; then let it come to its end."""
    for wanted in counts:
        process = forked.start(learn, run.root)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if len(list((run / "checkpoints").glob("checkpoint-*/complete"))) >= wanted:
                break
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        assert last_checkpoint(run / "checkpoints")
    process = forked.start(learn, run.root)
    process.join()
    assert process.exitcode == 0


def test_killed_and_resumed_training_ends_with_the_same_bits(tiny_run, tmp_path):
    """Trap 18, float32 on the CPU: kill -9 at several moments, resume, compare every weight and the loss curve."""
    for name in ("whole", "killed"):
        shutil.copytree(tiny_run, tmp_path / name)
    train(RunDir(tmp_path / "whole").recipe(), RunDir(tmp_path / "whole"))
    kill_after_checkpoints(RunDir(tmp_path / "killed"), (1, 2))
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    assert curve(whole) == curve(killed)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(killed)[name]), name


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "trainer_state.json").write_text("{}")
        if complete:
            (directory / "complete").write_text("")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-6").exists()


def test_the_student_loads_as_any_model_does(tiny_run, tmp_path):
    recipe, run = fresh(tiny_run, tmp_path / "run", epochs=1)
    train(recipe, run)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(run / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert model.config.num_hidden_layers == 2
    assert limbeck.__version__


def test_a_tied_head_is_written_once(tmp_path):
    """The saved student holds one tensor for embeddings and head, as the model that it began as."""
    model = tiny.llama(64)
    model.save_pretrained(tmp_path / "tied", state_dict=_narrowed(model.state_dict(), torch.bfloat16))
    with safe_open(tmp_path / "tied" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  not a dictionary
    again = type(model).from_pretrained(tmp_path / "tied")
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(again.lm_head.weight.float(), model.lm_head.weight, rtol=2**-8, atol=0)


def test_gradients_clipped_in_the_optimisers_step_are_those_clipped_before(tiny_run, tmp_path, monkeypatch):
    """At a limit that every step passes. Gradients are float32; one way multiplies by what the other divides by."""
    find, found_by = DistillationTrainer._scaling_optimizer, []
    monkeypatch.setattr(
        DistillationTrainer, "_scaling_optimizer", lambda self: found_by.append(find(self)) or found_by[-1]
    )
    recipe, run = fresh(tiny_run, tmp_path / "in the step", clip=0.05, epochs=1)
    taken = train(recipe, run)
    assert found_by
    assert None not in found_by
    monkeypatch.setattr(DistillationTrainer, "_scaling_optimizer", lambda _: None)
    _, before = fresh(tiny_run, tmp_path / "before", clip=0.05, epochs=1)
    assert train(recipe, before)["last_loss"] == pytest.approx(taken["last_loss"], rel=1e-4)
    found, expected = weights(run), weights(before)
    started = load_file(tiny_run / "beginning" / "model.safetensors")
    for name, weight in expected.items():
        moved = (weight - started[name]).abs().max()
        assert (found[name] - weight).abs().max() <= 0.02 * moved, name
