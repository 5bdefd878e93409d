"""The same laws on a GPU: what it computes is held to float64 on the CPU. Skipped where there is none.

LIMBECK_TEST_DEVICE=cpu runs the file on the CPU, to try the tests themselves.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import test_layers
import tiny
import torch
from conftest import prompt_file, recipe_dict
from safetensors.torch import load_file
from test_fused import PAIRS, N, Student, V, gradients, make_signal, make_student, normal, plain, rounded_once, seeded
from test_train import kill_after_checkpoints
from torch import Tensor

import limbeck
from limbeck.generate import Sampling, sample_batch
from limbeck.ledger import verify
from limbeck.models import compiling, layers, stream
from limbeck.models.layers import fused_layers
from limbeck.rundir import RunDir
from limbeck.signal import DenseSignal, TopKSignal, from_logits, threshold_sample, topk_signal
from limbeck.train import compiled
from limbeck.train.fused import fused_loss, position_losses
from limbeck.train.losses import Loss
from limbeck.train.pairing import signal_loss

DEVICE = os.environ.get("LIMBECK_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=["eager", "passes", "compiled"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The eager kernels, the passes as they are written, and the passes compiled."""
    monkeypatch.setattr(compiling, "usable", lambda _device: request.param != "eager")
    if request.param == "passes":
        monkeypatch.setattr(compiled, "compiled", lambda function: function)
    yield request.param
    if request.param == "compiled":
        compiling.compiled.cache_clear()
        torch.compiler.reset()


def there(student: Student) -> Student:
    """The student on the device, its leaves leaves again."""
    moved = [
        None if x is None else x.detach().to(DEVICE).requires_grad_()
        for x in (student.hidden, student.weight, student.bias)
    ]
    assert moved[0] is not None
    assert moved[1] is not None
    return student._replace(hidden=moved[0], weight=moved[1], bias=moved[2])


def assert_same_there(student: Student, signal, loss, temperature: float = 1.0, weights: Tensor | None = None) -> None:
    each = plain(student, signal, loss, temperature)
    expected = each.sum() if weights is None else (each * weights).sum()
    far = there(student)
    found = fused_loss(
        far.hidden,
        far.weight,
        tuple(s.to(DEVICE) for s in signal) if isinstance(signal, tuple) else signal.to(DEVICE),
        loss=loss,
        temperature=temperature,
        chunk=3,
        weights=None if weights is None else weights.to(DEVICE),
        allow_biased=True,
        **far.options(),
    )
    # A top-k signal is in float32, and a GPU rounds the logarithm of its tail otherwise.
    near = 1e-6 if isinstance(signal, TopKSignal) else 1e-10
    torch.testing.assert_close(found.cpu(), expected, rtol=near, atol=near)
    for ours, theirs in zip(gradients(found * 1.7, far), gradients(expected * 1.7, student), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=near, atol=near)


@pytest.mark.parametrize("form", ["eager", "passes"], indirect=True)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.usefixtures("form")
def test_the_fused_loss_is_the_plain_one_of_the_cpu(name: str, kind: str) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, -1.0, 3.0], dtype=torch.float64)
    assert_same_there(make_student(), make_signal(kind), name)
    assert_same_there(make_student(bias=True, scale=0.8, softcap=4.0), make_signal(kind, 1.6), name, 1.6, weights)


@pytest.mark.usefixtures("form")
def test_compiled_for_float64_with_a_soft_cap() -> None:
    for name, kind in (("forward_kl", "sampled"), ("reverse_kl", "hidden"), ("forward_kl", "top_k")):
        assert_same_there(make_student(softcap=3.0), make_signal(kind), name)


@pytest.mark.parametrize("form", ["eager", "compiled"], indirect=True)
@pytest.mark.usefixtures("form")
def test_a_weighted_sum_over_several_signals() -> None:
    terms = (Loss("forward_kl", weight=2.0, temperature=2.0, on="hidden"), Loss("cross_entropy", weight=0.3, on="text"))
    assert_same_there(make_student(bias=True, softcap=5.0), (make_signal("hidden"), make_signal("text")), terms)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_bfloat16_inputs_are_worked_on_in_float32(name: str, kind: str, form: str, caplog) -> None:
    n, v = 24, 300
    half = make_student(n=n, v=v, dtype=torch.bfloat16)
    exact, logits = rounded_once(half)
    signal, far = make_signal(kind, n=n, v=v), there(half)
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        found = fused_loss(far.hidden, far.weight, signal.to(DEVICE), loss=name, chunk=7, allow_biased=True)
    assert compiling.__name__ not in {r.name for r in caplog.records}, form  # or the eager form had stood in
    expected = signal_loss(logits, signal, loss=name, allow_biased=True).sum()
    assert found.dtype == torch.float32
    # A logit half-way between two numbers of bfloat16 may be rounded to either by another order of summation.
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-4, atol=2e-4)
    for ours, theirs in zip(gradients(found, far), gradients(expected, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double().cpu() - theirs).norm() / theirs.norm()) < 2**-7


