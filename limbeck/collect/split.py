"""Which prompts are held out: decided by what they say, never by where they stand.

Prompts are ranked by a digest of their id, which is a digest of their content; the lowest are held out. So
the rows of a file may be reordered, and a prompt keeps its rank when others are added.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection

from limbeck.errors import InputError, Problem

_DOMAIN = b"limbeck-split-1\x1f"


def rank(prompt_id: str) -> str:
    """Where a prompt stands in the order of holding out, as 64 hexadecimal digits: SHA-256 of a fixed tag
    and the id.

    Scores rest on the first `evaluate.held_out` held-out prompts in this order whose answers were kept.
    """
    return hashlib.sha256(_DOMAIN + prompt_id.encode()).hexdigest()


def reserve(prompts: int, held_out: int) -> int:
    """How many of so many prompts are held out: half as many again as are scored, since curation may drop
    some of their answers, but no more than half of all prompts unless the scored ones alone are more.

    Raises `InputError` where that leaves none to train on.
    """
    size = min(math.ceil(1.5 * held_out), max(held_out, prompts // 2))
    if prompts - size < 1:
        found = f"{prompts} different prompts, and evaluate.held_out: {held_out}"
        expected = f"at least {held_out + 1} different prompts for evaluate.held_out: {held_out}"
        lower = f", or lower evaluate.held_out to at most {prompts - 1}" if prompts > 1 else ""
        remedy = f"give at least {held_out + 1 - prompts} more{lower}"
        problem = Problem("prompts and evaluate.held_out", found, expected, remedy)
        raise InputError("too few prompts to train on some and evaluate on others", [problem])
    return size


def hold_out(ids: Collection[str], held_out: int) -> frozenset[str]:
    """The ids that are held out. Raises `InputError` where that leaves none to train on."""
    return frozenset(heapq.nsmallest(reserve(len(ids), held_out), ids, key=rank))
