"""Attention by plain matrix products, which on a CPU learn faster than torch's flash kernel, and read one token faster.

Where neither a gradient is wanted nor one query asked at a time, that kernel is faster (2.8 against 6.1 ms for 8
sequences of 234 tokens), and models are left to it. Faster than either is the matrix unit of processors that have it
(`amx.attention`), where sequences are not packed and do not slide.

Query heads that share a key head become the rows of one product: queries [B, heads, T, d] are read as [B * key heads,
group * T, d], so that keys and values [B, key heads, S, d] are neither repeated nor copied. The probabilities are held
whole, [B, heads, T, S], as long as there are few enough of them; longer sequences go torch's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from limbeck.models.amx import attention as unit

_NAME = "limbeck_grouped"
_BEYOND = ("position_bias", "softcap", "cache")
"""Arguments of `sdpa` that change more than the mask."""
_MOST = 1 << 24
"""Probabilities of one layer that are held at a time: 32 MiB in bfloat16. Eight sequences of 480 tokens with nine heads
have as many. Past twice that torch's kernel is as fast and holds none."""
_AT_A_TIME = 1 << 21
"""Probabilities that are worked on at a time: 4 MiB in bfloat16, which the cores' own caches hold. Products, mask and
softmax pass over them seven times: 1.3 ms a sequence of 224 tokens forward and backward, instead of 1.9 from memory."""


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `sdpa_attention_forward` computes. `attention_mask` is additive, [B or 1, 1, T, S], as the mask function of
    this attention makes it, or None for each query over the keys up to its own. Anything else goes torch's way:
    dropout, soft caps, more probabilities than are held.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    beyond = dropout or any(kwargs.get(name) is not None for name in _BEYOND) or batch != key.shape[0]
    causal = attention_mask is None and length > 1
    if causal and not beyond and _is_causal(module, kwargs) and unit.usable(query, key, value):
        return unit.attend(query, key, value, scale), None
    if causal and torch.is_grad_enabled() and _is_causal(module, kwargs) and length == key.shape[2]:
        attention_mask = _causal_mask(length, query.dtype, query.device)
    additive = attention_mask is not None and attention_mask.is_floating_point() and attention_mask.shape[1] == 1
    held = length == 1 or (additive and _few(batch * heads * length * key.shape[2]))
    if beyond or not held or not (additive or attention_mask is None):
        if causal:
            attention_mask = None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    mixed = _Grouped.apply(query, key, value, attention_mask, scale)
    return mixed.transpose(1, 2), None  # pyright: ignore[reportOptionalMemberAccess]


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """As `sdpa_attention_forward` finds out where there is no mask."""
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


