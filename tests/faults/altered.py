"""Bytes and values that are mostly like others, by chance."""

from __future__ import annotations

from random import Random
from typing import Any


def some_bytes(data: bytes, random: Random) -> bytes:
    """Other bytes, mostly alike."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(out) + 1)
        length = min(random.choice((1, 1, 2, 4, 16, 300)), len(out) - at)
        kind = random.randrange(6)
        if kind == 0 and length:
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[at : at + length] = random.randbytes(length)
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = random.randbytes(length)
        elif kind == 4:
            out[at : at + length] = random.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        else:
            start = random.randrange(len(out) + 1)
            out[at:at] = out[start : start + length]
    return bytes(out)


def some_json(value: Any, random: Random, depth: int = 0) -> Any:
    """Another value, mostly alike: one place in it is changed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        kind = random.random()
        if kind < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.14:
            return value | {random.choice(("more", "", "é", "form", "__proto__")): _plain(random)}
        return value | {key: some_json(value[key], random, depth + 1)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at, kind = random.randrange(len(value)), random.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return [*value, value[at]]
        return [*value[:at], some_json(value[at], random, depth + 1), *value[at + 1 :]]
    if isinstance(value, str) and value and random.random() < 0.5:
        at = random.randrange(len(value))
        return value[:at] + random.choice(("", "0", "=", "Z", " ", "\n", "é", "\u2028", "A", "/")) + value[at + 1 :]
    if type(value) is int and random.random() < 0.5:
        return value + random.choice((-1, 1, 2**31, 2**52))
    return _plain(random)


def _plain(random: Random) -> Any:
    deep: Any = []
    for _ in range(random.choice((1, 62, 63, 64, 70))):
        deep = [deep]
    numbers = (None, True, False, 0, 1, -1, 2**53 - 1, 1.5, 1e21, 5e-324)
    texts = ("", "x", "é", "\0", "sha256:" + "0" * 64, "00" * 32, "A" * 5000, "2026-02-30T00:00:00.000000Z")
    return random.choice((*numbers, *texts, "../../etc/passwd", "/dev/zero", "a//b", [], {}, deep, [[]], {"": {}}))
