"""The shapes of the files that strangers check, and what they share: a signed checkpoint as JSON.

docs/ledger-format.md is the contract. Everything here is read strictly; nothing is believed before its signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import canonical, digest_bytes, read_json
from limbeck.ledger.merkle.fields import Version
from limbeck.ledger.merkle.order import LeafSet, leaf_sets
from limbeck.ledger.sealing import refuse_unsealed
from limbeck.ledger.signing.checkpoints import Made, checkpoints
from limbeck.ledger.signing.envelope import Envelope, KeyId, enveloped
from limbeck.ledger.signing.statements import Checkpoint, Examples, refuse_contradictions, refuse_other_form
from limbeck.records import Digest, Entry

Count = Annotated[int, Field(ge=0, lt=2**53)]
_BIGGEST = 2**31
"""Bytes of a file that is read at all; the share of ten million rows has a fifth of it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class SignedRoot(_Strict):
    """A checkpoint's envelope, its payload as JSON."""

    keyid: KeyId
    sig: str
    statement: JsonValue

    @classmethod
    def of(cls, envelope: Envelope) -> SignedRoot:
        """From an envelope. Raises `ValueError` where its payload is not canonical JSON."""
        return cls(keyid=envelope.keyid, sig=envelope.sig, statement=envelope.statement())

    def envelope(self) -> Envelope:
        """As it was signed. Raises `ValueError`."""
        return enveloped(self.statement, self.keyid, self.sig)


class Disclosure(_Strict):
    """One field of one row."""

    form: Literal["limbeck-disclosure/1", "limbeck-disclosure/2"]
    checkpoint: SignedRoot
    row: Count
    field: str
    value: JsonValue
    salt: str
    path: str


class ShareRows(_Strict):
    """A column for each thing that is known of every row."""

    private: str
    salts: str
    class_: list[Count] = Field(alias="class")
    split: list[Literal[0, 1]]
    tokens: list[Count]


class ClassShare(_Strict):
    """What one class comes to, in the split that is trained on."""

    name: str = Field(alias="class")
    rows: Count
    tokens: Count


class ShareDocument(_Strict):
    """The blinded manifest, and what it adds up to."""

    form: Literal["limbeck-share/1", "limbeck-share/2"]
    checkpoint: SignedRoot
    before: list[str]
    classes: list[str]
    rows: ShareRows
    after: list[str]
    shares: list[ClassShare]


class OpenedRow(_Strict):
    """A row that a seed picked, all of it."""

    row: Count
    fields: dict[str, JsonValue]
    salts: str
    request: str | None = None
    response: str | None = None


class SpotCheckDocument(_Strict):
    """The rows that a seed picked."""

    form: Literal["limbeck-spot-check/1", "limbeck-spot-check/2"]
    checkpoint: SignedRoot
    share: Digest
    seed: str
    draws: Annotated[int, Field(ge=1, le=1_000_000)]
    rows: list[OpenedRow]


class ConsistencyDocument(_Strict):
    """That one checkpoint continues another."""

    form: Literal["limbeck-consistency/1"] = "limbeck-consistency/1"
    old: SignedRoot
    new: SignedRoot
    path: str


Document = Disclosure | ShareDocument | SpotCheckDocument | ConsistencyDocument
_FORMS: dict[str, type[Document]] = {
    form: kind
    for kind in (Disclosure, ShareDocument, SpotCheckDocument, ConsistencyDocument)
    for form in get_args(kind.model_fields["form"].annotation)
}


OfLeaves = Disclosure | ShareDocument | SpotCheckDocument
"""Documents that hashes of examples come out of. The number of their form is the version of the leaves."""


def form_of(kind: type[OfLeaves], version: Version) -> Any:
    """What a document of this kind about leaves of a version is called."""
    return get_args(kind.model_fields["form"].annotation)[version - 1]


def version_of(document: OfLeaves) -> Version:
    """The version of the leaves that a document is about."""
    return 1 if document.form.endswith("/1") else 2


def document_bytes(document: Document) -> bytes:
    """Canonical JSON; raw bytes that an owner did not add are left out."""
    return canonical(
        document.model_dump(mode="json", by_alias=True, exclude_none=isinstance(document, SpotCheckDocument))
    )


class ReadDocument(NamedTuple):
    """A file that was read, and the digest of its bytes. A checkpoint is the envelope that was signed."""

    document: Document | Envelope
    digest: Digest