def test_a_large_vocabulary_in_default_chunks(form: str) -> None:
    """2,500 positions over 20,011 ids: several chunks, an uneven last one, against float64 from the same logits."""
    n, v, d = 2500, 20_011, 48
    if DEVICE == "cpu":
        n, v = 300, 2_011
    hidden, weight = (normal(*s, seed=i).mul(0.4).bfloat16().to(DEVICE) for i, s in enumerate([(n, d), (v, d)]))
    hidden.requires_grad_()
    weight = weight.float().requires_grad_()  # as in training: float32 weights, products in bfloat16
    teacher = from_logits(normal(n, v, seed=3, dtype=torch.float32).to(DEVICE) * 3, 0.02, generator=seeded(1))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = fused_loss(hidden, weight, teacher, loss="forward_kl")
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    logits = logits + (logits.bfloat16().double() - logits).detach()
    expected = signal_loss(logits, teacher, loss="forward_kl").sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    ours, theirs = torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(expected, wide)
    assert [g.dtype for g in ours] == [torch.bfloat16, torch.float32]
    for one, two in zip(ours, theirs, strict=True):
        assert float((one.double() - two).norm() / two.norm()) < 2**-7, form


@pytest.mark.usefixtures("form")
def test_position_losses_without_a_gradient_and_rows_ruled_out() -> None:
    logits = normal(N, V, seed=9)
    logits[:, 5] = -math.inf
    student = make_student()
    far = there(student)
    for name in ("forward_kl", "generalized_jsd", "total_variation"):
        found = position_losses(far.hidden, far.weight, DenseSignal(logits.to(DEVICE)), loss=name, chunk=4)
        torch.testing.assert_close(found.cpu(), plain(student, DenseSignal(logits), name), rtol=1e-10, atol=1e-10)


# Signals, and answers.


def test_draws_are_those_of_the_cpu() -> None:
    logits = normal(300, 5000, seed=8) * 3
    probs = torch.softmax(logits, dim=1)
    for make in (
        lambda device: threshold_sample(probs.to(device), 0.02, generator=seeded(5)),
        lambda device: from_logits(logits.to(device), 0.02, 1.3, generator=seeded(5)),
        lambda device: topk_signal(logits.to(device), 20, 1.3),
    ):
        here, far = make("cpu"), make(DEVICE).to("cpu")
        for name in here._per_position:
            torch.testing.assert_close(getattr(far, name), getattr(here, name), rtol=1e-6, atol=1e-7)


def test_draws_from_float32_are_distributions_whose_heads_are_those_of_the_cpu() -> None:
    logits = normal(300, 5000, seed=8, dtype=torch.float32) * 3
    here = from_logits(logits, 0.02, generator=seeded(5))
    far = from_logits(logits.to(DEVICE), 0.02, generator=seeded(5)).to("cpu")
    assert (far.to_dense().sum(1) - 1).abs().max() < 0.02 * (1 + 1e-4)
    same = (here.n_head_N == far.n_head_N) & (here.n_tail_N == far.n_tail_N)
    assert same.float().mean() > 0.98  # a tooth of the comb within a rounding of a token's end falls either way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=24, temperature=0),
        Sampling(max_tokens=24, temperature=0.8),
        Sampling(max_tokens=24, temperature=1.1, top_p=0.9, top_k=40),
    ],
)
def test_answers_are_those_of_the_cpu(dtype: torch.dtype, sampling: Sampling) -> None:
    model = tiny.llama(320).to(dtype)
    prompts = [[1, *range(10, 10 + 3 * n % 17 + 9)] for n in range(12)] + [[1, 5, 7]] * 3
    answers = [
        sample_batch(model.to(device), prompts, sampling, stop_ids={2}, seeds=[*range(len(prompts))], rows=6)
        for device in ("cpu", DEVICE)
    ]
    assert answers[0] == answers[1]


# Whole runs.

HIDDEN = {"signal": {"kind": "hidden"}}
RUNS = {
    "sampled, float32, padded": {"train": {"layout": "padded"}},
    "sampled, bf16, packed": {"train": {"precision": "bf16", "layout": "packed"}},
    "sampled, bf16, compiled": {"train": {"precision": "bf16"}},
    "top-k, bf16, two pieces": {
        "signal": {"kind": "top_k", "k": 8},
        "train": {"precision": "bf16", "accumulate": 2, "allow_biased": True},
    },
    "live, bf16, adapter, activations computed again": HIDDEN
    | {"train": {"precision": "bf16", "activation_checkpointing": True, "adapter": {"rank": 4, "alpha": 8}}},
    "on-policy, bf16, packed": HIDDEN
    | {
        "train": {
            "precision": "bf16",
            "layout": "packed",
            "loss": "reverse_kl",
            "on_policy": {"share": 0.5, "max_tokens": 6, "every": 2},
        }
    },
}


