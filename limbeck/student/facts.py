"""What the ledger keeps of how a student was chosen.

A layer may have tens of thousands of neurons, so what concerns each of them is written compactly, and in a way
that needs nothing but base64 to read:

    scores    base64 of little-endian 32-bit floats, one for each in order
    kept      base64 of bits, one for each in order, the first in the highest bit of the first byte
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from limbeck.student.activation import CRITERION, Narrowing
from limbeck.student.choose import Choice
from limbeck.student.prune import ChosenWidth


def facts_of_layers(choice: Choice) -> dict[str, JsonValue]:
    """A choice of layers."""
    return {
        "criterion": choice.criterion,
        "layers_kept": list(choice.kept),
        "layers_removed": list(choice.removed),
        "scores": list(choice.scores),
        "scores_unit": choice.unit,
        "divergence_nats": list(choice.divergence),
        "calibration_tokens": choice.tokens,
    }


def facts_of_width(chosen: ChosenWidth) -> dict[str, JsonValue]:
    """A choice of heads and neurons: how many there are, and under `width` which, and why."""
    facts: dict[str, JsonValue] = {}
    if chosen.width.heads and chosen.teacher_heads:
        facts["attention_heads"] = chosen.width.heads.attention
        facts["key_value_heads"] = chosen.width.heads.key_value
        facts["teacher_attention_heads"] = chosen.teacher_heads.attention
        facts["teacher_key_value_heads"] = chosen.teacher_heads.key_value
        facts["head_dim"] = chosen.width.heads.dim
    if chosen.width.neurons and chosen.teacher_neurons:
        facts["intermediate_size"] = chosen.width.neurons
        facts["teacher_intermediate_size"] = chosen.teacher_neurons
    facts["width"] = {
        "criterion": CRITERION,
        "divergence_nats": chosen.divergence,
        "calibration_tokens": chosen.tokens,
        "layers": [_facts_of_layer(layer) for layer in chosen.layers],
    }
    return facts


def _facts_of_layer(layer: Narrowing) -> JsonValue:
    facts: dict[str, JsonValue] = {}
    if layer.heads_H is not None:
        facts["attention_heads_kept"] = list(layer.kept.attention_heads or ())
        facts["key_value_heads_kept"] = list(layer.kept.key_value_heads or ())
        facts["attention_heads_scores"] = layer.heads_H.tolist()
    if layer.neurons_M is not None:
        facts["neurons_kept"] = _bits(layer.kept.neurons or (), len(layer.neurons_M))
        facts["neurons_scores"] = _floats(layer.neurons_M)
    return facts


def _floats(scores_M: NDArray[np.float32]) -> str:
    return base64.b64encode(scores_M.astype("<f4").tobytes()).decode()


def _bits(kept: Sequence[int], there: int) -> str:
    bits_M = np.zeros(there, dtype=np.uint8)
    bits_M[list(kept)] = 1
    return base64.b64encode(np.packbits(bits_M).tobytes()).decode()
