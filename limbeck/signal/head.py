"""From hidden states to logits by the model's own way, for chosen positions only.

A language model's logits are more than `hidden @ weight.T`: Gemma caps them softly, Cohere, Granite and
Falcon-H1 scale them, GPT-NeoX names its head otherwise. Copies of those rules drift from the model. Here
the model's own forward runs, with its body replaced for the moment by one that hands over the given hidden
states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.models.attention import steady_attention

CHUNK = 512
"""Positions whose logits are held at a time: 50 MB in bfloat16 with a vocabulary of 49,152."""
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_PROBES = 8


class Head(NamedTuple):
    """A head in parts, for a loss that never holds all logits. With y = scale * (hidden @ weight.T + bias),
    the logits are y, or softcap * tanh(y / softcap) where there is a softcap.
    """

    weight: Tensor
    """[V, D], the model's own parameter."""
    bias: Tensor | None
    """[V]."""
    scale: float
    softcap: float | None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V], in the precision of hidden states and weight."""
        y_NV = nn.functional.linear(hidden_ND, self.weight, self.bias) * self.scale
        return y_NV if self.softcap is None else torch.tanh(y_NV / self.softcap) * self.softcap


_proved: WeakSet[nn.Module] = WeakSet()
"""Models whose head in parts was compared with their own."""


class _Given:
    """A body's output that is nothing but its last hidden states. Fields of other outputs read as None."""

    def __init__(self, hidden_1ND: Tensor):
        self._hidden_1ND = hidden_1ND
        self.read = False

    @property
    def last_hidden_state(self) -> Tensor:
        self.read = True
        return self._hidden_1ND

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def body_of(model: PreTrainedModel) -> nn.Module:
    """The decoder: the model without its head. Raises `ModelError` where transformers knows no such part."""
    body = model.get_decoder()
    if body is model or not isinstance(body, nn.Module):
        raise _unknown_head(model, "no decoder apart from the model")
    return body


def hidden_states(model: PreTrainedModel, tokens_BT: Tensor, *, position_ids_BT: Tensor | None = None) -> Tensor:
    """The body's last hidden states, [B, T, D], after the final norm: what the head is given.

    Padding comes after the tokens, where causal attention never looks from one, so no mask is needed. Where examples
    are packed in one row, `position_ids_BT` count from 0 in each, and the model keeps them apart.
    """
    packed = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    with steady_attention():
        return body_of(model)(input_ids=tokens_BT, use_cache=False, **packed).last_hidden_state


def head_logits(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """The logits, [N, V] in the model's precision, that `model` gives for last hidden states [N, D].

    Equal to `model(...).logits` at the positions the hidden states come from. Softmax them in float32.

    Raises:
        ModelError: the model does not compute its logits from its decoder's last hidden states.

    """
    given = _Given(hidden_ND[None])
    tokens_1N = torch.zeros(1, len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
    with _handing_over(body_of(model), given):
        logits_NV = model(input_ids=tokens_1N, use_cache=False).logits[0]
    if not given.read:
        raise _unknown_head(model, "logits that do not come from the decoder's last hidden states")
    return logits_NV


def head_of(model: PreTrainedModel) -> Head:
    """The model's head in parts. The first time, it is compared with the model's own on random hidden states.

    Raises:
        ModelError: the parts do not give the model's own logits.

    """
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if layer is None:
        raise _unknown_head(model, "no output embeddings")
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name, 1.0)
    for name in _DIVISORS:
        scale /= _number(config, name, 1.0)
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(config, name, 0.0))), None)
    head = Head(layer.weight, getattr(layer, "bias", None), scale, softcap)  # pyright: ignore[reportArgumentType]
    if model not in _proved:
        _prove(model, head)
        _proved.add(model)
    return head


def _number(config: object, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


def _prove(model: PreTrainedModel, head: Head) -> None:
    """Compares at two sizes of hidden states, so that a soft cap shows in one and a wrong scale in the
    other.
    """
    weight = head.weight
    noise_ND = torch.randn(_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0))
    noise_ND[::2] *= 0.1
    hidden_ND = noise_ND.to(weight.device, weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        own_NV, parts_NV = head_logits(model, hidden_ND).double(), head.logits(hidden_ND).double()
    tolerance = 16 * torch.finfo(weight.dtype).eps
    if own_NV.shape != parts_NV.shape or not torch.allclose(
        parts_NV, own_NV, tolerance, tolerance * float(own_NV.std())
    ):
        raise _unknown_head(model, f"logits that scale {head.scale} and softcap {head.softcap} do not explain")


@contextmanager
def _handing_over(body: nn.Module, output: _Given) -> Iterator[None]:
    """While the block runs, `body` computes nothing and returns `output`."""
    own = body.__dict__.get("forward")

    def forward(*_: Any, **__: Any) -> _Given:
        return output

    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def _unknown_head(model: PreTrainedModel, found: str) -> ModelError:
    return ModelError(
        "the model's head cannot be told from its body",
        [
            Problem(
                type(model).__name__,
                found,
                "a causal language model: a decoder, and a head on its last hidden states",
                "use a model that AutoModelForCausalLM loads",
            ),
        ],
    )
