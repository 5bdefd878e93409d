"""A `SampledSignal` in small numbers: five flat arrays, and settings that hold for all of them.

    n_head   [N]     uint8, or uint16 where tau and the vocabulary allow more than 255 (`SampledLayout`)
    n_tail   [N]     the same
    ids      [E]     uint16 for up to 65,536 different ids, else [E, 3] uint8, least significant byte first
    head     [H]     uint8, a level of the grid below
    entropy  [N]     uint16, in steps of ln(V) / 65535 nats

All multi-byte numbers are little-endian. `ids` and `head` are in the order of `SampledSignal`: positions
one after the other, heads before tails. Tail entries have no number: each weighs tau. `packing` packs the
arrays for the disk, without loss.

A head probability is rounded to one of 256 levels, tau + (1 - tau)(3x^2 - 2x^3) with x = level / 255, which
lie closest near tau and near 1, where most head probabilities are. It is rounded up or down at random, so
that its expectation is the probability itself; so is the entropy. On answers of SmolLM2-135M at tau = 0.02
this adds 0.4 to 0.6 % to the squared error that the sampled tail has anyway: sixteen bits would buy no more
than that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.errors import InputError, Problem
from limbeck.signal.types import SampledLayout, SampledSignal

_LEVELS = 256
_ENTROPY_STEPS = 0xFFFF


class SampledArrays(NamedTuple):
    """An encoded `SampledSignal`; the module's docstring gives the types and the order."""

    n_head: NDArray[np.generic]
    n_tail: NDArray[np.generic]
    ids: NDArray[np.generic]
    head: NDArray[np.generic]
    entropy: NDArray[np.generic]

    @property
    def nbytes(self) -> int:
        """Bytes of all five arrays."""
        return sum(array.nbytes for array in self)


def encode_sampled(signal: SampledSignal, generator: torch.Generator) -> SampledArrays:
    """The arrays of `signal`; `generator`, on the CPU, decides which way each number is rounded.

    Law: the expectation of `decode_sampled(encode_sampled(signal))` is `signal`, and no decoded head
    probability is below tau or above 1.
    """
    signal = signal.to("cpu")
    layout = SampledLayout.of(signal.tau, signal.vocab_size)
    count_type = f"<u{layout.count_bytes}"
    return SampledArrays(
        signal.n_head_N.numpy().astype(count_type),
        signal.n_tail_N.numpy().astype(count_type),
        pack_ids(signal.ids_E.numpy(), layout.id_bytes),
        _round_to(_levels(signal.tau), signal.head_probs_H, generator).astype(np.uint8),
        _round_to(_entropy_levels(signal.vocab_size), signal.entropy_N, generator).astype("<u2"),
    )


def decode_sampled(arrays: SampledArrays, *, tau: float, vocab_size: int, temperature: float = 1.0) -> SampledSignal:
    """The signal that `arrays` hold, on the CPU.

    Raises `InputError` for arrays of other types than the settings call for, or whose counts, lengths or
    ids do not agree.
    """
    layout = SampledLayout.of(tau, vocab_size)
    expected = (f"uint{8 * layout.count_bytes}",) * 2 + (
        "uint16" if layout.id_bytes == 2 else "uint8",
        "uint8",
        "uint16",
    )
    problems = [
        Problem(f"SampledArrays.{name}", f"type {array.dtype}", f"type {want}", "these are of other settings")
        for name, array, want in zip(SampledArrays._fields, arrays, expected, strict=True)
        if array.dtype != np.dtype(want).newbyteorder("<")
    ]
    if problems:
        raise InputError("these arrays are not the signal they should be", problems)
    return SampledSignal(
        n_head_N=torch.from_numpy(arrays.n_head.astype(np.int32)),
        n_tail_N=torch.from_numpy(arrays.n_tail.astype(np.int32)),
        ids_E=torch.from_numpy(unpack_ids(arrays.ids, layout.id_bytes)),
        head_probs_H=_levels(tau)[torch.from_numpy(arrays.head.astype(np.int64))].float(),
        entropy_N=torch.from_numpy(arrays.entropy.astype(np.float64) * _entropy_step(vocab_size)).float(),
        tau=tau,
        vocab_size=vocab_size,
        temperature=temperature,
    )


def _levels(tau: float) -> Tensor:
    """The 256 head probabilities, ascending. Held as float32, the type they decode to, so that rounding is
    unbiased.
    """
    x = torch.arange(_LEVELS, dtype=torch.float64) / (_LEVELS - 1)
    return (tau + (1 - tau) * x * x * (3 - 2 * x)).float().double().clamp(tau, 1)


def _entropy_step(vocab_size: int) -> float:
    return math.log(max(2, vocab_size)) / _ENTROPY_STEPS


def _entropy_levels(vocab_size: int) -> Tensor:
    steps = torch.arange(_ENTROPY_STEPS + 1, dtype=torch.float64)
    return (steps * _entropy_step(vocab_size)).float().double()


def _round_to(levels_L: Tensor, values_M: Tensor, generator: torch.Generator) -> NDArray[np.generic]:
    """Number of the level just above or below each value, at random so that the level's expectation is the
    value.
    """
    values_M = values_M.double().clamp(levels_L[0], levels_L[-1])
    above_M = torch.searchsorted(levels_L, values_M, right=True).clamp(1, len(levels_L) - 1)
    low_M, high_M = levels_L[above_M - 1], levels_L[above_M]
    chance_M = torch.where(high_M > low_M, (values_M - low_M) / (high_M - low_M), 1.0)
    uniform_M = torch.rand(len(values_M), generator=generator, dtype=torch.float64)
    return (above_M - (uniform_M >= chance_M).long()).numpy()


def pack_ids(ids_E: NDArray[np.generic], id_bytes: int) -> NDArray[np.generic]:
    """Ids [E] as the array `ids`."""
    if id_bytes == 2:
        return ids_E.astype("<u2")
    return np.ascontiguousarray(ids_E.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :id_bytes])


def unpack_ids(ids: NDArray[np.generic], id_bytes: int) -> NDArray[np.int32]:
    """The ids [E] of the array `ids`. Raises `InputError` for one of another shape."""
    if id_bytes == 2:
        return ids.astype(np.int32)
    if ids.ndim != 2 or ids.shape[1] != id_bytes:
        found = f"shape {list(ids.shape)}"
        raise InputError(
            "these arrays are not the signal they should be",
            [
                Problem("SampledArrays.ids", found, f"shape [entries, {id_bytes}]"),
            ],
        )
    wide = np.zeros((len(ids), 4), dtype=np.uint8)
    wide[:, :id_bytes] = ids
    return wide.view("<i4").reshape(-1).astype(np.int32)
