"""A narrower student: the heads and neurons that act least go, what stays is the teacher's bit for bit, and the model
that is saved says what the teacher says with the rest silenced."""

from __future__ import annotations

import base64
import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_student import COMMON, SMALL, chats, logits_of, made, recipe_for, run_with
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.errors import ModelError
from limbeck.ledger.canonical import manifest
from limbeck.recipe import PrunedStudent
from limbeck.records import Example
from limbeck.student.activation import head_activation, neuron_activation, strongest_heads
from limbeck.student.begin import begin
from limbeck.student.calibrate import calibrate
from limbeck.student.layers import only
from limbeck.student.prune import pruned
from limbeck.student.saving import prove, save
from limbeck.student.width import Heads, Kept

GROUPED = COMMON | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
LLAMA = hf.LlamaConfig(**GROUPED)
GPT2 = hf.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4)
WITH_BIASES = hf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)


def noisy(config) -> PreTrainedModel:
    """A model whose biases and norms are not the 0 and 1 that they begin with."""
    model = made(config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                # A layer norm of q or k without spread over its head would hide a head that was cut wrongly.
                weight.add_(0.3 * torch.randn(weight.shape, generator=random), alpha=1.0 if "norm" not in name else 0.5)
    return model


# ---- measuring


def rotated(x_THD: np.ndarray, theta: float) -> np.ndarray:
    """Rotary position embedding, halves paired (Su et al., arXiv 2104.09864, in Llama's layout)."""
    half = x_THD.shape[2] // 2
    angle_TD = np.arange(len(x_THD))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle_TD)[:, None], np.sin(angle_TD)[:, None]
    a, b = x_THD[..., :half], x_THD[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)


def slow_activations(model: PreTrainedModel, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    """The mean norms of heads, [layers, H], and the mean |activation| of neurons, [layers, M], over the positions
    before answer tokens: Llama in float64, one example at a time, so that there is no padding."""
    w = {name: weight.detach().double().numpy() for name, weight in model.state_dict().items()}
    c = model.config
    heads, neurons, count = np.zeros((c.num_hidden_layers, c.num_attention_heads)), 0.0, 0
    for example in examples:
        at = np.flatnonzero(example.mask_T) - 1
        count += len(at)
        x_TD = w["model.embed_tokens.weight"][example.tokens_T]
        added = []
        for i in range(c.num_hidden_layers):

            def linear(x, name, i=i):
                key = f"model.layers.{i}.{name}"
                return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0.0)

            def norm(x, name, i=i):
                return (
                    x / np.sqrt((x**2).mean(1, keepdims=True) + c.rms_norm_eps) * w[f"model.layers.{i}.{name}.weight"]
                )

            n_TD = norm(x_TD, "input_layernorm")
            q, k, v = (linear(n_TD, f"self_attn.{p}_proj").reshape(len(x_TD), -1, c.head_dim) for p in "qkv")
            q, k = rotated(q, c.rope_parameters["rope_theta"]), rotated(k, c.rope_parameters["rope_theta"])
            out = np.zeros_like(q)
            for h in range(c.num_attention_heads):
                g = h // (c.num_attention_heads // c.num_key_value_heads)
                scores_TT = q[:, h] @ k[:, g].T / np.sqrt(c.head_dim)
                scores_TT[np.triu_indices(len(x_TD), 1)] = -np.inf
                p_TT = np.exp(scores_TT - scores_TT.max(1, keepdims=True))
                out[:, h] = p_TT / p_TT.sum(1, keepdims=True) @ v[:, g]
            heads[i] += np.sqrt((out[at] ** 2).sum(2)).sum(0)
            x_TD = x_TD + linear(out.reshape(len(x_TD), -1), "self_attn.o_proj")
            n_TD = norm(x_TD, "post_attention_layernorm")
            gate = linear(n_TD, "mlp.gate_proj")
            act_TM = gate / (1 + np.exp(-gate)) * linear(n_TD, "mlp.up_proj")
            added.append(np.abs(act_TM[at]).sum(0))
            x_TD = x_TD + linear(act_TM, "mlp.down_proj")
        neurons = neurons + np.array(added)
    return heads / count, neurons / count


