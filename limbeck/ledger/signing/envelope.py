"""DSSE envelopes (protocol 1.0.2) with one Ed25519 signature, around in-toto statements.

What is signed is one line, `pae`; an envelope that comes from elsewhere is read strictly.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from limbeck.ledger.canonical import canonical, digest_bytes, read_json
from limbeck.records import Digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"

KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Hex of an Ed25519 public key."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Signature(_Strict):
    """One signature."""

    keyid: KeyId
    sig: str


class Envelope(_Strict):
    """A signed statement."""

    payload: str
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    signatures: Annotated[list[Signature], Field(min_length=1, max_length=1)]

    @property
    def keyid(self) -> str:
        """Whose signature it is, once `signed` says that it is one."""
        return self.signatures[0].keyid

    @property
    def sig(self) -> str:
        """The signature, in base64."""
        return self.signatures[0].sig

    @property
    def data(self) -> bytes:
        """The envelope's bytes: what a file of it holds and what is time-stamped."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    @property
    def digest(self) -> Digest:
        """Digest of the envelope's bytes."""
        return digest_bytes(self.data)

    def statement(self) -> JsonValue:
        """What was signed. Raises `ValueError` where its bytes are not canonical JSON."""
        data = unbase64(self.payload)
        value = read_json(data)
        if canonical(value) != data:
            raise ValueError("a payload that is not canonical JSON")
        return value

    def signed(self) -> bool:
        """Whether the signature is that of its key over this payload."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.keyid))
            key.verify(unbase64(self.sig), pae(self.payload_type, unbase64(self.payload)))
        except (InvalidSignature, ValueError):
            return False
        return True


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: type and payload, each with its length in bytes before it."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(statement: JsonValue, key: Ed25519PrivateKey) -> Envelope:
    """Sign the canonical bytes of a statement."""
    from limbeck.ledger.signing.keys import key_id

    payload = canonical(statement)
    sig = base64.b64encode(key.sign(pae(PAYLOAD_TYPE, payload))).decode()
    signature = Signature(keyid=key_id(key), sig=sig)
    return Envelope(payload=base64.b64encode(payload).decode(), payloadType=PAYLOAD_TYPE, signatures=[signature])


def enveloped(statement: JsonValue, keyid: str, sig: str) -> Envelope:
    """An envelope from its parts. Raises `ValueError` for parts of the wrong shape."""
    payload = base64.b64encode(canonical(statement)).decode()
    return Envelope(payload=payload, payloadType=PAYLOAD_TYPE, signatures=[Signature(keyid=keyid, sig=sig)])


def unbase64(text: str) -> bytes:
    """The bytes of canonical base64, and of nothing else. Raises `ValueError`."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError("not base64 in its one form")
    return data
