"""Checks of what is signed: checkpoints, notes and time-stamps, against the tree and against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from limbeck.errors import InputError, Problem
from limbeck.ledger.merkle.order import LeafSet
from limbeck.ledger.merkle.tree import Hash
from limbeck.ledger.signing import checkpoints, notes, timestamps
from limbeck.ledger.signing.checkpoints import Made, weights
from limbeck.ledger.signing.envelope import Envelope, unbase64
from limbeck.ledger.signing.notes import Noted
from limbeck.records import Digest, Entry

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_FORGED = "it was not signed like this, or was changed since; compare with a copy kept elsewhere"

_HEAD = re.compile("sha256:[0-9a-f]{64}")
_KEY = re.compile("[0-9a-f]{64}")

NOTE_UNSIGNED = (
    "unsigned and unanchored: this can show that RUN agrees with itself; whoever could write to it could "
    "also have written all of it anew. Keep the head digest where the writer cannot reach it"
)
NOTE_UNANCHORED = (
    "unanchored: checkpoints are signed, but nothing outside says when; whoever holds the key could have written all "
    "of it anew. Publish a checkpoint, or have it time-stamped (`limbeck ledger checkpoint RUN --timestamp FILE`)"
)


class Against(NamedTuple):
    """What a verification is given besides RUN."""

    head: Digest | None = None
    key: str | None = None
    """Hex of the public key that has to have signed."""
    salts: bytes | None = None
    authorities: Sequence[Certificate] = ()


def refuse_malformed(head: str | None = None, key: str | None = None) -> None:
    """What was mistyped would else look like a ledger that was written anew. Raises `InputError` with all of it."""
    problems = []
    if head is not None and not _HEAD.fullmatch(head):
        remedy = "give the head that `limbeck ledger verify` ended with"
        problems.append(Problem("--head", repr(head), "sha256: and 64 hexadecimal digits in lower case", remedy))
    if key is not None and not _KEY.fullmatch(key):
        remedy = "give the key that `limbeck ledger checkpoint` shows"
        problems.append(Problem("--key", repr(key), "64 hexadecimal digits in lower case", remedy))
    if problems:
        raise InputError("nothing that anything could be compared with", problems)


@dataclass
class Signed:
    """What the signatures of a ledger came to."""

    problems: list[Problem] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    noted: list[Noted] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    anchors: list[tuple[Made, datetime]] = field(default_factory=list)
    """Checkpoints that a given authority vouches for, and since when."""
    unchecked: list[tuple[Made, datetime]] = field(default_factory=list)
    """Time-stamps of authorities that were not given."""


def check_signed(
    entries: Sequence[Entry],
    roots: Mapping[int, Hash],
    sets: Sequence[LeafSet] | None,
    against: Against,
) -> Signed:
    """Check every signature, what was signed, and every time-stamp. `roots` are those of the tree where an entry
    begins; none are compared where the tree itself is broken. Where `sets` are unknown, only signatures are checked.
    """
    known = Signed()
    for entry, size in zip(entries, _sizes(entries, sets or ()), strict=True):
        where = f"ledger.db: entry {entry.index} ({entry.stage})"
        try:
            if entry.stage == checkpoints.STAGE:
                made = checkpoints.parse_checkpoint(entry)
                known.made.append(made)
                known.problems += _checkpoint(where, made, entries, sets) if sets is not None else ()
            elif entry.stage == notes.STAGE:
                made = notes.parse_note(entry)
                known.noted.append(made)
            elif entry.stage == timestamps.STAGE:
                _timestamp(where, entry, known, against)
                continue
            else:
                continue
            known.problems += _signature(where, made.envelope, against.key)
            known.keys.add(made.envelope.keyid)
            known.problems += _root(where, made, size, roots) if sets is not None else ()
        except (ValueError, RecursionError) as error:
            found = " ".join(str(error).split())[:300]
            known.problems.append(Problem(where, found, f"a {entry.stage} of version 1", _FORGED))
    if against.key and not known.made:
        known.problems.append(Problem("ledger.db", "no checkpoint", f"one signed by {against.key}", _FORGED))
    return known


def _sizes(entries: Sequence[Entry], sets: Sequence[LeafSet]) -> Iterator[int]:
    """Leaves before each entry."""
    counts = {s.entry.index: s.fact.count for s in sets}
    place = 0
    for entry in entries:
        yield place
        place += counts.get(entry.index, 0) + 1


def _signature(where: str, envelope: Envelope, key: str | None) -> Iterator[Problem]:
    if not envelope.signed():
        yield Problem(f"{where}: signature", envelope.sig, f"a signature by {envelope.keyid}", _FORGED)
    if key is not None and envelope.keyid != key:
        yield Problem(f"{where}: key", envelope.keyid, key, "ask who holds that key, or check --key")


def _root(where: str, made: Made | Noted, size: int, roots: Mapping[int, Hash]) -> Iterator[Problem]:
    said = made.statement.predicate.size
    if said != size:
        yield Problem(f"{where}: size", str(said), f"{size}, the leaves before it", _FORGED)
    elif size in roots and roots[size] != made.statement.root:
        found = f"{roots[size].hex()} over the first {size} leaves now"
        yield Problem(f"{where}: root", found, f"{made.statement.root.hex()}, as it was signed", _FORGED)


def _checkpoint(where: str, made: Made, entries: Sequence[Entry], sets: Sequence[LeafSet]) -> Iterator[Problem]:
    told, index = made.statement.predicate, made.entry.index
    before = [s for s in sets if s.entry.index < index]
    due = (before[-1].fact.count, before[-1].first) if before else None
    said = (told.examples.count, told.examples.first) if told.examples else None
    if said != due:
        yield Problem(f"{where}: examples (count, first)", str(said), f"{due}, by the seal before it", _FORGED)
    intended = told.kind == "training-intended"
    recipe = made.entry.recipe.removeprefix("sha256:") if intended else None
    if told.recipe != recipe:
        yield Problem(f"{where}: recipe", str(told.recipe), str(recipe), _FORGED)
    if (told.order is not None) != intended:
        yield Problem(f"{where}: order", str(told.order), "a commitment" if intended else "None", _FORGED)
    found = [f"{s.name} {s.digest.sha256}" for s in made.statement.subject[1:]]
    owed = [f"{s.name} {s.digest.sha256}" for s in weights(entries[:index])] if told.kind == "training-done" else []
    if found != owed:
        expected = f"{', '.join(owed) or 'none'}, as the training wrote them"
        yield Problem(f"{where}: weights", ", ".join(found) or "none", expected, _FORGED)


def _timestamp(where: str, entry: Entry, known: Signed, against: Against) -> None:
    fact = timestamps.TimestampFact.model_validate(entry.facts)
    stamp = timestamps.parse_stamp(unbase64(fact.response))
    covered = next((made for made in known.made if made.envelope.digest == fact.checkpoint), None)
    if covered is None:
        known.problems.append(Problem(f"{where}: checkpoint", fact.checkpoint, "a checkpoint before it", _FORGED))
    elif not stamp.covers(covered.envelope.data):
        expected = f"{stamp.algorithm} of checkpoint {covered.envelope.digest}"
        known.problems.append(Problem(f"{where}: message imprint", stamp.imprint.hex(), expected, _FORGED))
    elif not against.authorities:
        known.unchecked.append((covered, stamp.at))
    elif why := timestamps.vouched(stamp, against.authorities):
        expected = "a signature that leads to the authority that was given"
        known.problems.append(Problem(f"{where}: authority", why, expected, "check --authority"))
    else:
        known.anchors.append((covered, stamp.at))


def order_problems(made: Sequence[Made], due: str, last_set: LeafSet) -> list[Problem]:
    """Commitments to the data's order that do not open to the recipe's seed. Only of checkpoints over the latest set,
    whose salts are at hand.
    """
    return [
        Problem(f"ledger.db: entry {m.entry.index} (checkpoint): order", str(m.statement.predicate.order), due, _FORGED)
        for m in made
        if m.statement.predicate.kind == "training-intended"
        and m.entry.index > last_set.entry.index
        and m.statement.predicate.order != due
    ]


def signed_notes(known: Signed, entries: Sequence[Entry], against: Against) -> list[str]:
    """What a reader has to know of the signatures."""
    told: list[str] = []
    if not known.made:
        told += [] if against.head else [NOTE_UNSIGNED]
    elif not known.anchors:
        told.append(NOTE_UNANCHORED)
    told += [
        f"anchored: the checkpoint of entry {made.entry.index} ({made.statement.predicate.kind}) existed by {_when(at)}"
        ", says the authority whose certificate was given; entries after it are not covered by that"
        for made, at in known.anchors
    ]
    told += [
        f"a time-stamp of {_when(at)} on the checkpoint of entry {made.entry.index} was not checked against its "
        "authority: give --authority FILE"
        for made, at in known.unchecked
    ]
    if known.made:
        told.append(f"signed by {', '.join(sorted(known.keys))}; whose key that is, no file can say")
        last = known.made[-1].entry.index
        after = [e for e in entries[last + 1 :] if e.stage not in checkpoints.SIGNED]
        if after:
            names = ", ".join(f"{e.stage} (entry {e.index})" for e in after)
            told.append(f"newer than the last checkpoint, so signed by nobody: {names}")
    return told


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S}Z"
