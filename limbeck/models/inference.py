"""How a model that only reads is run fast: what training does for a student, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from limbeck.models.attention import fast_attention
from limbeck.models.gated import fused_gates
from limbeck.models.layers import fused_layers
from limbeck.models.stream import narrow_stream


@contextmanager
def fast_reading(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, a model in bfloat16 computes as a student learns: rounded once where its own code rounds in
    between, and compiled, and attending by the matrix unit, where `compiling.on_cpu` and `amx.for_training` say so.
    """
    narrow = model.dtype if model.dtype is torch.bfloat16 else None
    with fast_attention(model), fused_layers(model, narrow), narrow_stream(model, narrow), fused_gates(model):
        yield
