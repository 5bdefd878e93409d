"""Salts of an example's fields, from one secret by HKDF (RFC 5869, SHA-256).

The key of one set of leaves (`PRK`) is extracted with a nonce that stands in the ledger; it can be handed to somebody
who is to check that set, and gives away neither the secret nor any other set's salts.
"""

from __future__ import annotations

import functools
import hmac
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.ledger.canonical import digest_bytes
from limbeck.records import Digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

SALT = 16
"""Bytes of a salt: 128 bits."""
_ROW = b"limbeck/salts/1"


class Salts:
    """The salts of one set of leaves."""

    def __init__(self, key: bytes):
        self.key = key
        """PRK, 32 bytes."""

    @classmethod
    def of(cls, secret: bytes, nonce: bytes) -> Salts:
        """HKDF-Extract with the set's nonce."""
        return cls(hmac.digest(nonce, secret, "sha256"))

    @property
    def id(self) -> Digest:
        """Names the key without giving it away."""
        return digest_bytes(b"limbeck/salts-id/1" + self.key)

    def row(self, row: int, count: int) -> list[bytes]:
        """The salts of a row's `count` fields, in the order of the fields."""
        data = expand(self.key, _ROW + row.to_bytes(8, "big"), SALT * count)
        return [data[i : i + SALT] for i in range(0, len(data), SALT)]

    def rows(self, first: int, rows: int, count: int) -> Iterator[bytes]:
        """The same of each of so many rows, one after the other."""
        (kind, hash_), key, length = _hkdf(), self.key, SALT * count
        return (kind(hash_, length, _ROW + row.to_bytes(8, "big")).derive(key) for row in range(first, first + rows))

    def order(self) -> bytes:
        """The salt of the commitment to the seed of the data's order."""
        return expand(self.key, b"limbeck/order/1", SALT)


def expand(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256."""
    kind, hash_ = _hkdf()
    return kind(hash_, length, info).derive(key)


@functools.cache
def _hkdf() -> tuple[type[HKDFExpand], SHA256]:
    """Imported when first used: an import statement for each of a million rows would take a second."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    return HKDFExpand, SHA256()
