"""Floating-point operations of a distillation step, and how many the processor can do.

A product of [a, b] with [b, c] is 2abc operations. Counted for a step over sequences of L_i tokens, with N
supervised tokens in all; padding, recomputation, norms, activations, softmax, loss and optimiser are not counted, so
all time they take lowers the share:

    body        6 * P * sum(L_i)               P weights of the body's linear layers; 2 forward, 4 backward
    attention   6 * layers * D * sum(L_i^2)    queries with keys and weights with values, causal: half of 4 * L^2 * D
                                               forward, twice that backward; D is heads times their width
    head        6 * N * V * H                  at supervised positions only; H is the hidden width, V the vocabulary

A live teacher adds its forward pass, a third of each. The peak is the best rate of torch.mm on square bf16 matrices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.signal.head import body_of

SIDES = (512, 1024, 2048, 4096)


class Shape(NamedTuple):
    """What of a model its operations depend on."""

    linear: int
    """Weights of the body's linear layers."""
    layers: int
    attention: int
    """Attention heads times their width."""
    head: int
    """Vocabulary times hidden width."""


def shape_of(model: PreTrainedModel) -> Shape:
    """Of a decoder whose products are all in `nn.Linear`."""
    config = model.config.get_text_config()
    linear = sum(layer.weight.numel() for layer in body_of(model).modules() if isinstance(layer, nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * width
    return Shape(linear, config.num_hidden_layers, attention, config.vocab_size * config.hidden_size)


def forward_flops(shape: Shape, lengths: Sequence[int], supervised: int) -> float:
    """Operations of a forward pass; forward and backward are three times as many."""
    body = 2.0 * shape.linear * sum(lengths)
    attention = 2.0 * shape.layers * shape.attention * sum(n * n for n in lengths)
    return body + attention + 2.0 * supervised * shape.head


class Peak(NamedTuple):
    """The best rate found, and at which size."""

    flops_per_second: float
    side: int


def matrix_peak(seconds: float = 1.0) -> Peak:
    """The best rate of square bf16 products, each size tried for so many seconds."""
    best = Peak(0.0, 0)
    for side in SIDES:
        a, b = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty(side, side, dtype=torch.bfloat16)
        torch.mm(a, b, out=out)
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            torch.mm(a, b, out=out)
            best = max(best, Peak(2.0 * side**3 / (time.perf_counter() - started), side))
    return best
