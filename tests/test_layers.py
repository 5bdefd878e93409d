"""Decoder layers in few kernels: the model's own values and gradients, however it is called, and no other layer."""

from __future__ import annotations

import copy
import logging
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

from limbeck.models import compiling, gated, layer_parts, layers, products
from limbeck.models.attention import fast_attention
from limbeck.models.layers import fused_layers
from limbeck.models.stream import narrow_stream
from limbeck.signal.head import hidden_states

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OF_THE_FORM: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**SIZES),
    "Llama with biases, wide heads and GELU": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, head_dim=10, hidden_act="gelu_pytorch_tanh"
    ),
    "Llama, each head its own key": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "Qwen2": Qwen2Config(**SIZES),
    "Qwen3": Qwen3Config(**SIZES, head_dim=8),
    "Mistral with a window": MistralConfig(**SIZES, sliding_window=3),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "Granite multiplies what a layer adds": GraniteConfig(**SIZES, residual_multiplier=0.5),
    "Llama with another activation": LlamaConfig(**SIZES, hidden_act="relu"),
    "Gemma 2 has norms behind": Gemma2Config(**SIZES),
    "OLMo 2 has norms behind alone": Olmo2Config(**SIZES),
    "Cohere adds both halves at once": CohereConfig(**SIZES),
    "Phi 3 has its products joined": Phi3Config(**SIZES),
    "Mixtral has experts": MixtralConfig(**SIZES, num_local_experts=2),
    "GPT-NeoX": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}
TOKENS_BT = torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))
PACKED_BT = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 5]])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as they are written, wherever they would be compiled."""
    monkeypatch.setattr(layers, "usable", lambda _device: True)
    monkeypatch.setattr(layer_parts, "compiled", lambda function: function)


class ExactNorm(nn.Module):
    """A norm as the formula has it: those of transformers compute in float32 whatever they are given."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.variance_epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def model_of(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """With random weights, none of them zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
            if parameter.dim() == 1:
                parameter.data += 0.7
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if hasattr(norm, "variance_epsilon"):
                setattr(module, name, ExactNorm(norm.weight, norm.variance_epsilon))
    return model.train()


