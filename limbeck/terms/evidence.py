"""What a ledger says of the gate, checked: every token, the set that it is bound to, and every waiver that let
something through. Needs no torch and no register: what terms say today is not asked.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from limbeck.errors import Problem
from limbeck.ledger.merkle.fields import whole_number
from limbeck.ledger.merkle.order import LeafSet
from limbeck.ledger.merkle.tree import node_hash, root
from limbeck.ledger.signing.envelope import Envelope
from limbeck.records import Entry
from limbeck.terms.rulings import GATE
from limbeck.terms.token import hex_of, parse_token
from limbeck.terms.waivers import parse_waiver

_FORGED = "it was not issued like this, or was changed since; compare with a copy kept elsewhere"
_HASH = 32


class GateFact(BaseModel):
    """The fact `gate` of an entry of the stage `gate`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Annotated[Literal[1], BeforeValidator(whole_number)]
    token: Envelope
    waivers: list[Envelope]


def gate_problems(entries: Sequence[Entry], sets: Sequence[LeafSet] | None, latest: bytes) -> list[Problem]:
    """Every token and waiver that is not what it has to be. `latest` are the leaves of the latest set, one hash after
    the other, which the token after it is held against; nothing where the tree itself is broken.
    """
    found: list[Problem] = []
    for entry in entries:
        if entry.stage != GATE:
            continue
        where = f"ledger.db: entry {entry.index} (gate)"
        try:
            found += _entry(where, entry, entries, sets, latest)
        except (ValueError, RecursionError) as error:
            told = " ".join(str(error).split())[:300]
            found.append(Problem(where, told, "a token of the gate, version 1", _FORGED))
    return found


def _entry(
    where: str, entry: Entry, entries: Sequence[Entry], sets: Sequence[LeafSet] | None, latest: bytes
) -> Iterator[Problem]:
    fact = GateFact.model_validate(entry.facts.get("gate"))
    token, key = parse_token(fact.token), fact.token.keyid
    said, waivers = token.predicate, [parse_waiver(one) for one in fact.waivers]
    if not fact.token.signed():
        yield Problem(f"{where}: signature", fact.token.sig, f"a signature by {key}", _FORGED)
    before = [s for s in sets or () if s.entry.index < entry.index]
    pairs: list[tuple[str, object, object]] = [
        ("recipe", said.recipe, hex_of(entry.recipe)),
        ("waivers", said.waivers, [hex_of(waiver.digest) for waiver in waivers]),
        ("verdict", said.verdict, "waived" if waivers else "allowed"),
    ]
    if sets is not None:
        pairs.append(("count", said.count, before[-1].fact.count if before else None))
        if before and latest and before[-1] is sets[-1]:
            pairs.append(("set", token.root, _root(latest).hex()))
    for name, found, due in pairs:
        if found != due:
            yield Problem(f"{where}: {name}", str(found), str(due), _FORGED)
    days = [entry.started.date(), *_trained(entry, entries)]
    for waiver in waivers:
        told = f"{where}: waiver by {waiver.said.by}"
        if waiver.said.use != said.use:
            yield Problem(f"{told}: use", str(waiver.said.use), f"{said.use}, as the token", _FORGED)
        for day in days:
            if why := waiver.problem(day, key):
                yield Problem(told, why, f"a waiver by {key} in force on {day}", _FORGED)
                break


def _root(leaves: bytes) -> bytes:
    """The root over leaves that lie one after the other, without a list of them: a set can have a million."""
    whole: list[bytes] = []
    for place in range(len(leaves) // _HASH):
        node = leaves[place * _HASH : (place + 1) * _HASH]
        while place & 1:
            node, place = node_hash(whole.pop(), node), place >> 1
        whole.append(node)
    node = whole.pop() if whole else root([])
    while whole:
        node = node_hash(whole.pop(), node)
    return node


def _trained(gate: Entry, entries: Sequence[Entry]) -> Iterator[dt.date]:
    """The days on which training under this token began: of the entries of `train` up to the next ruling."""
    for entry in entries[gate.index + 1 :]:
        if entry.stage == GATE:
            return
        if entry.stage == "train":
            yield entry.started.date()
