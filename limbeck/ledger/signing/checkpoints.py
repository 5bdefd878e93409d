"""Checkpoints: signed roots at the moments that matter, and by hand.

A checkpoint is an entry of its own, so it is in the chain, and its leaf is covered by the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, JsonValue

from limbeck.ledger.merkle.fields import field_digest
from limbeck.ledger.merkle.order import leaf_sets
from limbeck.ledger.sealing import salts_for
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.ledger.signing.keys import signing_key
from limbeck.ledger.signing.statements import (
    WEIGHTS,
    Checkpoint,
    CheckpointPredicate,
    Examples,
    Kind,
    Subject,
    ledger_subject,
    now,
    refuse_other_form,
    subject,
)
from limbeck.ledger.store import Ledger
from limbeck.recipe import Recipe
from limbeck.records import Entry
from limbeck.seeds import derive_seed

STAGE = "checkpoint"
SIGNED = (STAGE, "timestamp", "note")
"""Entries that no stage of a run wrote."""


class Made(NamedTuple):
    """A checkpoint in a ledger, parsed; nothing about it is checked but its form."""

    entry: Entry
    envelope: Envelope
    statement: Checkpoint


class EnvelopeFact(BaseModel):
    """The facts of an entry that holds an envelope."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    envelope: Envelope


def checkpoints(entries: Sequence[Entry]) -> Iterator[Made]:
    """All checkpoints, oldest first. Raises `ValueError` for a malformed one."""
    return (parse_checkpoint(entry) for entry in entries if entry.stage == STAGE)


def parse_checkpoint(entry: Entry) -> Made:
    """The checkpoint of an entry. Raises `ValueError` where it is malformed."""
    envelope = EnvelopeFact.model_validate(entry.facts).envelope
    said = envelope.statement()
    statement = Checkpoint.model_validate(said)
    refuse_other_form(statement, said)
    return Made(entry, envelope, statement)


def sign_if_due(ledger: Ledger, kind: Kind, recipe: Recipe, stages: Sequence[str]) -> None:
    """Sign the moment after `stages`, unless nothing they wrote is newer than the last such checkpoint."""
    entries = ledger.entries()
    newest = max((e.index for e in entries if e.stage in stages), default=-1)
    signed = max((m.entry.index for m in checkpoints(entries) if m.statement.predicate.kind == kind), default=-1)
    if newest > signed:
        sign_checkpoint(ledger, kind, recipe)


def sign_checkpoint(ledger: Ledger, kind: Kind, recipe: Recipe) -> Made:
    """Sign the root over everything that is in the ledger now.

    Raises:
        InputError: the signing key cannot be used, or the secret is not the one that sealed the examples.
    """
    started, entries = datetime.now(UTC), ledger.entries()
    sets = leaf_sets(entries)
    intended = kind == "training-intended"
    predicate = CheckpointPredicate(
        at=now(),
        kind=kind,
        size=ledger.tree.size,
        examples=Examples(count=sets[-1].fact.count, first=sets[-1].first) if sets else None,
        recipe=recipe.digest.removeprefix("sha256:") if intended else None,
        order=order_commitment(recipe, salts_for(sets[-1]).order()) if intended else None,
    )
    about = [ledger_subject(ledger.tree.root()), *(weights(entries) if kind == "training-done" else ())]
    envelope = sign(Checkpoint(subject=about, predicate=predicate).value(), signing_key())
    return parse_checkpoint(append_signed(ledger, STAGE, started, recipe, envelope))


def append_signed(ledger: Ledger, stage: str, started: datetime, recipe: Recipe, envelope: Envelope) -> Entry:
    """Add an envelope to the ledger."""
    facts: dict[str, JsonValue] = {"envelope": envelope.model_dump(mode="json", by_alias=True)}
    return ledger.append(stage=stage, started=started, inputs={}, outputs={}, recipe=recipe.digest, facts=facts)


def order_commitment(recipe: Recipe, salt: bytes) -> str:
    """Hex of the commitment to the seed of the data's order. The seed is text: JSON has no exact 63-bit integers."""
    seed = derive_seed(recipe.seed, "train", "order")
    return field_digest("order_seed", salt, f'"{seed}"'.encode()).hex()


def weights(entries: Sequence[Entry]) -> list[Subject]:
    """The files of the student's weights, as the latest entry of the training has them."""
    facts = next((entry.facts for entry in reversed(entries) if entry.stage == "train"), {})
    manifests = facts.get("manifests")
    files = manifests.get("student") if isinstance(manifests, dict) else None
    return [
        subject(f"student/{name}", str(digest).removeprefix("sha256:"))
        for name, digest in sorted(files.items() if isinstance(files, dict) else ())
        if name.endswith(WEIGHTS)
    ]


def worth_signing(entries: Sequence[Entry]) -> bool:
    """Whether anything was recorded since the last checkpoint, besides checkpoints and time-stamps."""
    for entry in reversed(entries):
        if entry.stage == STAGE:
            return False
        if entry.stage != "timestamp":
            return True
    return False
