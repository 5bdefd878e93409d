"""More faults of what is handed to strangers: what an example was made from, how its provider named the answer, the
version of leaves, and who signed one of two checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from faults import forger
from faults.proofs import C, D, Doc, Fault, P, Proofs, S, edit


def other_signer(name: str) -> Callable[[Proofs], Doc]:
    """One of two checkpoints, with the same statement, under the signature of somebody else."""

    def make(proofs: Proofs) -> Doc:
        signed = proofs.docs[C][name]
        signature = forger.envelope(signed["statement"], Ed25519PrivateKey.generate())["signatures"][0]
        return proofs.docs[C] | {name: signed | signature}

    return make


OLDER = [
    Fault(
        "leaves said to be older",
        form,
        edit(form, lambda d: d.update(form=d["form"][:-1] + "1")),
        "form" if form == P else "root",
        first="a spot-check of the form" if form == P else "root",
    )
    for form in (D, "parents", "response", S, P)
]


def _parents(change: Callable[[list], list]) -> Callable[[Proofs], Doc]:
    return edit("parents", lambda doc: doc.update(value=change(doc["value"])))


PARENTS = [
    Fault(name, "parents", _parents(change), "path: root", first="the path leads to root")
    for name, change in {
        "dropped": lambda told: told[:-1],
        "swapped": lambda told: [told[0], told[2], told[1]],
        "altered": lambda told: [told[0], [told[1][0], forger.tagged(b"another")], *told[2:]],
        "of another kind": lambda told: [told[0], ["document", told[1][1]], *told[2:]],
        "one more": lambda told: [*told, told[1]],
        "without kinds": lambda told: [digest for _, digest in told],
    }.items()
]

NAMES = [
    Fault(name, "response", edit("response", change), "path: root", first="the path leads to root")
    for name, change in {
        "another id of the provider's": lambda doc: doc["value"].update(id="chatcmpl-1"),
        "the provider's id left out": lambda doc: doc["value"].pop("id"),
        "an answer as leaves of version 1 have it": lambda doc: doc.update(value=doc["value"]["digest"]),
    }.items()
] + [
    Fault(
        name,
        P,
        edit(P, lambda doc, field=field, key=key: doc["rows"][0]["fields"][field].update({key: "another"})),
        "rows: row",
        first="fields that the ledger did not commit to",
    )
    for name, field, key in (
        ("another id of the provider's", "response", "id"),
        ("another fingerprint", "weights", "fingerprint"),
    )
]

SIGNERS = [
    Fault(
        f"{which} checkpoint by another key where one is demanded",
        C,
        other_signer(name),
        f"{name}: keyid",
        ("--key", "KEY"),
        said,
    )
    for which, name, said in (
        ("an old", "old", "the older checkpoint is signed by"),
        ("a new", "new", "signed by"),
    )
]

FAULTS = [*OLDER, *PARENTS, *NAMES, *SIGNERS]
