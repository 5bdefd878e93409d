"""RFC 3161: an authority's word that a checkpoint existed at a time. Asking for it is left to the user (`openssl ts
-query`, and the authority's own way of sending); what comes back is kept in the ledger.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue

from limbeck.errors import InputError, Problem
from limbeck.ledger.signing.checkpoints import Made, checkpoints
from limbeck.ledger.signing.envelope import unbase64
from limbeck.records import Digest, Entry

if TYPE_CHECKING:
    from cryptography.x509 import Certificate
    from rfc3161_client import TimeStampResponse

    from limbeck.ledger.store import Ledger

STAGE = "timestamp"
_HASHES = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
_GRANTED = bytes.fromhex("3003020100")
"""DER of a PKIStatusInfo that says granted: what a bare token lacks to be a response."""


class TimestampFact(BaseModel):
    """The facts of a time-stamp's entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    checkpoint: Digest
    response: str


class Stamp(NamedTuple):
    """A time-stamp, parsed."""

    response: bytes
    """DER of the TimeStampResp."""
    at: datetime
    algorithm: str
    imprint: bytes

    def covers(self, data: bytes) -> bool:
        """Whether it is of these bytes."""
        return hashlib.new(self.algorithm, data).digest() == self.imprint


def parse_stamp(data: bytes) -> Stamp:
    """Read a response, or a bare token. Raises `ValueError`."""
    try:
        found = _decode(data)
    except ValueError:
        data = _der_sequence(_GRANTED + data)
        found = _decode(data)
    if found.status > 1:
        raise ValueError(f"a refusal of the authority (status {found.status}: {' '.join(found.status_string)})")
    imprint = found.tst_info.message_imprint
    algorithm = _HASHES.get(imprint.hash_algorithm.dotted_string)
    if algorithm is None:
        raise ValueError(
            f"a message imprint by {imprint.hash_algorithm.dotted_string}, not SHA-256, SHA-384 or SHA-512"
        )
    return Stamp(data, found.tst_info.gen_time.astimezone(UTC), algorithm, bytes(imprint.message))


def vouched(stamp: Stamp, authorities: Sequence[Certificate]) -> str | None:
    """What speaks against the signature on a time-stamp, or None if one of the authorities' certificates vouches for
    it. Certificates have to be valid at the time of the stamp, not today.
    """
    from rfc3161_client import VerificationError, VerifierBuilder

    builder = VerifierBuilder(roots=list(authorities))
    try:
        builder.build().verify(_decode(stamp.response), stamp.imprint)
    except (VerificationError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    return None


def read_authorities(path: Path) -> list[Certificate]:
    """Root certificates from a PEM file. Raises `InputError`."""
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = "give the authority's root certificate as PEM"
        raise InputError("no certificates", [Problem(str(path), str(error), "certificates in PEM", remedy)]) from None


def attach(ledger: Ledger, path: Path, authorities: Sequence[Certificate] = ()) -> tuple[Made, Stamp]:
    """Add the time-stamp in a file to the ledger, for the checkpoint it is of.

    Raises `InputError` where the file holds no time-stamp, or one of something else, or none of the authorities (if any
    are given) vouches for it.
    """
    try:
        stamp = parse_stamp(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = "give the file that the authority sent back: a TimeStampResp or a TimeStampToken in DER"
        problem = Problem(str(path), str(error)[:300], "an RFC 3161 time-stamp", remedy)
        raise InputError("no time-stamp", [problem]) from None
    entries = ledger.entries()
    made = list(checkpoints(entries))
    covered = next((one for one in reversed(made) if stamp.covers(one.envelope.data)), None)
    if covered is None:
        due = ", ".join(hashlib.new(stamp.algorithm, one.envelope.data).hexdigest() for one in made) or "a checkpoint"
        remedy = "write the checkpoint with --out FILE, and have the bytes of that file stamped"
        problem = Problem(
            f"{path}: message imprint", stamp.imprint.hex(), f"{stamp.algorithm} of one of: {due}", remedy
        )
        raise InputError("a time-stamp of something else", [problem])
    if authorities and (why := vouched(stamp, authorities)):
        problem = Problem(str(path), why, "a signature that leads to the authority", "check --authority")
        raise InputError("a time-stamp that the authority does not vouch for", [problem])
    if not any(known == stamp.response for known in _responses(entries)):
        _append(ledger, covered, stamp)
    return covered, stamp


def _responses(entries: Sequence[Entry]) -> list[bytes]:
    facts = [TimestampFact.model_validate(entry.facts) for entry in entries if entry.stage == STAGE]
    return [unbase64(fact.response) for fact in facts]


def _append(ledger: Ledger, covered: Made, stamp: Stamp) -> None:
    facts: dict[str, JsonValue] = {
        "checkpoint": covered.envelope.digest,
        "response": base64.b64encode(stamp.response).decode(),
    }
    started = datetime.now(UTC)
    ledger.append(stage=STAGE, started=started, inputs={}, outputs={}, recipe=covered.entry.recipe, facts=facts)


def _decode(data: bytes) -> TimeStampResponse:
    from rfc3161_client import decode_timestamp_response

    return decode_timestamp_response(data)


def _der_sequence(content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([0x30, length]) + content
    size = (length.bit_length() + 7) // 8
    return bytes([0x30, 0x80 | size]) + length.to_bytes(size, "big") + content
