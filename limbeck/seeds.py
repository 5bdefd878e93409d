"""Random seeds, derived so that no two uses share a stream and none depends on order."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: SHA-256 of the run's seed and the purpose's names.

    Two different purposes give unrelated seeds; the same purpose gives the same seed whatever ran before it, so a
    resumed run draws what the uninterrupted one would have drawn.
    """
    text = "\x1f".join(["limbeck-seed-1", str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
