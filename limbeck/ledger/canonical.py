"""Canonical bytes and digests: the contract that everything in the ledger is hashed by.

`digest_json(x)` is SHA-256 of the JSON Canonicalization Scheme (RFC 8785) of x, so a digest does not depend on key
order, white space or the machine. Times are written as ISO 8601 text before they come here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from datetime import UTC, datetime
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import rfc8785

_EXACT = 2**53
"""Integers from here on are not exact in JSON."""

DEEPEST = 64
"""Lists and objects that may stand within each other: more is a trap for readers, and nothing here needs it."""

EMPTY = "sha256:" + hashlib.sha256(b"").hexdigest()


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises `rfc8785.CanonicalizationError` for what JSON cannot say exactly
    (NaN, integers beyond 2**53).
    """
    try:
        return _plain(value).encode()
    except (_NotPlainError, UnicodeEncodeError):
        return rfc8785.dumps(value)


class _NotPlainError(Exception):
    """Something that is left to rfc8785: its order of keys, or its refusal."""


def _plain(value: Any) -> str:
    """What most values of a ledger are made of, two to three times as fast as rfc8785, which is all Python: a million
    examples have twenty million of them. Equality with rfc8785 is a law of the tests. Keys in ASCII sort alike in code
    points and in UTF-16 units, which is the order that RFC 8785 demands.
    """
    kind = type(value)
    if kind is str:
        return encode_basestring(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int and -_EXACT < value < _EXACT:
        return str(value)
    if kind is list or kind is tuple:
        return f"[{','.join(map(_plain, value))}]"
    if kind is dict:
        if not all(type(key) is str and key.isascii() for key in value):
            raise _NotPlainError
        return f"{{{','.join(f'{encode_basestring(key)}:{_plain(value[key])}' for key in sorted(value))}}}"
    if kind is float:
        return _float(value)
    raise _NotPlainError


@functools.lru_cache(maxsize=4096)
def _float(value: float) -> str:
    return rfc8785.dumps(value).decode()


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text as evidence has it (docs/ledger-format.md): no key twice, no NaN or infinity, no integer
    from 2^53 on, no half of a surrogate pair, nothing nested too deeply. Raises `ValueError`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text, object_pairs_hook=_each_once, parse_int=_integer, parse_constant=_no_constant)
        if "\\u" in text:  # the one way in which valid text can hold half of a pair
            canonical(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    refuse_deep(value)
    return value


_TOO_DEEP = f"nested too deeply, expected at most {DEEPEST} levels"


def refuse_deep(value: Any) -> None:
    """Raises `ValueError` for lists and objects that stand within each other more than `DEEPEST` deep."""
    level, deep = [value], 0
    while level := [one for one in level if isinstance(one, dict | list | tuple)]:
        deep += 1
        if deep > DEEPEST:
            raise ValueError(_TOO_DEEP)
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]


def exact(value: object) -> bool:
    """Whether a number reads back as it was written: RFC 8785 writes the float 2^53 like an integer, and integers from
    there on are refused, since others than Python round them.
    """
    return isinstance(value, bool) or not isinstance(value, int | float) or not _EXACT <= abs(value) < 1e21


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key that comes twice: {sorted(key for key, _ in pairs)}"[:300])
    return found


def _integer(digits: str) -> int:
    if len(digits) > 17 or not -_EXACT < int(digits) < _EXACT:
        raise ValueError(f"{digits[:40]}, expected an integer below 2^53")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def digest_bytes(data: bytes) -> str:
    """Tagged SHA-256 of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """Tagged SHA-256 of the canonical JSON of a value."""
    return digest_bytes(canonical(value))


def digest_file(path: str | os.PathLike[str]) -> str:
    """Tagged SHA-256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def iso(when: datetime) -> str:
    """A time as the ledger writes it: ISO 8601, UTC, microseconds. Raises `ValueError` where the zone is missing."""
    if when.tzinfo is None:
        raise ValueError("a time in the ledger needs its zone")
    return when.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


CARD = "README.md"
"""A model's card. It is written last, from the ledger, so it is no part of the model's own digest."""


def manifest(root: str | os.PathLike[str]) -> dict[str, str]:
    """Digest of every file under a directory but its card, by path relative to it with forward slashes, sorted."""
    base = Path(root)
    return {
        path.relative_to(base).as_posix(): digest_file(path)
        for path in sorted(base.rglob("*"))
        if path.is_file() and path != base / CARD
    }


def digest_path(path: str | os.PathLike[str]) -> str:
    """Digest of a file, or of a directory's manifest (names and contents; an extra file changes it)."""
    return digest_json(manifest(path)) if os.path.isdir(path) else digest_file(path)
