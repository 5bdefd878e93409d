"""Numbers as compressed planes of bytes, which is how every stored signal lies on disk.

A number of several bytes has a plane for each of them, the most significant first. A plane is one Zstandard frame
(RFC 8878), or the bytes as they are where a frame would not be shorter: a plane has one table of Huffman codes, so like
lies beside like.

A block is some neighbouring examples packed together. Its row of a shard's table is three counts (positions, entries,
and entries with a probability of their own), then the bytes of each plane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from limbeck.errors import Problem, StaleError

_LEVEL = 19
"""Of Zstandard: it costs the teacher's forward pass over a block next to nothing, and reading nothing at all."""


class Packed(NamedTuple):
    """A block: what it holds, and its planes one after the other."""

    positions: int
    entries: int
    heads: int
    sizes: tuple[int, ...]
    """Bytes of each plane as stored."""
    planes: bytes

    @property
    def row(self) -> tuple[int, ...]:
        """The block's row of a shard's table: the three counts, then the sizes."""
        return (self.positions, self.entries, self.heads, *self.sizes)

    @classmethod
    def of(cls, row: Sequence[int], planes: bytes) -> Packed:
        """The block of this row of the table."""
        return cls(row[0], row[1], row[2], tuple(row[3:]), planes)


def to_planes(values_M: NDArray[np.generic], width: int) -> Iterator[bytes]:
    """The planes of numbers of `width` bytes, as stored."""
    codec = pa.Codec("zstd", compression_level=_LEVEL)
    for place in reversed(range(width)):
        plane = (values_M >> 8 * place & 0xFF).astype(np.uint8).tobytes()  # pyright: ignore[reportOperatorIssue]
        frame = codec.compress(plane, asbytes=True)
        yield frame if len(frame) < len(plane) else plane


def from_planes(block: Packed, columns: Sequence[tuple[int, int]]) -> list[NDArray[np.uint32]]:
    """The numbers of each column, given as (bytes of a number, how many numbers).

    Raises `StaleError` for planes that do not hold what the counts say.
    """
    numbers: list[NDArray[np.uint32]] = []
    sizes, at = iter(block.sizes), 0
    for width, length in columns:
        values_M = np.zeros(length, np.uint32)
        for _ in range(width):
            size = next(sizes)
            np.bitwise_or(values_M << np.uint32(8), _plane(block.planes[at : at + size], length), out=values_M)
            at += size
        numbers.append(values_M)
    return numbers


def _plane(stored: bytes, length: int) -> NDArray[np.uint8]:
    if len(stored) < length:
        try:
            stored = pa.Codec("zstd").decompress(stored, length, asbytes=True)
        except OSError as error:
            raise damaged(str(error), f"a frame of {length} bytes") from error
    if len(stored) != length:
        raise damaged(f"a plane of {len(stored)} bytes", f"{length} bytes")
    return np.frombuffer(stored, np.uint8)


def damaged(found: str, expected: str) -> StaleError:
    """The error for a block whose numbers contradict each other."""
    remedy = "remove the signals and run again: they are made from the examples and the teacher"
    return StaleError("a block of the signals is damaged", [Problem("block", found, expected, remedy)])
