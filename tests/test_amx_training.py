"""Training with the matrix unit: the same step however it is computed, the same bits after a resume, and a copy's own
weights in what a student writes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from conftest import prompt_file, recipe_dict
from safetensors.torch import load_file
from test_train import curve, fresh, weights
from torch import Tensor, nn

import limbeck
from limbeck.ledger.canonical import manifest
from limbeck.models import amx, layer_parts, layers
from limbeck.models.amx import attention as unit_attention
from limbeck.models.amx.linear import float32_gradients
from limbeck.models.compiling import SWITCH
from limbeck.recipe import Recipe
from limbeck.records import Rollout
from limbeck.rundir import RunDir
from limbeck.signal import annotate as annotating
from limbeck.tables import read_records
from limbeck.train.stage import train
from limbeck.train.trainer import DistillationTrainer


@pytest.fixture(scope="module", autouse=True)
def unit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled once for this file, and worth it for every training; nothing else is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "")
        if why := amx.lacking():
            pytest.skip(why)
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(amx, "WORTH", 1)
        amx._library.cache_clear()
        yield
    amx._library.cache_clear()


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As far as `student`, of a teacher that is wide enough for the unit. Copy it before writing into it."""
    base, words = tmp_path_factory.mktemp("wide"), tiny.tokenizer()
    teacher = tiny.llama(len(words), layers=3, hidden=64, head=32)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(0.5 if weight.dim() == 2 else 1)  # bfloat16 is a small part of a gradient, as in real models
    teacher.save_pretrained(base / "teacher")
    words.save_pretrained(base / "teacher")
    told = recipe_dict(base / "teacher", prompt_file(base / "prompts.jsonl", 16))
    told["train"]["precision"] = "bf16"
    limbeck.run(Recipe.model_validate(told), base / "run", until="student")
    return base / "run"


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Grows by the shape of every query that attends by the unit."""
    shapes, attend = [], unit_attention.attend

    def counted(query: Tensor, *args: Any) -> Tensor:
        shapes.append(query.shape)
        return attend(query, *args)

    monkeypatch.setattr(unit_attention, "attend", counted)
    return shapes


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of every product of the unit."""
    rows, product = [], amx.weight_gradient

    def counted(dy_NO: Tensor, *args: object, **more: object) -> Tensor:
        rows.append(len(dy_NO))
        return product(dy_NO, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(amx, "weight_gradient", counted)
    return rows


def first_gradient(run: Path, place: Path, **settings: object) -> Tensor:
    """Of all weights, of a training's first step."""
    found: list[Tensor] = []
    clip = DistillationTrainer._clip_grad_norm

    def seen(self: DistillationTrainer, model: nn.Module):
        found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
        return clip(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_clip_grad_norm", seen)
        train(*fresh(run, place, epochs=0.3, batch_size=8, **settings))
    return found[0]


class Rounding(NamedTuple):
    exact: Tensor
    torchs: float


@pytest.fixture(scope="module")
def rounding(wide_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounding:
    """The gradient in float32, and how far that by torch's products under bf16 is from it."""
    base = tmp_path_factory.mktemp("rounding")
    exact = first_gradient(wide_run, base / "float32", precision="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "WORTH", 1 << 40)
        torchs = first_gradient(wide_run, base / "torch's")
    return Rounding(exact, float((torchs - exact).norm()))


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 4}, {"accumulate": 2, "activation_checkpointing": True}],
    ids=["whole", "in four pieces", "in two pieces, activations computed again"],
)
def test_a_steps_gradient_is_no_farther_from_float32s_than_torchs_however_it_is_computed(
    wide_run, tmp_path, rounding, products, attended, settings
):
    found = first_gradient(wide_run, tmp_path / "run", **settings)
    assert products
    assert attended
    error = float((found - rounding.exact).norm())
    assert error <= 1.05 * rounding.torchs
    assert error <= 0.05 * float(rounding.exact.norm())


@pytest.mark.parametrize("settings", [{}, {"accumulate": 4}], ids=["whole", "in four pieces"])
def test_nor_with_layers_in_few_kernels(wide_run, tmp_path, rounding, products, monkeypatch, settings):
    """The kernels as they are written. Attention's four products become two, the MLP's three stay three, and the head
    has one; without, there would be eight.
    """
    monkeypatch.setattr(layers, "usable", lambda _device: True)
    monkeypatch.setattr(layer_parts, "compiled", lambda function: function)
    mlps, mlp = [], layer_parts.added_gated_mlp
    monkeypatch.setattr(layers, "added_gated_mlp", lambda *args: mlps.append(1) or mlp(*args))
    found = first_gradient(wide_run, tmp_path / "run", **settings)
    assert mlps
    assert len(products) >= 5 * len(mlps)
    assert float((found - rounding.exact).norm()) <= 1.05 * rounding.torchs


def test_a_training_gone_on_with_ends_with_the_same_bits(wide_run, tmp_path, products):
    recipe, whole = fresh(wide_run, tmp_path / "whole", checkpoint_every=2)
    train(recipe, whole)
    assert products
    _, resumed = fresh(wide_run, tmp_path / "resumed")
    shutil.copytree(whole / "checkpoints", resumed / "checkpoints")
    newest = max((resumed / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    train(recipe, resumed)
    assert curve(resumed) == curve(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_a_teacher_annotates_by_the_unit_as_near_and_goes_on_to_the_same_bits(
    wide_run, tmp_path, attended, monkeypatch
):
    """In bfloat16, against torch's attention; and killed after every second batch."""
    monkeypatch.setattr(annotating, "_SHARD_MIN", 20)
    monkeypatch.setattr(annotating, "_SHARD_MAX", 20)
    monkeypatch.setattr(annotating, "_BATCH", 128)
    told = RunDir(wide_run).recipe().model_dump(mode="json")
    told["teacher"]["precision"] = "bf16"
    recipe = Recipe.model_validate(told)

    def fresh_run(name: str) -> RunDir:
        shutil.copytree(wide_run, tmp_path / name, ignore=shutil.ignore_patterns("signals"))
        return RunDir(tmp_path / name)

    whole, resumed, plain = (fresh_run(name) for name in ("whole", "resumed", "plain"))
    facts = annotating.annotate(recipe, whole)
    assert attended
    assert int(str(facts["shards"])) > 2
    annotate_batch, calls = annotating.annotate_batch, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return annotate_batch(*args)

    monkeypatch.setattr(annotating, "annotate_batch", stopping)
    for _ in range(20):
        with suppress(KeyboardInterrupt):
            annotating.annotate(recipe, resumed)
            break
    assert len(calls) > 3
    assert manifest(resumed / "signals") == manifest(whole / "signals")
    monkeypatch.setattr(annotating, "annotate_batch", annotate_batch)
    monkeypatch.setattr(amx, "WORTH", 1 << 40)
    attended.clear()
    torchs = annotating.annotate(recipe, plain)
    assert not attended
    for name in ("positions", "entropy_nats"):
        assert facts[name] == pytest.approx(torchs[name], rel=0.02), name


def test_an_adapter_as_wide_as_the_unit_needs_learns_on_policy(wide_run, tmp_path, products):
    told = RunDir(wide_run).recipe().model_dump(mode="json")
    told["signal"] = {"kind": "hidden"}
    changes = {"adapter": {"rank": 64}, "on_policy": {"share": 0.5, "max_tokens": 4, "every": 2}, "epochs": 1}
    recipe = Recipe.model_validate(told | {"train": told["train"] | changes})
    limbeck.run(recipe, tmp_path / "run", until="train")
    run = RunDir(tmp_path / "run")
    assert products
    assert read_records(run / "rollouts.parquet", Rollout)
    facts = json.loads((run / "training.json").read_text())
    assert all(step["loss"] > 0 for step in facts["steps"])
    # What the adapter learned is in the weights that it stands beside, and nowhere else.
    before, after = (load_file(run / name / "model.safetensors") for name in ("beginning", "student"))
    moved = {name for name, weight in before.items() if not torch.equal(weight.bfloat16(), after[name].bfloat16())}
    assert moved
    assert all("_proj." in name for name in moved)


def test_a_copy_made_while_a_model_learns_computes_with_its_own_weights():
    """On-policy answers are written by such a copy, in the student's precision."""
    model, x_ND = nn.Sequential(nn.Linear(64, 64)), torch.randn(5, 64)
    model.device = torch.device("cpu")  # type: ignore[assignment]  # as a model of transformers has one
    with amx.for_training(1), float32_gradients(model):  # type: ignore[arg-type]
        assert "forward" in vars(model[0])
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied[0].weight.mul_(2)
            copied[0].bias.zero_()
            assert torch.equal(copied(x_ND), x_ND @ (2 * model[0].weight).t())
            assert copied.bfloat16()(x_ND.bfloat16()).dtype == torch.bfloat16
