"""What is signed: in-toto statements about the ledger's root, as checkpoints and as notes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

STATEMENT = "https://in-toto.io/Statement/v1"
CHECKPOINT = "urn:x-limbeck:checkpoint:1"
NOTE = "urn:x-limbeck:note:1"

WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Ends of the names of files with weights."""

Kind = Literal["collection-closed", "training-intended", "training-done", "by-hand"]
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class _Sha256(_Strict):
    sha256: Hex


class Subject(_Strict):
    """Something a statement is about, by name and digest."""

    name: str
    digest: _Sha256


class Examples(_Strict):
    """The leaves of a set of examples, by their place in the tree."""

    count: Count
    first: Count


class CheckpointPredicate(_Strict):
    """What a checkpoint says besides the root."""

    at: Moment
    kind: Kind
    size: Count
    examples: Examples | None
    recipe: Hex | None = None
    order: Hex | None = None


class NotePredicate(_Strict):
    """A note."""

    at: Moment
    by: str | None
    size: Count
    text: str


class _Statement(_Strict):
    kind: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT, alias="_type")
    subject: Annotated[list[Subject], Field(min_length=1)]

    @property
    def root(self) -> bytes:
        """The ledger's root. Raises `ValueError` where the statement is about something else."""
        if self.subject[0].name != "ledger":
            raise ValueError(f"a statement about {self.subject[0].name}, not about a ledger")
        return bytes.fromhex(self.subject[0].digest.sha256)

    def value(self) -> JsonValue:
        """As it is signed: a key that does not apply is left out, but for those that may be null."""
        value = self.model_dump(mode="json", by_alias=True)
        predicate = value["predicate"]
        for name in ("recipe", "order"):
            if predicate.get(name, "") is None:
                del predicate[name]
        return value


def refuse_other_form(statement: _Statement, said: JsonValue) -> None:
    """Raises `ValueError` where a statement was signed in another form than it would be written in now, such as with
    keys that are null.
    """
    if statement.value() != said:
        raise ValueError("a statement with keys that do not apply to it")


def refuse_contradictions(statement: Checkpoint) -> None:
    """Raises `ValueError` for a checkpoint that cannot be one, whatever ledger it is of: its kind demands other keys or
    subjects, or it has more examples than leaves.
    """
    said = statement.predicate
    intended = said.kind == "training-intended"
    for name, value in (("recipe", said.recipe), ("order", said.order)):
        if (value is not None) != intended:
            raise ValueError(f"{name}: {value}, expected {'a digest' if intended else 'none'} for {said.kind}")
    if said.examples and said.examples.first + said.examples.count > said.size:
        raise ValueError(f"examples: {said.examples.count} from leaf {said.examples.first} on, of {said.size} leaves")
    names = [one.name for one in statement.subject[1:]]
    if names and said.kind != "training-done":
        raise ValueError(f"subject: {names[0]}, expected none but the ledger for {said.kind}")
    if names != sorted(set(names)):
        raise ValueError(f"subject: {', '.join(names)}, expected files sorted by path, each once")
    for name in names:
        if not name.startswith("student/") or not name.endswith(WEIGHTS):
            raise ValueError(f"subject: {name}, expected a file of student/ that ends in one of {', '.join(WEIGHTS)}")


class Checkpoint(_Statement):
    """A signed root."""

    predicate: CheckpointPredicate
    predicate_type: Literal["urn:x-limbeck:checkpoint:1"] = Field(default=CHECKPOINT, alias="predicateType")


class Note(_Statement):
    """A reviewer's words on a ledger."""

    predicate: NotePredicate
    predicate_type: Literal["urn:x-limbeck:note:1"] = Field(default=NOTE, alias="predicateType")


def ledger_subject(root: bytes) -> Subject:
    """The ledger's root as a subject."""
    return subject("ledger", root.hex())


def subject(name: str, digest: str) -> Subject:
    """A file by the hex of its SHA-256."""
    return Subject(name=name, digest=_Sha256(sha256=digest))


def now() -> str:
    """The clock, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
