"""A `SampledSignal` packed for the disk: blocks of examples, each a few compressed planes of bytes.

The arrays of `encoding` hold numbers that are far from evenly spread: most ids are of common tokens, most
counts are small. A block takes the arrays of some neighbouring examples apart so that like lies beside like,
and compresses each plane by itself, because a plane has one table of Huffman codes:

    n_head, n_tail     count_bytes planes each
    head ids           id_bytes planes of the gaps
    tail ids           id_bytes planes of the gaps
    head               1 plane
    entropy            2 planes

The ids of a position's head ascend, and so do those of its tail; a gap is an id less the one before it in its
group, the group's first id whole: gaps are smaller than ids, so their upper bytes pack better. All arithmetic
is modulo 256 ** id_bytes, so that ids in any order come back. `planes` says what a plane is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.signal.encoding import SampledArrays, encode_sampled, pack_ids, unpack_ids
from limbeck.signal.planes import Packed, damaged, from_planes, to_planes
from limbeck.signal.types import SampledLayout, SampledSignal

ROW_BYTES = 4
"""Of each number in a row of the table."""
BLOCK = 512
"""Most positions of a block, unless one example alone has more: reading one example unpacks its block."""


def columns(layout: SampledLayout) -> int:
    """Numbers in a block's row of the table."""
    return 3 + sum(_planes_of(layout))


def group(positions: Sequence[int]) -> Iterator[range]:
    """Which neighbouring examples share a block, given the positions of each."""
    first, room = 0, BLOCK
    for number, count in enumerate(positions):
        if number > first and count > room:
            yield range(first, number)
            first, room = number, BLOCK
        room -= count
    if positions:
        yield range(first, len(positions))


def pack(arrays: SampledArrays, layout: SampledLayout) -> Packed:
    """One block of `arrays`."""
    heads_N, tails_N = arrays.n_head.astype(np.int32), arrays.n_tail.astype(np.int32)
    ids_E, is_head_E = unpack_ids(arrays.ids, layout.id_bytes), _heads_first(heads_N, tails_N)
    widths = _planes_of(layout)
    numbers = (
        heads_N,
        tails_N,
        _gaps(ids_E[is_head_E], heads_N),
        _gaps(ids_E[~is_head_E], tails_N),
        arrays.head.astype(np.int32),
        arrays.entropy.astype(np.int32),
    )
    stored = [plane for values_M, width in zip(numbers, widths, strict=True) for plane in to_planes(values_M, width)]
    sizes = tuple(len(plane) for plane in stored)
    return Packed(len(heads_N), len(ids_E), len(arrays.head), sizes, b"".join(stored))


def packed_bytes(signal: SampledSignal) -> int:
    """Bytes of `signal` on disk, in blocks of `BLOCK` positions: their planes, and their rows of the table."""
    stream, layout = torch.Generator().manual_seed(0), SampledLayout.of(signal.tau, signal.vocab_size)
    parts = [signal.slice(at, at + BLOCK) for at in range(0, len(signal), BLOCK)]
    blocks = [pack(encode_sampled(part, stream), layout) for part in parts]
    return sum(len(block.planes) + ROW_BYTES * len(block.row) for block in blocks)


def unpack(block: Packed, layout: SampledLayout) -> SampledArrays:
    """What was packed. Raises `StaleError` for planes that do not hold what the counts say."""
    n, heads = block.positions, block.heads
    lengths = (n, n, heads, block.entries - heads, heads, n)
    numbers = from_planes(block, list(zip(_planes_of(layout), lengths, strict=True)))
    heads_N, tails_N, head_gaps_H, tail_gaps_T, head_H, entropy_N = (values_M.view(np.int32) for values_M in numbers)
    if int(heads_N.sum()) != heads or int(tails_N.sum()) != block.entries - heads:
        raise damaged(f"{int(heads_N.sum())} heads and {int(tails_N.sum())} tails", f"{heads} of {block.entries}")
    largest = 256**layout.id_bytes - 1
    ids_E, is_head_E = np.empty(block.entries, np.int32), _heads_first(heads_N, tails_N)
    ids_E[is_head_E] = _undo_gaps(head_gaps_H, heads_N) & largest
    ids_E[~is_head_E] = _undo_gaps(tail_gaps_T, tails_N) & largest
    count_type = f"<u{layout.count_bytes}"
    return SampledArrays(
        heads_N.astype(count_type),
        tails_N.astype(count_type),
        pack_ids(ids_E, layout.id_bytes),
        head_H.astype(np.uint8),
        entropy_N.astype("<u2"),
    )


def _planes_of(layout: SampledLayout) -> tuple[int, ...]:
    """Bytes of a number of each kind, which is its number of planes."""
    counts, ids = layout.count_bytes, layout.id_bytes
    return (counts, counts, ids, ids, layout.head_bytes, layout.entropy_bytes)


def _heads_first(heads_N: NDArray[np.int32], tails_N: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which entries are heads, in the order of a signal's ids."""
    return np.repeat(np.tile([True, False], len(heads_N)), np.stack([heads_N, tails_N], axis=1).reshape(-1))


def _gaps(ids_M: NDArray[np.int32], counts_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """Each id less the one before it; the first of a group as it is."""
    gaps_M, starts_G = np.diff(ids_M, prepend=0), _starts(counts_N)
    gaps_M[starts_G] = ids_M[starts_G]
    return gaps_M


def _undo_gaps(gaps_M: NDArray[np.int32], counts_N: NDArray[np.int32]) -> NDArray[np.int32]:
    sums_M, starts_G = np.cumsum(gaps_M, dtype=np.int32), _starts(counts_N)
    return sums_M - np.repeat(sums_M[starts_G] - gaps_M[starts_G], counts_N[counts_N > 0])


def _starts(counts_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where each group that is not empty begins."""
    return (np.cumsum(counts_N) - counts_N)[counts_N > 0]
