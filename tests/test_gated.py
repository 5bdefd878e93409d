"""The middle of a gated MLP as one kernel: the same value and gradient, and no other module is touched."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GemmaConfig, GPT2Config, LlamaConfig, PhiConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from limbeck.models import compiling, gated

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
EAGER = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they are written, wherever they would be compiled."""
    monkeypatch.setattr(gated, "usable", lambda _device: True)
    monkeypatch.setattr(gated, "compiled", lambda function: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("activation", EAGER)
def test_value_and_gradient_are_those_of_the_plain_product(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(3))
    found = [t.clone().requires_grad_() for t in (gate, up)]
    plain = [t.clone().requires_grad_() for t in (gate, up)]
    out = gated._Gate.apply(*found, activation)
    expected = EAGER[activation](plain[0]) * plain[1]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.backward(grad)
    expected.backward(grad)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda g, u: gated._Gate.apply(g, u, activation), found)


@pytest.mark.usefixtures("uncompiled")
def test_in_bfloat16_it_is_nearer_to_the_exact_product_than_eager_kernels() -> None:
    gate, up = (torch.randn(64, 96, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    exact = F.silu(gate.double()) * up.double()
    ours = (gated._Gate.apply(gate, up, "silu").double() - exact).abs().mean()
    eager = ((F.silu(gate) * up).double() - exact).abs().mean()
    assert ours < eager


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaMLP(LlamaConfig(**SIZES)), "silu"),
        (LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)), "silu"),
        (LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu")), None),
        (GemmaMLP(GemmaConfig(**SIZES)), "gelu_tanh"),
        (PhiMLP(PhiConfig(**SIZES)), None),
        (GPT2MLP(20, GPT2Config(n_embd=12)), None),
        (nn.Linear(3, 3), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else str(x),
)
def test_gated_mlps_are_told_from_other_modules(module: nn.Module, expected: str | None) -> None:
    assert gated.gate_of(module) == expected


def test_a_module_that_computes_something_else_is_left_alone() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert gated.gate_of(Doubled(LlamaConfig(**SIZES))) is None


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=11, num_hidden_layers=2, num_key_value_heads=1)
    return LlamaForCausalLM(config)


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_small_difference_of_small_numbers_is_seen() -> None:
    class Lifted(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-5

    module = Lifted(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.05)
    assert gated.gate_of(module) is None


@pytest.mark.usefixtures("uncompiled")
def test_a_forward_that_somebody_put_before_a_module_stays() -> None:
    """Hooks of accelerate stand there; and a block within a block replaces nothing twice."""
    model = tiny()
    hooked = model.model.layers[0].mlp
    hooked.forward = hook = hooked.forward
    with gated.fused_gates(model):
        ours = vars(model.model.layers[1].mlp)["forward"]
        with gated.fused_gates(model):
            assert vars(model.model.layers[1].mlp)["forward"] is ours
        assert vars(model.model.layers[1].mlp)["forward"] is ours
        assert vars(hooked)["forward"] is hook
    assert vars(hooked)["forward"] is hook
    assert "forward" not in vars(model.model.layers[1].mlp)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_learns_the_same_and_is_given_back_as_it_was() -> None:
    model = tiny()
    plain = gradients(model)
    with gated.fused_gates(model):
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_nothing_is_replaced_where_nothing_is_compiled() -> None:
    model = tiny()
    with gated.fused_gates(model):
        assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_for_a_cpu_it_is_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    plain = gradients(model)
    monkeypatch.setenv("LIMBECK_COMPILE", "1")
    compiling._found.cache_clear()
    compiling.compiled.cache_clear()
    with caplog.at_level(logging.WARNING, logger=compiling.__name__), compiling.on_cpu(0), gated.fused_gates(model):
        torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-6)
    compiling.compiled.cache_clear()
    compiling._found.cache_clear()
    assert compiling.__name__ not in {r.name for r in caplog.records}  # or the eager form had stood in