def replaced(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def products_of(model: PreTrainedModel) -> list[tuple[nn.Linear, ...]]:
    """The projections that are multiplied as one."""
    found: list[tuple[nn.Linear, ...]] = []
    for layer in model.model.layers:
        found += [(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
        found += [(layer.mlp.gate_proj, layer.mlp.up_proj)]
    return found


def learned(model: PreTrainedModel, positions_BT: Tensor | None = None, dtype: torch.dtype = torch.float64):
    """The last hidden states, and the gradients along a random direction, by name."""
    model.zero_grad()
    hidden_BTD = hidden_states(model, TOKENS_BT, position_ids_BT=positions_BT)
    direction_BTD = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (hidden_BTD * direction_BTD.to(hidden_BTD.device, dtype)).sum().backward()
    return hidden_BTD.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=1e-10, atol=1e-10)
    assert one[1].keys() == two[1].keys()
    for name, grad in two[1].items():
        torch.testing.assert_close(one[1][name], grad, rtol=1e-9, atol=1e-10, msg=lambda said, name=name: name + said)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("positions_BT", [None, PACKED_BT], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OF_THE_FORM)
def test_values_and_gradients_are_the_models_own(name: str, positions_BT: Tensor | None) -> None:
    model = model_of(OF_THE_FORM[name])
    expected = learned(model, positions_BT)
    with fused_layers(model, torch.float64):
        assert len(replaced(model)) == 2
        found = learned(model, positions_BT)
    assert_same(found, expected)
    assert not replaced(model)


@pytest.mark.usefixtures("uncompiled")
def test_layers_whose_weights_are_narrow_are_known_too() -> None:
    """A live teacher's: nothing learns, and what is computed is as near to float64 as its own operations are."""
    exact = model_of(OF_THE_FORM["Qwen3"], torch.bfloat16).eval().requires_grad_(False)
    narrow = copy.deepcopy(exact)
    exact_BTD = hidden_states(exact.double(), TOKENS_BT)
    own_BTD = hidden_states(narrow, TOKENS_BT)
    with fused_layers(narrow, torch.bfloat16):
        assert len(replaced(narrow)) == 2
        found_BTD = hidden_states(narrow, TOKENS_BT)
        joined = [products.one_after_the_other([p.weight for p in parts]) for parts in products_of(narrow)]
        assert all(joined)
    assert torch.equal(hidden_states(narrow, TOKENS_BT), own_BTD)
    assert found_BTD.dtype == torch.bfloat16
    assert (found_BTD - exact_BTD).norm() <= 1.1 * (own_BTD - exact_BTD).norm() <= 0.1 * exact_BTD.norm()


@pytest.mark.usefixtures("uncompiled")
def test_they_attend_as_a_training_on_a_cpu_does() -> None:
    model = model_of(OF_THE_FORM["Llama"])
    expected = learned(model)
    with fast_attention(model), fused_layers(model, torch.float64):
        assert_same(learned(model), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", OTHERS)
def test_a_layer_that_computes_something_else_is_left_alone(name: str) -> None:
    model = model_of(OTHERS[name])
    with fused_layers(model, torch.float64):
        assert not replaced(model)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("factor", [1.01, 0.0])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_small_difference_is_seen(part: str, factor: float) -> None:
    """In what either half adds, where a layer adds little to what runs through it, as trained ones do."""
    model = model_of(OF_THE_FORM["Llama"])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.1 if weight.dim() == 2 else 1)
    changed = model.model.layers[0]
    half, kind = getattr(changed, part), type(getattr(changed, part))

    class Changed(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            return found * factor if isinstance(found, Tensor) else (found[0] * factor, *found[1:])

    half.__class__ = Changed
    with fused_layers(model, torch.float64):
        assert replaced(model) == [model.model.layers[1]]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["a hook", "a forward", "another projection"])
def test_a_layer_with_somebody_elses_part_in_it_is_left_alone(kind: str) -> None:
    model = model_of(OF_THE_FORM["Llama"])
    part = model.model.layers[0].self_attn
    if kind == "a hook":
        part.v_proj.register_forward_hook(lambda *_: None)
    elif kind == "a forward":
        part.o_proj.forward = lambda x, own=part.o_proj.forward: own(x)
    else:
        part.k_proj = type("Adapted", (nn.Linear,), {})(24, 12, bias=False, dtype=torch.float64)
    with fused_layers(model, torch.float64):
        assert "forward" not in vars(model.model.layers[0])
        assert "forward" in vars(model.model.layers[1])


@pytest.mark.usefixtures("uncompiled")
def test_layers_of_one_class_that_compute_different_things_are_told_apart() -> None:
    """Those of SmolLM3 that rotate no heads."""
    config = SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}, no_rope_layers=[1, 0, 1, 1])
    model = model_of(config)
    expected = learned(model)
    with fused_layers(model, torch.float64):
        assert ["forward" in vars(layer) for layer in model.model.layers] == [True, False, True, True]
        assert_same(learned(model), expected)


@pytest.mark.usefixtures("uncompiled")
def test_a_layer_that_drops_out_some_of_its_sums_is_left_alone_though_the_model_is_in_evaluation_mode() -> None:
    model = model_of(SeedOssConfig(**SIZES, head_dim=6, residual_dropout=0.2)).eval()
    with fused_layers(model, torch.float64):
        assert not replaced(model)
    assert not any(module.training for module in model.modules())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["Mistral with a window", "Qwen2", "Llama"])
