"""Decoder layers of Llama's form in few kernels and few products, for training and for a live teacher.

A layer of this form is

    h = x + o(attention(rotated(q(n)), rotated(k(n)), v(n))),  n = norm(x)
    y = h + down(act(gate(m)) * up(m)),                        m = norm(h)

and may norm each head's query and key before it is rotated, as Qwen 3 does.

Here q, k and v are one product, and gate and up another; a sum is added by the product before it, which rounds it once;
heads are rotated and put in order by one kernel; gradients that meet are added where they are computed; the activated
product is computed again in the backward pass instead of being kept. What lies between the products is compiled
(`compiling`), and attention is whichever the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.models.compiling import usable
from limbeck.models.gated import ACTIVATIONS, gate_of, learning
from limbeck.models.layer_parts import (
    HeadNorms,
    added_gated_mlp,
    added_product,
    heads_in_order,
    normed_products,
)
from limbeck.models.products import one_after_the_other
from limbeck.models.stream import rms_epsilon

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_ASKED = ("scaling", "attention_dropout", "config")
"""What is asked of an attention beside its parts."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Form(NamedTuple):
    """What tells one layer of the form from another, beside its weights."""

    first_epsilon: float
    second_epsilon: float
    activation: str
    heads: int
    key_heads: int
    head_width: int
    head_epsilon: float | None
    """Of norms of each head's query and key, if there are any."""


@contextmanager
def fused_layers(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """While the block runs, decoder layers of Llama's form compute what they are given in `dtype` as this file does,
    where functions are compiled for the model's device; nothing happens for None.

    Found by trying: a layer's result for random numbers is compared with the formula's. A layer that computes anything
    else, that has hooks or adapters in it when the block begins, that keeps keys and values, or whose activations are
    computed again (gradient checkpointing) runs as it is. A model that learns nothing keeps its weights laid together.
    """
    replaced: list[nn.Module] = []
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    try:
        for layer in model.modules() if dtype is not None and usable(model.device) else ():
            if "forward" not in vars(layer) and (form := form_of(layer)) is not None:
                # Bound to the layer, so that a copy's computes with the copy's weights.
                layer.forward = MethodType(_forward_of(form, cast("torch.dtype", dtype)), layer)
                replaced.append(layer)
                if frozen:
                    _lay_together(layer)
        yield
    finally:
        for layer in replaced:
            del layer.forward


@torch.no_grad()
def _lay_together(layer: Any) -> None:
    """Puts weights that are multiplied as one one after the other in memory, where they stay: those of a model that
    learns nothing need not be joined anew in every pass.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for projections in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        weights = [p.weight for p in projections]
        if len({w.dtype for w in weights}) == 1 and not one_after_the_other(weights):
            for weight, part in zip(weights, torch.cat(weights).split([len(w) for w in weights]), strict=True):
                weight.data = part


def form_of(layer: nn.Module) -> _Form | None:
    """The form of a decoder layer; None for every other module.

    Each layer is tried: in some models every fourth computes something else than its class does in the others.
    """
    if {name for name, _ in layer.named_children()} != _PARTS:
        return None
    parts = cast("Any", layer)
    attention, mlp = parts.self_attn, parts.mlp
    names = {name for name, _ in attention.named_children()}
    if names not in (set(_PROJECTIONS), {*_PROJECTIONS, *_HEAD_NORMS}):
        return None
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    projections += [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not _plain_and_alike(projections) or any(_hooked(module) for module in layer.modules() if module is not layer):
        return None
    epsilons = rms_epsilon(parts.input_layernorm), rms_epsilon(parts.post_attention_layernorm)
    activation, width = gate_of(mlp), getattr(attention, "head_dim", None)
    if None in epsilons or activation is None or not all(hasattr(attention, name) for name in _ASKED):
        return None
    if not isinstance(width, int):
        return None
    head_epsilon = None
    if names > set(_PROJECTIONS):
        norms = [getattr(attention, name) for name in _HEAD_NORMS]
        head_epsilon, other = (rms_epsilon(norm) for norm in norms)
        if head_epsilon is None or other != head_epsilon or any(len(norm.weight) != width for norm in norms):
            return None
    heads, key_heads = (p.out_features // width for p in projections[:2])
    form = _Form(*cast("tuple[float, float]", epsilons), activation, heads, key_heads, width, head_epsilon)
    return form if _proved(layer, form) else None


def _plain_and_alike(projections: Sequence[Any]) -> bool:
    """Whether all are plain products of one type, and those that are joined have biases or have none together."""
    if any(type(p) is not nn.Linear for p in projections) or len({p.weight.dtype for p in projections}) > 1:
        return False
    q, k, v, _, gate, up, _ = (p.bias is None for p in projections)
    return q == k == v and gate == up


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module)


@torch.no_grad()
def _proved(layer: nn.Module, form: _Form) -> bool:
    """Whether a layer computes the formula: for a few random numbers and weights, each token attending to all, in
    training mode but for attention's dropout, which is passed on.

    Random weights in float32, since its own, or their rounding, could hide what tells it from the formula.
    """
    attention = cast("Any", layer.self_attn)
    device, generator = attention.q_proj.weight.device, torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    config, dropout = attention.config, attention.attention_dropout
    before, config._attn_implementation, attention.attention_dropout = config._attn_implementation, "eager", 0.0
    try:
        weights = {name: _of_use(drawn(*p.shape)) for name, p in layer.named_parameters()}
        x_BTD, angles = drawn(2, 5, attention.q_proj.in_features), drawn(2, 5, form.head_width // 2).repeat(1, 1, 2)
        around = angles.cos(), angles.sin()
        with torch.autocast(device.type, enabled=False), learning(layer):
            found = torch.func.functional_call(
                layer, weights, (x_BTD,), {"attention_mask": None, "position_embeddings": around}
            )
            expected = _plain(weights, form, attention.scaling, x_BTD, *around)
    except (TypeError, RuntimeError, ValueError, AttributeError, KeyError):
        return False  # it is called otherwise, or has other shapes
    finally:
        config._attn_implementation, attention.attention_dropout = before, dropout
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found - x_BTD, expected - x_BTD, rtol=1e-3, atol=1e-4)


def _of_use(weight: Tensor) -> Tensor:
    """Matrices that leave numbers as large as they are, scales about 1."""
    return weight / weight.shape[1] ** 0.5 if weight.dim() == 2 else 1 + weight / 4


def _plain(weights: dict[str, Tensor], form: _Form, scaling: float, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, an operation at a time."""
    width = form.head_width

    def projected(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias"))

    def normed(x: Tensor, name: str, epsilon: float) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], epsilon)

    def rotated(x_BTE: Tensor, name: str) -> Tensor:
        x = x_BTE.unflatten(-1, (-1, width))
        if form.head_epsilon is not None:
            x = normed(x, f"self_attn.{name}_norm", form.head_epsilon)
        turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    n = normed(x_BTD, "input_layernorm", form.first_epsilon)
    group = form.heads // form.key_heads
    q = rotated(projected(n, "self_attn.q"), "q").transpose(1, 2)
    k = rotated(projected(n, "self_attn.k"), "k").transpose(1, 2).repeat_interleave(group, dim=1)
    v = projected(n, "self_attn.v").unflatten(-1, (-1, width)).transpose(1, 2).repeat_interleave(group, dim=1)
    p = torch.softmax(q @ k.transpose(2, 3) * scaling, dim=-1)
    h = x_BTD + projected((p @ v).transpose(1, 2).flatten(2), "self_attn.o")
    m = normed(h, "post_attention_layernorm", form.second_epsilon)
    return h + projected(ACTIVATIONS[form.activation](projected(m, "mlp.gate"))[0] * projected(m, "mlp.up"), "mlp.down")


