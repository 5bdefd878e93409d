"""A model with only some of the attention heads and MLP neurons of its layers.

It is made by its own class from a configuration that says its width, as it will be when it is loaded again, and then
compared with the whole model in which the same heads and neurons are silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.student.saving import quiet
from limbeck.student.width import Kept, Width, attention_of, heads_of, mlps_of, narrowed, unfit

_PROBE = 16
"""Tokens that a narrow model is compared on with the whole one."""
_TOLERANCE = {True: 1e-3, False: 0.1}
"""Largest mean difference of their logits, in standard deviations, by whether they compute in float32: narrower
products are rounded otherwise."""


def narrow(model: PreTrainedModel, width: Width, kept: Sequence[Kept]) -> PreTrainedModel:
    """A model with only these heads and neurons in its layers, their weights bit for bit; what is not cut may
    share its memory with `model`, which stays as it is.

    Raises:
        ModelError: what `check_width` raises, or weights that do not fit the model made from the configuration.

    """
    config = narrowed(model.config, width)
    with quiet():
        both: Any = type(model).from_pretrained(
            None, config=config, state_dict=_cut(model, width, kept), dtype=model.dtype, output_loading_info=True
        )  # fmt: skip
    made, told = both
    wrong = {*told["missing_keys"], *told["unexpected_keys"], *(str(m[0]) for m in told["mismatched_keys"])}
    if wrong:
        found = f"{len(wrong)} weights that do not fit its configuration: {', '.join(sorted(map(str, wrong))[:4])}"
        raise unfit(model, "heads or neurons", [found], "the weights that its configuration speaks of")
    made.generation_config = copy.deepcopy(model.generation_config)
    made.to(model.device).requires_grad_(False).eval()
    _prove(model, made, kept)
    return made


def _cut(model: PreTrainedModel, width: Width, kept: Sequence[Kept]) -> dict[str, Tensor]:
    """The model's weights, by name, those of heads and neurons that go left out."""
    names = {id(module): name for name, module in model.named_modules()}
    weights: dict[str, Tensor] = dict(model.state_dict())

    def select(module: nn.Module, dim: int, which: Tensor) -> None:
        for name in ("weight", "bias"):
            key = f"{names[id(module)]}.{name}"
            if key in weights and weights[key].dim() > dim:
                weights[key] = weights[key].index_select(dim, which.to(weights[key].device)).contiguous()

    if width.heads is not None:
        for attention, layer in zip(attention_of(model), kept, strict=True):
            queries, pairs = (_rows(some, width.heads.dim) for some in (layer.attention_heads, layer.key_value_heads))
            select(attention.q_proj, 0, queries)
            select(attention.k_proj, 0, pairs)
            select(attention.v_proj, 0, pairs)
            select(attention.o_proj, 1, queries)
    if width.neurons is not None:
        for mlp, layer in zip(mlps_of(model), kept, strict=True):
            neurons = torch.tensor(layer.neurons)
            for map_ in (mlp.up_proj, getattr(mlp, "gate_proj", None)):
                if map_ is not None:
                    select(map_, 0, neurons)
            select(mlp.down_proj, 1, neurons)
    return weights


def _prove(model: PreTrainedModel, made: PreTrainedModel, kept: Sequence[Kept]) -> None:
    """Compare the narrow model with the whole one in which what goes is silenced, which has to say the same: a
    class whose arithmetic depends on its width in another way would be another model.
    """
    config = model.config.get_text_config()
    tokens_1T = torch.arange(_PROBE, device=model.device)[None] % config.vocab_size
    handles = _silence(model, kept)
    try:
        with torch.inference_mode():
            silenced, narrow_ = (m(input_ids=tokens_1T, use_cache=False).logits.double() for m in (model, made))
    finally:
        for handle in handles:
            handle.remove()
    difference = float((silenced - narrow_).abs().mean() / silenced.std())
    if not difference < _TOLERANCE[model.dtype == torch.float32]:
        found = f"logits that differ by {difference:.2g} standard deviations from the model's with the rest silenced"
        raise unfit(model, "heads or neurons", [found], "the same logits")


def _silence(model: PreTrainedModel, kept: Sequence[Kept]) -> list[Any]:
    """Hooks that set what the heads and neurons that go give to 0."""
    heads = heads_of(model.config)
    pairs = []
    if heads is not None and kept[0].attention_heads is not None:
        some = [_rows(layer.attention_heads, heads.dim) for layer in kept]
        pairs += zip([attention.o_proj for attention in attention_of(model)], some, strict=True)
    if kept[0].neurons is not None:
        pairs += zip([mlp.down_proj for mlp in mlps_of(model)], [torch.tensor(k.neurons) for k in kept], strict=True)

    def mask(stays: Tensor) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask_D = torch.zeros(given[0].shape[-1], dtype=given[0].dtype, device=given[0].device)
            mask_D[stays.to(mask_D.device)] = 1
            return (given[0] * mask_D, *given[1:])

        return hook

    return [map_.register_forward_pre_hook(mask(stays)) for map_, stays in pairs]


def _rows(heads: tuple[int, ...] | None, dim: int) -> Tensor:
    """The rows of a projection that belong to these heads."""
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()
