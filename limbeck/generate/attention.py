"""Attention of one query per row on a CPU, and the state a model is in while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_NAME = "limbeck_grouped"
_BEYOND = ("position_bias", "softcap", "cache")  # arguments of `sdpa` that change more than the mask


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` computes, for one query per row by plain matrix products.

    Query heads that share a key head become the rows of one product: a query [B, heads, 1, d] is read as [B *
    key heads, group, d], so keys [B, key heads, T, d] are neither repeated nor copied. `attention_mask` is
    additive, [B, 1, 1, T]. Anything else goes the usual way.
    """
    plain = attention_mask is None or (attention_mask.shape[1] == 1 and attention_mask.is_floating_point())
    beyond = dropout or any(kwargs.get(name) is not None for name in _BEYOND)
    if query.shape[2] != 1 or query.shape[0] != key.shape[0] or beyond or not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, heads, _, width = query.shape
    key_heads = key.shape[1]
    query_NGd = query.reshape(batch * key_heads, heads // key_heads, width)
    if attention_mask is None:
        bias = query.new_zeros(1, 1, 1)
    else:
        bias = attention_mask.expand(batch, key_heads, -1, -1).flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    scores_NGT = torch.baddbmm(bias, query_NGd, key.flatten(0, 1).transpose(1, 2), alpha=scale)
    mixed_NGd = torch.bmm(scores_NGT.softmax(-1), value.flatten(0, 1))
    return mixed_NGd.view(batch, 1, heads, -1), None


def _grouped_mask(*args, **kwargs) -> Tensor | None:
    """The mask of `sdpa`; for one query per row its additive form, made once for all layers."""
    return eager_mask(*args, **kwargs) if kwargs["q_length"] == 1 else sdpa_mask(*args, **kwargs)


AttentionInterface.register(_NAME, grouped_attention)
AttentionMaskInterface.register(_NAME, _grouped_mask)


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, and fast attention; afterwards the mode of every module and the
    attention implementation are as before.

    Only a model that runs `sdpa` on a CPU is switched, since `sdpa` is what `grouped_attention` computes.
    Models with what a mask cannot express (soft caps, attention sinks) run something else, and go on doing
    so.
    """
    modes = [(module, module.training) for module in model.modules()]
    switch = (
        model.config._attn_implementation == "sdpa"
        and model.device.type == "cpu"
        and getattr(model, "_supports_attention_backend", False)
        and not model.config.sub_configs
    )
    try:
        model.eval()
        if switch:
            model.set_attn_implementation(_NAME)
        with torch.inference_mode():
            yield
    finally:
        if switch:
            model.set_attn_implementation("sdpa")
        for module, mode in modes:
            module.training = mode