def made(teacher: Path, place: Path, changes: dict) -> RunDir:
    """A run on the device with these changes to the recipe."""
    told = recipe_dict(teacher, prompt_file(place / "prompts.jsonl", 24))
    for key, value in changes.items():
        told[key] = told[key] | value if key == "train" else value
    limbeck.run(limbeck.Recipe.model_validate(told), place / "run")
    return RunDir(place / "run")


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(teacher_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith("compiled"):
        monkeypatch.setattr(compiling, "usable", lambda device: device.type == DEVICE)
        monkeypatch.setattr(stream, "usable", lambda device: device.type == DEVICE)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = made(teacher_dir, tmp_path, RUNS[name])
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() > 0
    told = json.loads((run / "training.json").read_text())
    losses = [step["loss"] for step in told["steps"]]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-2:]) < sum(losses[:2])
    assert json.loads((run / "scores.json").read_text())
    assert verify(run.root).ok


def on_the_cpu(*command: str) -> str:
    """What limbeck prints in a process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", *command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_store_written_on_the_gpu_holds_on_the_cpu(teacher_dir: Path, tmp_path: Path) -> None:
    run = made(teacher_dir, tmp_path, {})
    on_the_cpu("ledger", "verify", str(run.root), "--audit")


def test_one_step_is_that_of_the_cpu(tiny_run: Path, tmp_path: Path) -> None:
    """Float32. AdamW's first step is the learning rate times the gradient's sign, so a gradient of rounding noise may
    go either way: all but a few weights are the same to a hundredth of a step."""
    code = (
        "import sys; from limbeck.rundir import RunDir; from limbeck.train.stage import train; "
        "run = RunDir(sys.argv[1]); recipe = run.recipe(); "
        "settings = recipe.train.model_copy(update={'epochs': 0.2, 'layout': 'padded'}); "
        "train(recipe.model_copy(update={'train': settings}), run)"
    )
    found = {}
    for name, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        shutil.copytree(tiny_run, tmp_path / name)
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=os.environ | hidden, check=True)
        steps = json.loads((tmp_path / name / "training.json").read_text())["steps"]
        found[name] = steps[0], load_file(tmp_path / name / "student" / "model.safetensors")
        assert len(steps) == 1
    (gpu, ours), (cpu, theirs) = found["gpu"], found["cpu"]
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    assert float((apart > 0.003 / 100).float().mean()) < 0.01
    assert float(apart.max()) <= 2.1 * 0.003


def learn_to_the_bit(root: str | Path) -> None:
    """With torch's deterministic kernels."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    forked.learn(root)


def test_killed_and_resumed_it_ends_with_the_same_weights(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        shutil.copytree(tiny_run, tmp_path / name)
    whole = forked.start(learn_to_the_bit, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    kill_after_checkpoints(RunDir(tmp_path / "killed"), (1, 2), learn_to_the_bit)
    whole, killed = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_layers_in_few_kernels_are_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, in float64, packed too; and in bfloat16 no farther from it than the model's own operations."""
    monkeypatch.setattr(layers, "usable", lambda _device: True)
    monkeypatch.setattr(test_layers, "TOKENS_BT", test_layers.TOKENS_BT.to(DEVICE))
    model = test_layers.model_of(test_layers.OF_THE_FORM[name]).to(DEVICE)  # type: ignore[arg-type]
    wanted = {
        positions: test_layers.learned(model, positions) for positions in (None, test_layers.PACKED_BT.to(DEVICE))
    }
    with fused_layers(model, torch.float64):
        assert len(test_layers.replaced(model)) == 2
        for positions_BT, (hidden_BTD, grads) in wanted.items():
            found_BTD, found = test_layers.learned(model, positions_BT)
            torch.testing.assert_close(found_BTD, hidden_BTD, rtol=1e-9, atol=1e-9)
            for part, grad in grads.items():
                torch.testing.assert_close(found[part], grad, rtol=1e-8, atol=1e-8)
    errors = []
    narrow = copy.deepcopy(model).float()
    for fused in (False, True):
        with (
            torch.autocast(DEVICE, torch.bfloat16),
            fused_layers(narrow, torch.bfloat16 if fused else None),
            stream.narrow_stream(narrow, torch.bfloat16),
        ):
            _, found = test_layers.learned(narrow, dtype=torch.float32)
        far = [(found[part] - grad).norm() / grad.norm() for part, grad in wanted[None][1].items()]
        errors.append(float(torch.stack([x.double() for x in far]).mean()))
    assert errors[1] <= 1.1 * errors[0]
