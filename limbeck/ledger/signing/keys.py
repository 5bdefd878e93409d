"""The signing key and the salts' secret. They lie in the user's configuration directory, never in RUN: a RUN directory
can be handed to anybody without them.

    $LIMBECK_HOME, else $XDG_CONFIG_HOME/limbeck, else ~/.config/limbeck
        signing-key.pem   Ed25519, PKCS #8
        secret            32 random bytes; salts are derived from it (limbeck.ledger.merkle.salts)

Both are made on first use, readable by their owner only, whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.errors import InputError, Problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_KEY, _SECRET, _SECRET_BYTES = "signing-key.pem", "secret", 32


def home() -> Path:
    """Where keys lie."""
    if own := os.environ.get("LIMBECK_HOME"):
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "limbeck"


def secret() -> bytes:
    """The salts' secret, made if there is none. Raises `InputError`."""
    path = home() / _SECRET
    data = _read_or_make(path, lambda: secrets.token_bytes(_SECRET_BYTES))
    if len(data) != _SECRET_BYTES:
        raise _unfit(path, f"{len(data)} bytes", f"{_SECRET_BYTES} bytes")
    return data


def find_secret() -> bytes | None:
    """The salts' secret, if this machine has one that can be read; makes none."""
    try:
        return (home() / _SECRET).read_bytes()
    except OSError:
        return None


def signing_key() -> Ed25519PrivateKey:
    """The key that signs, made if there is none. Raises `InputError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = home() / _KEY
    data = _read_or_make(path, _new_key)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unfit(path, str(error), "an Ed25519 key, PKCS #8 PEM, without a password") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _unfit(path, type(key).__name__, "an Ed25519 key")
    return key


def key_id(key: Ed25519PrivateKey) -> str:
    """Hex of the 32 bytes of the public key."""
    return key.public_key().public_bytes_raw().hex()


def _new_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _read_or_make(path: Path, make: Callable[[], bytes]) -> bytes:
    try:
        if not path.exists():
            _write_once(path, make())
        if path.stat().st_mode & 0o077:
            raise _unfit(path, f"permissions {path.stat().st_mode & 0o777:o}: others may read it", "permissions 600")
        return path.read_bytes()
    except OSError as error:
        raise _unfit(path, error.strerror or str(error), "a file that only you can read and write") from None


def _write_once(path: Path, data: bytes) -> None:
    """Of two processes that make it at the same time, one wins, and both read the same."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, half = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with permissions 600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(half, path)
    finally:
        os.unlink(half)


def _unfit(path: Path, found: str, expected: str) -> InputError:
    remedy = f"chmod 600 {path}, put back a copy of it, or set LIMBECK_HOME to another directory"
    return InputError("the key cannot be used", [Problem(str(path), found, expected, remedy)])