def read_document(path: Path) -> ReadDocument:
    """Read a file for strangers, strictly. Raises `InputError` with what is wrong about its shape."""
    remedy = "give a file that `limbeck ledger disclose`, `share`, `spot-check`, `consistency` or `checkpoint` wrote"
    try:
        if path.stat().st_size > _BIGGEST:
            raise ValueError(f"{path.stat().st_size} bytes")
        data = path.read_bytes().removesuffix(b"\n")  # what came through a terminal's pipe
        value = read_json(data)
        told = value if isinstance(value, dict) else {}
        kind = Envelope if "payloadType" in told else _FORMS.get(str(told.get("form")))
        if kind is None:
            raise ValueError(f"no form of {', '.join(_FORMS)}, and no signed checkpoint")
        document = kind.model_validate_json(data)
        if (document.data if isinstance(document, Envelope) else document_bytes(document)) != data:
            raise ValueError("bytes that are not canonical JSON (RFC 8785)")
    except ValidationError as error:
        problems = [
            Problem(f"{path}: {'.'.join(map(str, e['loc']))}", repr(e["input"])[:80], e["msg"], remedy)
            for e in error.errors()[:20]
        ]
        raise InputError("a proof of another shape", problems) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("no proof", [Problem(str(path), str(error)[:200], "a proof", remedy)]) from None
    return ReadDocument(document, digest_bytes(data))


class Covered(NamedTuple):
    """A checkpoint over the examples, and the set it is about."""

    made: Made
    found: LeafSet

    @property
    def size(self) -> int:
        """Leaves of the tree that was signed."""
        return self.made.statement.predicate.size

    def as_json(self) -> SignedRoot:
        """For a document."""
        return SignedRoot.of(self.made.envelope)


def covering(run: Path, entries: Sequence[Entry], *, shortest: bool = False) -> Covered:
    """The latest checkpoint over the examples that the run has now, or the one with the shortest statement, so that a
    disclosure stays small. Raises `InputError` where there is none.
    """
    sets = leaf_sets(entries)
    refuse_unsealed(run, sets)
    made = [m for m in checkpoints(entries) if m.entry.index > sets[-1].entry.index]
    if not made:
        found = "no checkpoint since the examples were sealed"
        problem = Problem(str(run / "ledger.db"), found, "a signed one", "sign it: limbeck ledger checkpoint RUN")
        raise InputError("nothing signed covers the examples", [problem])
    return Covered(min(made, key=lambda m: len(m.envelope.payload)) if shortest else made[-1], sets[-1])


class CheckedRoot(NamedTuple):
    """A checkpoint's statement whose signature is right, and its examples."""

    statement: Checkpoint
    examples: Examples
    keyid: str

    @property
    def size(self) -> int:
        """Leaves of the tree."""
        return self.statement.predicate.size


def checked_root(signed: SignedRoot) -> CheckedRoot:
    """The statement, once its signature and form are right, and its examples. Raises `ValueError`."""
    statement = signed_statement(signed)
    examples = statement.predicate.examples
    if examples is None or examples.first + examples.count > statement.predicate.size:
        raise ValueError("the checkpoint covers no examples")
    return CheckedRoot(statement, examples, signed.keyid)


def signed_statement(signed: SignedRoot) -> Checkpoint:
    """The statement of a checkpoint, once its signature and form are right. Raises `ValueError`."""
    if not signed.envelope().signed():
        raise ValueError(f"the checkpoint's signature is not one by {signed.keyid}")
    statement = Checkpoint.model_validate(signed.statement)
    refuse_other_form(statement, signed.statement)
    refuse_contradictions(statement)
    _ = statement.root  # raises where it is about something else
    return statement


def read_checkpoint(path: Path) -> Envelope:
    """A checkpoint that was kept in a file. Raises `InputError` where it is none, or its signature does not hold."""
    try:
        envelope = Envelope.model_validate_json(path.read_bytes())
        signed_statement(SignedRoot.of(envelope))
    except (OSError, ValueError, RecursionError) as error:
        remedy = "give a file that `limbeck ledger checkpoint RUN --out FILE` wrote"
        found = " ".join(str(error).split())[:300]
        raise InputError("no checkpoint", [Problem(str(path), found, "a signed checkpoint", remedy)]) from None
    return envelope
