"""The state a model is in while it samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from limbeck.models.attention import fast_attention


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradients, and fast attention; afterwards the mode of every module and the
    attention implementation are as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with fast_attention(model), torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