@lru_cache(maxsize=4)
def _causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive, [1, 1, T, T]; made once for all layers."""
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return torch.zeros(1, 1, length, length, dtype=dtype, device=device).masked_fill_(later, torch.finfo(dtype).min)


def _few(probabilities: int) -> bool:
    return probabilities <= _MOST


class _Grouped(torch.autograd.Function):
    """softmax(scale * query @ key.T + mask) @ value, [B, heads, T, d]; keeps the probabilities for the gradient.

    With probabilities p and the gradient g of p @ value, the gradient of the scores is p * (g @ value.T - r), where r
    is the sum of p * (g @ value.T) over a row.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        kv = key.shape[1]
        q_NRd = query.reshape(batch * kv, heads // kv * length, width)
        k_NSd, v_NSd = key.flatten(0, 1), value.flatten(0, 1)
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            q_NRd, k_NSd, v_NSd = q_NRd.to(dtype), k_NSd.to(dtype), v_NSd.to(dtype)
        p_NRS = q_NRd.new_empty(*q_NRd.shape[:2], k_NSd.shape[1])
        mixed_NRd = q_NRd.new_empty(*q_NRd.shape[:2], v_NSd.shape[2])
        with torch.autocast(query.device.type, enabled=False):
            if mask is not None:
                # What stands for minus infinity in float32 is infinite in bfloat16, and a row of it undefined.
                mask = mask.to(p_NRS.dtype).clamp_min(torch.finfo(p_NRS.dtype).min)
            for some in _sequences(batch, p_NRS):
                of = slice(some.start * kv, some.stop * kv)
                scores_NRS = torch.bmm(q_NRd[of] * scale, k_NSd[of].transpose(1, 2), out=p_NRS[of])
                if mask is not None:
                    mine = mask if len(mask) == 1 else mask[some]
                    scores_NRS.view(-1, heads, length, scores_NRS.shape[-1]).add_(mine)
                torch.bmm(torch.softmax(scores_NRS, dim=-1, out=scores_NRS), v_NSd[of], out=mixed_NRd[of])
        ctx.save_for_backward(q_NRd, k_NSd, v_NSd, p_NRS)
        ctx.shapes, ctx.types, ctx.scale = (query.shape, key.shape), (query.dtype, key.dtype, value.dtype), scale
        return mixed_NRd.view(batch, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q_NRd, k_NSd, v_NSd, p_NRS = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        batch, kv = key_shape[:2]
        grad_q_NRd, grad_k_NSd, grad_v_NSd = (torch.empty_like(t) for t in (q_NRd, k_NSd, v_NSd))
        with torch.autocast(grad.device.type, enabled=False):
            g_NRd = grad.to(p_NRS.dtype).reshape(*q_NRd.shape[:2], -1)
            for some in _sequences(batch, p_NRS):
                of = slice(some.start * kv, some.stop * kv)
                torch.bmm(p_NRS[of].transpose(1, 2), g_NRd[of], out=grad_v_NSd[of])
                grad_p_NRS = torch.bmm(g_NRd[of], v_NSd[of].transpose(1, 2))
                grad_s_NRS = torch.ops.aten._softmax_backward_data(grad_p_NRS, p_NRS[of], -1, p_NRS.dtype)
                torch.bmm(grad_s_NRS, k_NSd[of], out=grad_q_NRd[of])
                torch.bmm(grad_s_NRS.transpose(1, 2), q_NRd[of], out=grad_k_NSd[of])
            grad_q, grad_k = (t.mul_(ctx.scale) for t in (grad_q_NRd, grad_k_NSd))
        q_type, k_type, v_type = ctx.types
        grad_v = grad_v_NSd.view(*key_shape[:3], -1).to(v_type)
        return grad_q.view(query_shape).to(q_type), grad_k.view(key_shape).to(k_type), grad_v, None, None


def _sequences(batch: int, p_NRS: Tensor) -> list[slice]:
    """The sequences of a batch, as many at a time as are worked on at a time."""
    some = max(1, min(batch, _AT_A_TIME * batch // max(1, p_NRS.numel())))
    return [slice(first, min(first + some, batch)) for first in range(0, batch, some)]


def _grouped_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None where each query attends to the keys up to its own, else the additive mask, made once for all layers; that
    of `sdpa` for sequences too long to be held.
    """
    q, heads = kwargs["q_length"], kwargs["config"].num_attention_heads
    if q == 1:
        return eager_mask(*args, **kwargs)
    found = sdpa_mask(*args, **kwargs)
    if found is None or not _few(kwargs["batch_size"] * heads * q * kwargs["kv_length"]):
        return found
    return eager_mask(*args, **kwargs)


AttentionInterface.register(_NAME, grouped_attention)
AttentionMaskInterface.register(_NAME, _grouped_mask)


@contextmanager
def fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, the model attends by `grouped_attention` on a CPU, and by `steady_attention` on a GPU;
    afterwards as before.

    Only a model that runs `sdpa` on a CPU is switched, since `sdpa` is what `grouped_attention` computes. Models with
    what a mask cannot express (soft caps, attention sinks) run something else, and go on doing so.
    """
    switch = (
        model.config._attn_implementation == "sdpa"
        and model.device.type == "cpu"
        and getattr(model, "_supports_attention_backend", False)
        and not model.config.sub_configs
    )
    if switch:
        model.set_attn_implementation(_NAME)
    try:
        with steady_attention():
            yield
    finally:
        if switch:
            model.set_attn_implementation("sdpa")


@contextmanager
def steady_attention() -> Iterator[None]:
    """While the block runs, torch's `sdpa` does not go to cuDNN, which it prefers on newer GPUs.

    cuDNN prepares a plan for every shape of batch that it meets, milliseconds a layer forward and again backward. Here
    most batches have a shape of their own; torch's other kernels for it take any.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