def test_attention_is_told_what_the_model_tells_it(name: str) -> None:
    """Kernels that take no mask are told of a window."""
    told: list[dict[str, Any]] = []

    def attention(module: nn.Module, query: Tensor, *_args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        told.append({key: value for key, value in kwargs.items() if value is not None})
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recorded", attention)
    model = model_of(OF_THE_FORM[name])
    model.config._attn_implementation = "recorded"
    hidden_states(model, TOKENS_BT)
    expected = told.copy()
    told.clear()
    with fused_layers(model, torch.float64):
        hidden_states(model, TOKENS_BT)
    assert [set(t) for t in told] == [set(t) for t in expected]
    assert [t.get("sliding_window") for t in told] == [t.get("sliding_window") for t in expected]
    assert ("sliding_window" in told[0]) == (name == "Mistral with a window")


@pytest.mark.usefixtures("uncompiled")
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own() -> None:
    model = model_of(OF_THE_FORM["Llama with biases, wide heads and GELU"])
    for number, (_, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 != 1)
    expected = learned(model)
    with fused_layers(model, torch.float64):
        assert_same(learned(model), expected)


@pytest.mark.usefixtures("uncompiled")
def test_activations_that_are_computed_again_are_the_models_own_business() -> None:
    model = model_of(OF_THE_FORM["Llama"])
    expected = learned(model)
    again = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    again({"use_reentrant": False})
    with fused_layers(model, torch.float64):
        assert_same(learned(model), expected)


@pytest.mark.usefixtures("uncompiled")
def test_answers_are_written_with_keys_and_values_kept() -> None:
    model = model_of(OF_THE_FORM["Qwen2"]).eval()
    expected = model.generate(TOKENS_BT, max_new_tokens=5, do_sample=False)
    with fused_layers(model, torch.float64):
        assert torch.equal(model.generate(TOKENS_BT, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("how", [fused_layers, narrow_stream, lambda model, _: gated.fused_gates(model)])
def test_a_copy_computes_with_its_own_weights(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On-policy answers are written by such a copy, in the student's precision."""
    monkeypatch.setattr(gated, "usable", lambda _device: True)
    monkeypatch.setattr(gated, "compiled", lambda function: function)
    model = model_of(OF_THE_FORM["Llama"])
    with how(model, torch.float64):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.1)
        found = learned(copied)
    for module in copied.modules():
        vars(module).pop("forward", None)
        module._forward_hooks.clear()
    expected = learned(copied)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)  # norms by themselves are in float32
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("uncompiled")
def test_nothing_is_replaced_without_a_type_or_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(OF_THE_FORM["Llama"])
    with fused_layers(model, None):
        assert not replaced(model)
    monkeypatch.setattr(layers, "usable", lambda _device: False)
    with fused_layers(model, torch.float64):
        assert not replaced(model)


def test_in_bfloat16_it_is_nearer_to_float64_than_an_operation_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in float32, under autocast: hidden states and gradients, all together."""
    exact_model = model_of(
        LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4})
    )
    exact = learned(exact_model)
    model = copy.deepcopy(exact_model).float()
    errors = []
    for fused in (False, True):
        monkeypatch.setattr(layers, "usable", lambda _device, fused=fused: fused)
        monkeypatch.setattr(layer_parts, "compiled", lambda function: function)
        with (
            torch.autocast("cpu", torch.bfloat16),
            fused_layers(model, torch.bfloat16),
            narrow_stream(model, torch.bfloat16),
        ):
            hidden_BTD, grads = learned(model, dtype=torch.float32)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        far = [(hidden_BTD - exact[0]).norm() / exact[0].norm()]
        far += [(grads[name] - grad).norm() / grad.norm() for name, grad in exact[1].items()]
        errors.append(torch.stack([x.double() for x in far]))
    assert (errors[1] < 0.1).all()
    assert errors[1].mean() < errors[0].mean()


@pytest.mark.usefixtures("uncompiled")
def test_two_passes_keep_no_more_of_the_weights_than_one() -> None:
    model = model_of(OF_THE_FORM["Llama"], torch.float32)
    kept: set[int] = set()

    def seen(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and len(tensor) in (48, 72):  # q, k and v; gate and up
            kept.add(tensor.data_ptr())
        return tensor

    counts = []
    for passes in (1, 2):
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16),
            fused_layers(model, torch.bfloat16),
            narrow_stream(model, torch.bfloat16),
            products.joined_once(),
            torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t),
        ):
            held = [hidden_states(model, TOKENS_BT) for _ in range(passes)]
        counts.append(len(kept))
        assert len(held) == passes
    assert counts[0] == counts[1] == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(OF_THE_FORM["Llama"])
    expected = learned(model)
    monkeypatch.setenv("LIMBECK_COMPILE", "1")
    compiling._found.cache_clear()
    compiling.compiled.cache_clear()
    with (
        caplog.at_level(logging.WARNING, logger=compiling.__name__),
        compiling.on_cpu(0),
        fused_layers(model, torch.float64),
    ):
        assert len(replaced(model)) == 2
        assert_same(learned(model), expected)
    compiling.compiled.cache_clear()
    compiling._found.cache_clear()
    assert compiling.__name__ not in {r.name for r in caplog.records}  # or the eager form had stood in
