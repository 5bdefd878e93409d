"""Under `narrow_stream` a model computes what one of bfloat16 weights computes, and its weights learn in float32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from limbeck.models import stream
from limbeck.models.stream import _RootMeanSquare, narrow_stream, rms_epsilon
from limbeck.records import Split
from limbeck.render.batches import collate
from limbeck.render.examples import make_example
from limbeck.train.sources import LiveTeacher

TOKENS_BT = torch.randint(3, 60, (4, 17), generator=torch.Generator().manual_seed(3))


def norm_like(kind: type[torch.nn.Module], width: int = 24) -> torch.nn.Module:
    module = kind(width, eps=1e-3)
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module


def test_the_norm_is_llamas_in_value_and_gradient():
    module = norm_like(LlamaRMSNorm).double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 5, 24, generator=generator).requires_grad_()
    direction = torch.randn(3, 5, 24, generator=generator)
    weight = module.weight.detach().float().requires_grad_()
    ours = _RootMeanSquare.apply(x, weight, 1e-3, torch.float32)
    (ours * direction).sum().backward()
    # The same formula written by hand in float64, differentiated by autograd.
    exact = x.detach().double().requires_grad_()
    value = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * module.weight
    (value * direction).sum().backward()
    torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), module.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_for_a_gpu_is_the_same(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(3, 5, 24, generator=generator)
    found = []
    for on_gpu in (False, True):
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
        weight = norm_like(LlamaRMSNorm).weight.detach().requires_grad_()
        monkeypatch.setattr(stream, "usable", lambda _device, on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(stream, "compiled", lambda function: function)
        value = _RootMeanSquare.apply(x, weight, 1e-3, dtype)
        (value * direction).sum().backward()
        found.append((value, x.grad, weight.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_plain_norms_are_known_by_what_they_compute(kind):
    assert rms_epsilon(norm_like(kind)) == 1e-3


@pytest.mark.parametrize("kind", [GemmaRMSNorm, torch.nn.LayerNorm])
def test_other_norms_keep_their_own_arithmetic(kind):
    assert rms_epsilon(norm_like(kind)) is None


def hidden_under(model, *, narrow: bool) -> torch.Tensor:
    dtype = torch.bfloat16 if narrow else None
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow), narrow_stream(model, dtype):
        return model.model(TOKENS_BT).last_hidden_state


def test_hidden_states_are_as_near_as_those_of_a_model_in_bfloat16():
    model = tiny.llama(64)
    exact = hidden_under(model, narrow=False).detach()
    narrow = hidden_under(model, narrow=True)
    assert narrow.dtype == torch.bfloat16
    rounded = tiny.llama(64).to(torch.bfloat16).model(TOKENS_BT).last_hidden_state
    error, theirs = (h.float().sub(exact).square().mean().sqrt() for h in (narrow, rounded))
    assert 0 < error < 1.5 * theirs


def test_weights_learn_in_their_own_type_and_along_the_same_gradient():
    model = tiny.llama(64)
    # The sum of squares of normalised states would be a constant; along a random direction there is a gradient.
    direction = torch.randn(*TOKENS_BT.shape, 32, generator=torch.Generator().manual_seed(4))
    (hidden_under(model, narrow=False) * direction).sum().backward()
    exact = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    (hidden_under(model, narrow=True).float() * direction).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.99, name


def test_the_model_is_afterwards_as_it_was():
    model = tiny.llama(64)
    before = hidden_under(model, narrow=False)
    hidden_under(model, narrow=True)
    assert torch.equal(hidden_under(model, narrow=False), before)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, 5])
def test_embeddings_learn_what_autograd_gives_them(tied, padding):
    """Over two passes that are added up, in float32, where nothing is rounded to bfloat16: row by row."""
    model = tiny.llama(64, tied=tied)
    model.model.embed_tokens.padding_idx = padding
    tokens_BT = TOKENS_BT.clone()
    tokens_BT[:, ::3] = 5
    tables = []
    for narrow in (None, torch.float32):
        model.zero_grad()
        with narrow_stream(model, narrow):
            for _ in range(2):
                model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
        tables.append(model.model.embed_tokens.weight.grad.clone())
    error_V = (tables[1] - tables[0]).norm(dim=1)
    assert (error_V <= 1e-5 * tables[0].norm()).all()
    assert bool(tables[0][5].any()) == (tied or padding is None)


def test_a_live_teacher_in_bfloat16_is_no_further_from_float32_while_it_runs():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    exact = LlamaForCausalLM(config)
    for name, weight in exact.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.3, 1.7)
    exact = exact.bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    examples = [
        make_example(
            np.arange(n, n + 9, dtype=np.int32), np.arange(9) > 2, prompt_id="", completion=str(n), teacher="",
            split=Split.TRAIN,
        )
        for n in range(16)
    ]  # fmt: skip
    batch = collate(examples, 0)
    expected = LiveTeacher(exact, 31).take(batch).hidden_ND
    source = LiveTeacher(rounded, 31)
    own = source.take(batch).hidden_ND
    with source.running():
        running = source.take(batch).hidden_ND
    assert running.dtype == torch.bfloat16
    assert (running.float() - expected).norm() <= 1.05 * (own.float() - expected).norm()
    assert not torch.equal(running, own)
    assert torch.equal(source.take(batch).hidden_ND, own)  # given back as it was
    wide = LiveTeacher(exact, 31)
    with wide.running():
        assert torch.equal(wide.take(batch).hidden_ND, expected)
