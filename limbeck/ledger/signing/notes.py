"""Signed notes: what a reviewer says of a run, about the root that the reviewer saw."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import digest_json
from limbeck.ledger.signing.checkpoints import EnvelopeFact, append_signed
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.ledger.signing.keys import signing_key
from limbeck.ledger.signing.statements import Note, NotePredicate, ledger_subject, now, refuse_other_form
from limbeck.ledger.store import Ledger, entry_digest
from limbeck.recipe import Recipe
from limbeck.records import Digest, Entry

STAGE = "note"
LONGEST = 10_000
"""Characters."""


class Noted(NamedTuple):
    """A note in a ledger, parsed; nothing about it is checked but its form."""

    entry: Entry
    envelope: Envelope
    statement: Note


def sign_note(ledger: Ledger, text: str, by: str | None, recipe: Recipe) -> Noted:
    """Sign a note on everything that is in the ledger now. Raises `InputError` for a text that is empty or too long."""
    if not text.strip() or len(text) > LONGEST:
        remedy = "shorten it" if text.strip() else "say in words what is to be kept"
        problem = Problem("the note", f"{len(text)} characters", f"1 to {LONGEST}, not only white space", remedy)
        raise InputError("no note", [problem])
    started = datetime.now(UTC)
    predicate = NotePredicate(at=now(), by=by, size=ledger.tree.size, text=text)
    statement = Note(subject=[ledger_subject(ledger.tree.root())], predicate=predicate)
    return parse_note(append_signed(ledger, STAGE, started, recipe, sign(statement.value(), signing_key())))


def parse_note(entry: Entry) -> Noted:
    """The note of an entry. Raises `ValueError` where it is malformed."""
    envelope = EnvelopeFact.model_validate(entry.facts).envelope
    said = envelope.statement()
    statement = Note.model_validate(said)
    refuse_other_form(statement, said)
    return Noted(entry, envelope, statement)


def notes_digest(entries: Sequence[Entry]) -> Digest | None:
    """Stands for all notes; None where there are none. What shows them has it among its inputs."""
    found = [entry_digest(entry) for entry in entries if entry.stage == STAGE]
    return digest_json(found) if found else None


INPUT = "ledger:notes"
"""The name of that input."""


def notes(entries: Sequence[Entry]) -> list[Noted]:
    """All notes, oldest first. Raises `ValueError` for a malformed one."""
    return [parse_note(entry) for entry in entries if entry.stage == STAGE]
