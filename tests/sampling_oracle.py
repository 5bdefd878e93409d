"""Sampling done slowly: by sorting, in float64, one token and one row after the other, without a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from limbeck.generate import Generated, Sampling, uniforms

VOCABULARY = 300
STOPS = frozenset(range(30))  # a tenth of the vocabulary: rows finish at many different steps


def shaped(logits: torch.Tensor, sampling: Sampling) -> list[float]:
    """The distribution that `sampling` describes, by sorting, in float64, one token after the other."""
    probs = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = [
        token
        for token in order
        if not sampling.top_k or probs[token] >= probs[order[min(sampling.top_k, len(order)) - 1]]
    ]
    if sampling.top_p < 1:
        total, mass, count = sum(probs[token] for token in kept), 0.0, 0
        while mass < sampling.top_p * total:
            mass += probs[kept[count]]
            count += 1
        kept = [token for token in kept if probs[token] >= probs[kept[count - 1]]]
    total = sum(probs[token] for token in kept)
    allowed = set(kept)
    return [probs[token] / total if token in allowed else 0.0 for token in range(len(probs))]


def inverse(probs: list[float], uniform: float) -> int:
    edge = 0.0
    for token, prob in enumerate(probs):
        edge += prob
        if uniform < edge:
            return token
    return max(token for token, prob in enumerate(probs) if prob > 0)


def slow(model, prompt: list[int], sampling: Sampling, seed: int, stop_ids=STOPS) -> Generated:
    """One row, the model called on the whole sequence for every token."""
    tokens: list[int] = []
    for uniform in uniforms(seed, sampling.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
        token = int(logits.argmax()) if sampling.temperature == 0 else inverse(shaped(logits, sampling), uniform)
        if token in stop_ids:
            return Generated(tuple(tokens), "stop", token)
        tokens.append(token)
    return Generated(tuple(tokens), "length", None)


def ragged(count: int, *, prefix: int = 0, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCABULARY) for _ in range(prefix)]
    return [shared + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 12))] for _ in range(count)]


@contextmanager
def shapes_read(model) -> Iterator[list[tuple[int, int]]]:
    """The [rows, tokens] of every call of the model."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()
