"""A low-rank adapter learns; the student's own weights stay, and their sum is what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_learning import curve, prepared
from test_train import kill_after_checkpoints
from transformers import AutoModelForCausalLM

from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.train.stage import train

ADAPTER = {"rank": 4, "alpha": 8}


def test_the_saved_student_is_its_beginning_and_the_adapter(tiny_run, tmp_path):
    """By peft itself, put on the beginning unmerged; the beginning's weights are what they were."""
    recipe, run = prepared(tiny_run, tmp_path / "run", adapter=ADAPTER, epochs=2, learning_rate=0.01)
    train(recipe, run)
    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    beginning = AutoModelForCausalLM.from_pretrained(run / "beginning", dtype=torch.float32)
    tokens = torch.from_numpy(read_examples(run / "examples").train[0].tokens_T.astype(np.int64))[None]
    with torch.no_grad():
        before = beginning(tokens).logits
        by_peft = PeftModel.from_pretrained(beginning, run / "student" / "adapter")(tokens).logits
        after = student(tokens).logits
    torch.testing.assert_close(after, by_peft, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01
    embeddings = [
        load_file(run / name / "model.safetensors")["model.embed_tokens.weight"] for name in ("beginning", "student")
    ]
    assert torch.equal(*embeddings)
    facts = json.loads((run / "training.json").read_text())
    # Rank 4 in seven linear layers of two decoder layers: 4 * (inputs + outputs) numbers each.
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert facts["parameters_trained"] == 2 * sum(4 * (a + b) for a, b in sizes)
    assert np.mean(curve(run)[-3:]) < np.mean(curve(run)[:3])


def test_the_first_gradient_is_that_of_the_whole_weights_through_the_adapter(tiny_run, tmp_path):
    """B starts at 0, so the first loss is the beginning's own, with or without an adapter."""
    for name, adapter in (("with", ADAPTER), ("without", None)):
        train(*prepared(tiny_run, tmp_path / name, adapter=adapter, epochs=0.3))
    assert curve(RunDir(tmp_path / "with"))[0] == pytest.approx(curve(RunDir(tmp_path / "without"))[0], rel=1e-5)


def test_an_adapter_learns_on_policy_and_resumes_to_the_same_bits(tiny_run, tmp_path):
    """Dropout draws from a random state that comes back too."""
    changes = {"adapter": ADAPTER | {"dropout": 0.2}, "on_policy": {"share": 0.5, "max_tokens": 4, "every": 2}}
    for name in ("whole", "killed"):
        prepared(tiny_run, tmp_path / name, epochs=2, **changes)
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    train(whole.recipe(), whole)
    kill_after_checkpoints(killed, (1,))
    assert curve(whole) == curve(killed)
    a, b = (load_file(Path(run / "student") / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