def _forward_of(form: _Form, dtype: torch.dtype) -> Callable[..., Any]:
    """The forward of a layer, by what it is called with in transformers."""

    def forward(
        layer: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        attention, mlp = layer.self_attn, layer.mlp
        again = layer.training and getattr(layer, "gradient_checkpointing", False)
        kind = attention.config._attn_implementation
        whole = position_embeddings is not None and position_embeddings[0].shape[-1] == form.head_width
        if hidden_states.dtype != dtype or past_key_values is not None or again or kind == "eager" or not whole:
            return type(layer).forward(
                layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        cos_BTd, sin_BTd = cast("tuple[Tensor, Tensor]", position_embeddings)
        x_BTD, qkv_BTE = normed_products(
            hidden_states,
            layer.input_layernorm.weight,
            form.first_epsilon,
            (attention.q_proj, attention.k_proj, attention.v_proj),
        )
        norms = None
        if form.head_epsilon is not None:
            norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, form.head_epsilon)
        query, key, value = heads_in_order(qkv_BTE, cos_BTd, sin_BTd, form.heads, form.key_heads, norms)
        # Masks have the window in them, but flash-attn has none and is told.
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        if window is not None:
            kwargs["sliding_window"] = window
        mixed_BTHd, _ = ALL_ATTENTION_FUNCTIONS[kind](
            attention,
            query,
            key,
            value,
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        h_BTD = added_product(x_BTD, mixed_BTHd.flatten(2), attention.o_proj)
        return added_gated_mlp(h_BTD, layer.post_attention_layernorm.weight, form.second_epsilon, mlp, form.activation)

    return forward
