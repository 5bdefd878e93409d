"""Faults of the terms gate in a run that trained under a waiver. Entry 6 is the gate's, entry 10 the training's."""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from faults import forger
from faults.kit import Case, Fault

GATE, TRAIN = 6, 10


def _digest(envelope: dict) -> str:
    return forger.tagged(forger.rfc8785.dumps(envelope)).removeprefix("sha256:")


def gate(edit: Callable[[dict, Ed25519PrivateKey], object]) -> Callable[[Case], None]:
    """The fact `gate`, and everything after made to agree with it."""
    return lambda case: case.rewrite(lambda bodies, _: edit(bodies[GATE]["facts"]["gate"], case.key))


def token(edit: Callable[[dict], object], key: Ed25519PrivateKey | None = None) -> Callable[[Case], None]:
    """What the token says, signed anew."""

    def do(fact: dict, own: Ed25519PrivateKey) -> None:
        said = forger.statement_of(fact["token"])
        edit(said)
        fact["token"] = forger.envelope(said, key or own)

    return gate(do)


def waiver(edit: Callable[[dict], object], key: Ed25519PrivateKey | None = None) -> Callable[[Case], None]:
    """What the waiver says, signed anew, and the token about it too."""

    def do(fact: dict, own: Ed25519PrivateKey) -> None:
        said = forger.statement_of(fact["waivers"][0])
        edit(said)
        fact["waivers"] = [forger.envelope(said, key or own)]
        told = forger.statement_of(fact["token"])
        told["predicate"]["waivers"] = [_digest(fact["waivers"][0])]
        fact["token"] = forger.envelope(told, own)

    return gate(do)


def _unsigned(fact: dict, _: object) -> None:
    said = forger.statement_of(fact["waivers"][0])
    said["predicate"]["expires"] = "2999-01-01"
    other = forger.envelope(said, Ed25519PrivateKey.generate())
    fact["waivers"][0]["payload"] = other["payload"]


OTHER = Ed25519PrivateKey.generate()

FAULTS = [
    Fault("a gate of version true", gate(lambda fact, _: fact.update(version=True)), "facts: gate: version", "version"),
    Fault(
        "an expired waiver",
        waiver(lambda s: s["predicate"].update(expires="2026-01-01")),
        "waiver 0: expires",
        "waiver",
    ),
    Fault(
        "training after the waiver had expired",
        lambda case: case.rewrite(lambda bodies, _: bodies[TRAIN].update(started="2999-12-31T00:00:00.000000Z")),
        "waiver 0: expires",
        "waiver",
    ),
    Fault("a waiver by another key", waiver(lambda _: None, OTHER), "waiver 0: keyid", "waiver"),
    Fault("a waiver changed after it was signed", gate(_unsigned), "waiver 0: sig", "waiver"),
    Fault(
        "a waiver for another use",
        waiver(lambda s: s["predicate"]["use"].update(distribution="internal")),
        "waiver 0: use",
        "use",
    ),
    Fault(
        "a waiver about other terms than it names",
        waiver(lambda s: s["predicate"].update(terms="x")),
        "waiver 0",
        "gate",
    ),
    Fault("a waiver left out", gate(lambda fact, _: fact.update(waivers=[])), "token: waivers", "waivers"),
    Fault(
        "a token for another set",
        token(lambda s: s["subject"][0]["digest"].update(sha256="0" * 64)),
        "token: set",
        "set",
    ),
    Fault("a token for fewer rows", token(lambda s: s["predicate"].update(count=1)), "token: count", "count"),
    Fault(
        "a token for another recipe", token(lambda s: s["predicate"].update(recipe="0" * 64)), "token: recipe", "recipe"
    ),
    Fault(
        "a token that says allowed",
        token(lambda s: s["predicate"].update(verdict="allowed")),
        "token: verdict",
        "verdict",
    ),
    Fault("a token of another key", token(lambda _: None, OTHER), "waiver 0: keyid", "waiver"),
    Fault("another version of the gate", gate(lambda fact, _: fact.update(version=2)), "facts: gate: version", "gate"),
    Fault(
        "no token",
        lambda case: case.rewrite(lambda bodies, _: bodies[GATE]["facts"].pop("gate")),
        "facts: gate",
        "gate",
    ),
]
