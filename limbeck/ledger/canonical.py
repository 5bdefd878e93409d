"""Canonical bytes and digests: the contract that everything in the ledger is hashed by.

`digest_json(x)` is SHA-256 of the JSON Canonicalization Scheme (RFC 8785) of x, so a digest does not depend on key
order, white space or the machine. Times are written as ISO 8601 text before they come here.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rfc8785

EMPTY = "sha256:" + hashlib.sha256(b"").hexdigest()


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value. Raises `rfc8785.CanonicalizationError` for what JSON cannot say exactly
    (NaN, integers beyond 2**53).
    """
    return rfc8785.dumps(value)


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
