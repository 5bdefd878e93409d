"""Which attention heads and MLP neurons a narrower student keeps, by how strongly they act on the teacher's answers.

The criterion of Minitron (Muralidharan et al., arXiv 2407.14679; Sreenivas et al., arXiv 2408.11796):

    a neuron    the mean of |activation|, the number that down_proj is given for it
    a head      the mean L2 norm of its output, the part of o_proj's input that is the head's

Both are means over the positions that predict the answers' tokens: what stands in prompts or in padding is not
looked at. Of all choices of heads that the key-value groups permit, the one with the largest sum of scores is
taken. Nothing of what goes is added to what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.student.calibrate import Calibration, predicting
from limbeck.student.width import Heads, Kept, Width, attention_of, heads_of, mlps_of

CRITERION = "activation"
TOKENS = 2048
"""Supervised tokens measured on: those that layers are measured on and more of the same, for all heads and neurons take
one pass. docs/student.md has what it gains."""


class Narrowing(NamedTuple):
    """What one layer keeps, and why."""

    kept: Kept
    heads_H: NDArray[np.float32] | None
    """The score of each attention head; None where no head goes."""
    neurons_M: NDArray[np.float32] | None
    """The score of each MLP neuron; None where no neuron goes."""


def choose_width(model: PreTrainedModel, calibration: Calibration, width: Width) -> list[Narrowing]:
    """The heads and neurons that each layer keeps. The model is left as it was.

    Raises:
        ModelError: heads or neurons that cannot be told apart.

    """
    there = heads_of(model.config)
    count = model.config.get_text_config().num_hidden_layers
    heads = head_activation(model, calibration) if width.heads else [None] * count
    neurons = neuron_activation(model, calibration) if width.neurons else [None] * count
    chosen = []
    for heads_H, neurons_M in zip(heads, neurons, strict=True):
        attending = sharing = acting = None
        if heads_H is not None and width.heads and there:
            attending, sharing = strongest_heads(heads_H, there, width.heads)
        if neurons_M is not None and width.neurons:
            acting = strongest(neurons_M, width.neurons)
        chosen.append(Narrowing(Kept(attending, sharing, acting), heads_H, neurons_M))
    return chosen


def head_activation(model: PreTrainedModel, calibration: Calibration) -> list[NDArray[np.float32]]:
    """For each layer, the mean L2 norm of each attention head's output, [H].

    Raises:
        ModelError: heads that cannot be told apart.

    """
    attentions, heads = attention_of(model), heads_of(model.config)
    assert heads is not None, "attention_of refuses a model without"

    def norms(given_ND: Tensor) -> Tensor:
        return given_ND.unflatten(1, (heads.attention, heads.dim)).norm(dim=2)

    return _means(model, calibration, [attention.o_proj for attention in attentions], norms)


def neuron_activation(model: PreTrainedModel, calibration: Calibration) -> list[NDArray[np.float32]]:
    """For each layer, the mean absolute activation of each MLP neuron, [M].

    Raises:
        ModelError: neurons that cannot be told apart.

    """
    return _means(model, calibration, [mlp.down_proj for mlp in mlps_of(model)], torch.abs)


def _means(
    model: PreTrainedModel, calibration: Calibration, maps: Sequence[nn.Module], measure: Callable[[Tensor], Tensor]
) -> list[NDArray[np.float32]]:
    """The mean over all supervised positions of what `measure` makes, [N, K], of the input of each of the maps.

    Computed in float64 and given as float32: what is ranked is, to the bit, what the ledger keeps.
    """
    sums: list[Tensor | float] = [0.0] * len(maps)
    for batch in calibration.batches:

        def add(at: int, _: Any, given: tuple[Tensor, ...], predict_BT: Tensor = batch.predict_BT) -> None:
            given_ND = given[0].reshape(*predict_BT.shape, -1)[predict_BT].double()
            sums[at] = sums[at] + measure(given_ND).sum(dim=0)

        handles = [map_.register_forward_pre_hook(partial(add, at)) for at, map_ in enumerate(maps)]
        try:
            with torch.inference_mode():
                predicting(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return [(torch.as_tensor(s) / calibration.positions).cpu().numpy().astype(np.float32) for s in sums]


def strongest(scores_K: NDArray[Any], keep: int) -> tuple[int, ...]:
    """The places of the largest scores, rising; of equals the first."""
    return tuple(sorted(np.argsort(-scores_K, kind="stable")[:keep].tolist()))


def strongest_heads(scores_H: NDArray[Any], there: Heads, wanted: Heads) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Attention heads and key-value heads that stay. Each group offers its strongest heads, as many as it may
    keep; the groups whose offers sum to the most stay.
    """
    scores_GK = scores_H.astype(np.float64).reshape(there.key_value, there.group)
    offers = [strongest(scores_K, wanted.group) for scores_K in scores_GK]
    sums_G = np.array([scores_K[list(offer)].sum() for scores_K, offer in zip(scores_GK, offers, strict=True)])
    groups = strongest(sums_G, wanted.key_value)
    return tuple(group * there.group + place for group in groups for place in offers[group]), groups
