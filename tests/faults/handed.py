"""More faults of what is handed to strangers: what an example was made from, the version of leaves, and who signed one
of two checkpoints.
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
    for form in (D, "parents", S, P)
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

FAULTS = [*OLDER, *PARENTS, *SIGNERS]
