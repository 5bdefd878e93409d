"""Sampling from other architectures, the attention it brings, and the state it leaves a model in."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
import torch
import transformers
from sampling_oracle import STOPS, VOCABULARY, ragged, slow

from limbeck.errors import ModelError
from limbeck.generate import Generated, Sampling, sample_batch
from limbeck.generate.cache import has_slots
from limbeck.models import attention as attention_module


@pytest.fixture(scope="module")
def model():
    """Float64, so that a row's neighbours cannot move a draw across an edge by rounding."""
    return tiny.llama(VOCABULARY).double()


# --- other architectures

ARCHITECTURES = {
    "learned positions": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "norms of queries and keys": ("Qwen3", {"head_dim": 8}, True),
    "latent attention": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "v_head_dim": 8,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 4,
        },
        True,
    ),
    "sliding window": ("Mistral", {"sliding_window": 8}, False),
    "windows in some layers": ("Gemma3Text", {"head_dim": 8, "sliding_window": 8}, False),
    "soft cap": ("Gemma2", {"head_dim": 8, "sliding_window": 8}, False),
    "attention sinks": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        False,
    ),
    "linear biases": ("Bloom", {"n_layer": 2, "n_head": 4}, False),
}


def other(name: str) -> transformers.PreTrainedModel:
    kind, extra, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **extra,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_give_what_the_slow_loop_gives(name):
    model, sampling = other(name), Sampling(14)
    prompts = ragged(9, prefix=9)
    expected = [slow(model, prompt, sampling, seed) for seed, prompt in enumerate(prompts)]
    for rows in (None, 4):
        assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(9), rows=rows) == expected
    assert has_slots(model) == ARCHITECTURES[name][2]


def test_no_prompts_no_answers_whatever_the_cache():
    assert sample_batch(other("sliding window"), [], Sampling(5), stop_ids=STOPS, seeds=[]) == []


def test_a_model_without_a_key_value_cache_is_refused():
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="past_key_values"):
        sample_batch(transformers.MambaForCausalLM(config), [[1]], Sampling(1), stop_ids=(), seeds=[0])


# --- attention, and what the model is left as


def test_the_fast_attention_is_used_and_taken_back_also_after_an_error(model, monkeypatch):
    queries = []
    monkeypatch.setattr(
        attention_module.torch,
        "bmm",
        lambda *args, _true=torch.bmm, **kwargs: queries.append(args[0].shape[1]) or _true(*args, **kwargs),
    )
    sample_batch(model, ragged(4), Sampling(3), stop_ids=(), seeds=range(4))
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    decoding = [rows for rows in queries if rows == group]
    assert len(decoding) == 2 * 2 * model.config.num_hidden_layers  # two products, for each token but the first
    assert model.config._attn_implementation == "sdpa"

    def fail(index: int, answer: Generated) -> None:
        assert model.config._attn_implementation != "sdpa"
        raise KeyError(index)

    modes = {name: module.training for name, module in model.train().named_modules()}
    modes["model.layers.1"] = model.model.layers[1].training = False
    with pytest.raises(KeyError):
        sample_batch(model, ragged(4), Sampling(3), stop_ids=(), seeds=range(4), on_done=fail)
    assert model.config._attn_implementation == "sdpa"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not torch.is_inference_mode_enabled()
    model.eval()


def test_another_attention_implementation_is_left_alone(model):
    prompts, sampling = ragged(5), Sampling(6)
    expected = sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(5))
    eager = tiny.llama(VOCABULARY)
    eager.set_attn_implementation("eager")
    assert sample_batch(eager, prompts, sampling, stop_ids=STOPS, seeds=range(5)) == expected
    assert eager.config._attn_implementation == "eager"


def test_a_model_in_training_samples_without_dropout_and_trains_on():
    model = tiny.llama(VOCABULARY)
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5  # type: ignore[assignment]
    model.activation_checkpointing_enable()
    prompts, sampling = ragged(5), Sampling(6)
    expected = [slow(model.eval(), prompt, sampling, seed) for seed, prompt in enumerate(prompts)]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(5)) == expected
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_global_random_state_is_touched(model):
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        str(np.random.get_state(legacy=False)),
        random.getstate(),
    )
    first = sample_batch(model, [[1, 2]] * 3, Sampling(5), stop_ids=(), seeds=[7, 7, 8])
    torch.manual_seed(99)
    assert sample_batch(model, [[1, 2]] * 3, Sampling(5), stop_ids=(), seeds=[7, 7, 8]) == first
    assert first[0] == first[1] != first[2]
    torch.set_rng_state(torch_state)
    sample_batch(model, [[1, 2]] * 3, Sampling(5), stop_ids=(), seeds=[7, 7, 8])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state(legacy=False)) == numpy_state
    assert random.getstate() == python_state