@pytest.mark.parametrize("config", [LLAMA, WITH_BIASES], ids=["plain", "biases"])
def test_activation_is_that_of_llama_by_hand(config):
    """The examples have different lengths, so the batches are padded and the slow version is not."""
    model, examples = noisy(config), chats(20)
    calibration = calibrate(model, examples, tokens=10**6)
    assert calibration.positions == sum(e.supervised for e in examples)
    assert any((batch.attention_BT == 0).any() for batch in calibration.batches)
    heads, neurons = slow_activations(model, examples)
    np.testing.assert_allclose(head_activation(model, calibration), heads, rtol=1e-4)
    np.testing.assert_allclose(neuron_activation(model, calibration), neurons, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_no_other_choice_of_heads_has_more(groups, size, data):
    """Against all choices there are."""
    scores = np.array(data.draw(st.lists(st.integers(0, 50), min_size=groups * size, max_size=groups * size)), float)
    keep_groups, keep_size = data.draw(st.integers(1, groups)), data.draw(st.integers(1, size))
    there, asked = Heads(groups * size, groups, 4), Heads(keep_groups * keep_size, keep_groups, 4)
    heads, kept_groups = strongest_heads(scores, there, asked)
    assert sorted(heads) == list(heads)
    assert [h // size for h in heads] == [g for g in kept_groups for _ in range(keep_size)]
    best = max(
        sum(
            max(scores[g * size + np.array(c)].sum() for c in itertools.combinations(range(size), keep_size))
            for g in some
        )
        for some in itertools.combinations(range(groups), keep_groups)
    )
    assert scores[list(heads)].sum() == best


# ---- cutting


def narrowed(model: PreTrainedModel, examples: list[Example] | None = None, **student):
    return pruned(model, examples or chats(), PrunedStudent(**student), "t")


@pytest.mark.parametrize("config", [LLAMA, WITH_BIASES], ids=["plain", "biases"])
def test_heads_and_neurons_that_do_nothing_go_and_nothing_changes(config):
    model = noisy(config)
    idle_groups, idle_neurons = [1, 0, 0, 1], [[i, i + 7, 40 - i] for i in range(4)]
    with torch.no_grad():
        for layer, group, neurons in zip(model.model.layers, idle_groups, idle_neurons, strict=True):
            for weight in layer.self_attn.v_proj.parameters():
                weight[group * 4 : group * 4 + 4] = 0
            for weight in layer.mlp.up_proj.parameters():
                weight[neurons] = 0
    with narrowed(model, attention_heads=4, key_value_heads=1, intermediate_size=45) as student:
        assert student.width
        for layer, group, neurons in zip(student.width.layers, idle_groups, idle_neurons, strict=True):
            assert layer.kept.key_value_heads == (1 - group,)
            assert layer.kept.attention_heads == tuple(range(4 - 4 * group, 8 - 4 * group))
            assert layer.kept.neurons == tuple(i for i in range(48) if i not in neurons)
        torch.testing.assert_close(logits_of(student.model), logits_of(model), rtol=0, atol=1e-5)
        assert student.width.divergence == pytest.approx(0, abs=1e-5)


def test_heads_go_from_inside_their_groups():
    """Each group's weakest heads, by the slow version, are cut off from the output beforehand. Layer by layer, for what
    is cut off changes the activations of the layers after."""
    model, examples = noisy(LLAMA), chats(20)
    for i, layer in enumerate(model.model.layers):
        scores_GK = slow_activations(model, examples)[0][i].reshape(2, 4)
        weakest = [4 * g + int(h) for g in range(2) for h in np.argsort(scores_GK[g])[:2]]
        with torch.no_grad():
            layer.self_attn.o_proj.weight.view(32, 8, 4)[:, weakest] = 0
    with narrowed(model, examples, attention_heads=4) as student:
        assert (student.model.config.num_attention_heads, student.model.config.num_key_value_heads) == (4, 2)
        torch.testing.assert_close(logits_of(student.model), logits_of(model), rtol=0, atol=1e-5)


def silenced(model: PreTrainedModel, layers: list[tuple[Kept, int]]) -> PreTrainedModel:
    """A copy of a model, with the columns that read what goes set to 0."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, (kept, dim) in zip(model.get_decoder().layers, layers, strict=True):
            if kept.attention_heads is not None:
                out = layer.self_attn.o_proj.weight
                gone = [h for h in range(out.shape[1] // dim) if h not in kept.attention_heads]
                out.view(len(out), -1, dim)[:, gone] = 0
            if kept.neurons is not None:
                down = layer.mlp.down_proj.weight
                down[:, [n for n in range(down.shape[1]) if n not in kept.neurons]] = 0
    return model


BOTH = {"attention_heads": 4, "intermediate_size": 20}
CUTTABLE = [
    (hf.LlamaConfig(**COMMON), {"attention_heads": 2, "key_value_heads": 1, "intermediate_size": 17}),
    (hf.LlamaConfig(**COMMON), {"intermediate_size": 1, "layers": 3}),
    (WITH_BIASES, BOTH),
    (hf.Qwen2Config(**GROUPED), BOTH | {"layers": 2}),
    (hf.Qwen3Config(**(GROUPED | {"head_dim": 16})), BOTH),
    (hf.Gemma3TextConfig(**GROUPED, sliding_window=4), BOTH | {"key_value_heads": 1}),
    (hf.CohereConfig(**COMMON), {"attention_heads": 2, "intermediate_size": 20}),
    (hf.ArceeConfig(**GROUPED), BOTH),
    (hf.MixtralConfig(**GROUPED, num_local_experts=2), {"key_value_heads": 1}),
]


@pytest.mark.parametrize(("config", "student"), CUTTABLE, ids=lambda v: getattr(v, "model_type", ""))
def test_architectures_are_cut_and_come_back_the_same(config, student, tmp_path):
    """Cut, a model says what it says with the rest silenced; loaded again, it says the same to the bit, with a
    cache too; and the whole model is as it was."""
    model = noisy(config)
    whole, said = logits_of(model), copy.deepcopy(model.config.to_dict())
    prompt = torch.arange(3, 9)[None]
    with narrowed(model, **student) as made_:
        assert made_.width
        save(made_.model, tiny.tokenizer(), tmp_path)
        prove(made_.model, tmp_path)
        measured, kept = logits_of(made_.model), [layer.kept for layer in made_.width.layers]
        own = made_.model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        dim = made_.width.width.heads.dim if made_.width.width.heads else 0
    with only(model, made_.layers.kept):
        reference = silenced(model, [(k, dim) for k in kept])
    torch.testing.assert_close(measured, logits_of(reference), rtol=0, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded), measured)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), own)
    written = json.loads((tmp_path / "config.json").read_text())
    for key, name in (("attention_heads", "num_attention_heads"), ("intermediate_size", "intermediate_size")):
        if key in student:
            assert written[name] == student[key]
            assert "attention" not in key or written["head_dim"] == dim
    assert torch.equal(logits_of(model), whole)
    assert model.config.to_dict() == said


@pytest.mark.parametrize(
    ("config", "student", "told"),
    [
        (hf.Olmo2Config(**COMMON), {"attention_heads": 2}, "Olmo2Attention.q_norm.weight, 32"),
        (hf.Phi3Config(**COMMON), {"attention_heads": 2}, "o_proj, qkv_proj, gate_up_proj"),
        (hf.Phi3Config(**COMMON), {"intermediate_size": 20}, "o_proj, qkv_proj, gate_up_proj"),
        (hf.StableLmConfig(**COMMON), {"attention_heads": 2}, "q_proj is 32 x 32, not of the 16 rows"),
        (hf.BitNetConfig(**COMMON), {"intermediate_size": 20}, "BitNetMLP.ffn_sub_norm.weight, 48"),
        (hf.DiffLlamaConfig(**COMMON), {"attention_heads": 2}, "standard deviations"),
        (hf.DiffLlamaConfig(**COMMON), {"attention_heads": 2, "key_value_heads": 1}, "to be even"),
        (hf.LlamaConfig(**GROUPED), {"attention_heads": 6}, "hidden size (32) is not a multiple"),
        (GPT2, {"attention_heads": 2}, "num_key_value_heads: not there"),
        (GPT2, {"intermediate_size": 2}, "intermediate_size: not there"),
    ],
    ids=lambda v: getattr(v, "model_type", ""),
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(config, student, told):
    model = made(config)
    with pytest.raises(ModelError, match="cannot be made narrower") as caught, narrowed(model, **student):
        pass
    assert told in str(caught.value)
    assert all("kind: pretrained" in p.remedy for p in caught.value.problems)


# ---- the stage


def unpacked(text: str, there: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:there]).tolist()


def test_a_narrow_student_is_the_teachers_weights_and_the_ledger_says_which(tmp_path: Path):
    teacher = tiny.save(tmp_path / "teacher", layers=4)
    run = run_with(tmp_path / "run", teacher)
    asked = {"kind": "pruned", "layers": 3, "attention_heads": 2, "key_value_heads": 1, "intermediate_size": 40}
    facts = json.loads(json.dumps(begin(recipe_for(teacher, **asked), run), allow_nan=False))
    sizes = {key: facts[key] for key in ("attention_heads", "key_value_heads", "intermediate_size", "head_dim")}
    assert sizes == {"attention_heads": 2, "key_value_heads": 1, "intermediate_size": 40, "head_dim": 8}
    before = {key: facts[f"teacher_{key}"] for key in ("attention_heads", "key_value_heads", "intermediate_size")}
    assert before == {"attention_heads": 4, "key_value_heads": 2, "intermediate_size": 64}

    old, new = (load_file(d / "model.safetensors") for d in (teacher, run / "beginning"))
    assert len(facts["width"]["layers"]) == 3
    for i, (was, layer) in enumerate(zip(facts["layers_kept"], facts["width"]["layers"], strict=True)):
        scores = np.frombuffer(base64.b64decode(layer["neurons_scores"]), "<f4")
        neurons = unpacked(layer["neurons_kept"], 64)
        assert neurons == sorted(np.argsort(-scores, kind="stable")[:40]), "the kept follow from the scores"
        [group] = layer["key_value_heads_kept"]
        heads = np.array(layer["attention_heads_scores"]).reshape(2, 2)
        assert group == heads.sum(1).argmax()
        assert layer["attention_heads_kept"] == [2 * group, 2 * group + 1]
        q, kv = slice(16 * group, 16 * group + 16), slice(8 * group, 8 * group + 8)
        taken = {
            "self_attn.q_proj": (q, ...), "self_attn.k_proj": (kv, ...), "self_attn.v_proj": (kv, ...),
            "self_attn.o_proj": (..., q), "mlp.up_proj": (neurons, ...), "mlp.gate_proj": (neurons, ...),
            "mlp.down_proj": (..., neurons), "input_layernorm": (...,), "post_attention_layernorm": (...,),
        }  # fmt: skip
        for name, which in taken.items():
            own, whole = new.pop(f"model.layers.{i}.{name}.weight"), old[f"model.layers.{was}.{name}.weight"]
            assert torch.equal(own, whole[which]), name
    assert {"model.embed_tokens.weight", "model.norm.weight"} == set(new)
    assert all(torch.equal(weight, old[name]) for name, weight in new.items())

    student, whole = (AutoModelForCausalLM.from_pretrained(d).eval() for d in (run / "beginning", teacher))
    assert facts["parameters"] == student.num_parameters() < facts["teacher_parameters"] == whole.num_parameters()
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert (run / "beginning" / "generation_config.json").read_text() == (
        teacher / "generation_config.json"
    ).read_text()
    first = manifest(run / "beginning")
    begin(recipe_for(teacher, **asked), run)
    assert manifest(run / "beginning") == first, "the same bytes again"


def test_all_layers_stay_where_only_a_width_is_given(tmp_path: Path):
    teacher = tiny.save(tmp_path / "teacher", layers=3)
    run = run_with(tmp_path / "run", teacher)
    facts = begin(recipe_for(teacher, kind="pruned", intermediate_size=50), run)
    assert (facts["layers"], facts["layers_kept"], facts["criterion"]) == (3, [0, 1, 2], "all")
    assert "attention_heads" not in facts
    assert AutoModelForCausalLM.from_pretrained(run / "beginning").config.intermediate_size == 50


def test_divergence_is_of_the_student_with_all_that_went_gone():
    """Against the exact divergence over the whole vocabulary; the difference is the sample's."""
    model, examples = noisy(LLAMA), chats(40)
    with narrowed(model, examples, layers=3, attention_heads=4, intermediate_size=30) as student:
        assert student.width
        kept = [(layer.kept, 4) for layer in student.width.layers]
        assert student.width.tokens == sum(e.supervised for e in examples)
    with only(model, student.layers.kept):
        small = silenced(model, kept)
    assert student.width.divergence == pytest.approx(far(model, small, examples), rel=0.1)


def far(teacher: PreTrainedModel, student: PreTrainedModel, examples: list[Example]) -> float:
    """KL(teacher || student) in nats a token, from all logits in float64."""
    total, count = 0.0, 0
    for example in examples:
        tokens_1T, at = torch.from_numpy(example.tokens_T.astype(np.int64))[None], np.flatnonzero(example.mask_T) - 1
        with torch.no_grad():
            p, q = (m(input_ids=tokens_1T).logits[0, at].double().log_softmax(1) for m in (teacher, student))
        total += float((p.exp() * (p - q)).sum())
        count += len(at)
    return total / count


def test_nothing_is_left_of_a_student_that_cannot_be_cut(tmp_path: Path):
    teacher = tiny.save(tmp_path / "teacher")
    run = run_with(tmp_path / "run", teacher)
    with pytest.raises(ModelError, match="at most 64"):
        begin(recipe_for(teacher, kind="pruned", intermediate_size=65), run)
    assert [p.name for p in run.root.iterdir()] == ["examples"]
