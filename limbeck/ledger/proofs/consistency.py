"""That one signed root continues another: nothing that the older one covers was changed, removed or moved since.

Somebody who kept a checkpoint can be shown this without being shown the ledger.
"""

from __future__ import annotations

import base64
from pathlib import Path

from limbeck.errors import Problem, VerificationError
from limbeck.ledger.merkle.tree import consistent
from limbeck.ledger.proofs.disclosure import hashes_of
from limbeck.ledger.proofs.documents import ConsistencyDocument, SignedRoot, signed_statement
from limbeck.ledger.signing.checkpoints import checkpoints
from limbeck.ledger.signing.envelope import Envelope
from limbeck.ledger.signing.statements import Checkpoint
from limbeck.ledger.store import Ledger


def continues(run: Path, kept: Envelope) -> ConsistencyDocument:
    """The proof that the latest checkpoint of a run continues one that was kept elsewhere.

    Raises `VerificationError` where the ledger does not begin with what the kept checkpoint covers.
    """
    old = signed_statement(SignedRoot.of(kept))
    size = old.predicate.size
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        made = list(checkpoints(ledger.entries()))
        have = made[-1].statement.predicate.size if made else 0
        found = ledger.tree.root(size).hex() if 0 < size <= have else f"{have} leaves under its last checkpoint"
        if found != old.root.hex():
            where, expected = (
                f"{run / 'ledger.db'}: the first {size} leaves",
                f"root {old.root.hex()}, as it was signed",
            )
            problem = Problem(where, found, expected, "it was written anew since, or the checkpoint is another run's")
            raise VerificationError("the ledger does not continue this checkpoint", [problem])
        path = ledger.tree.consistency(size, have)
    return ConsistencyDocument(
        old=SignedRoot.of(kept), new=SignedRoot.of(made[-1].envelope), path=base64.b64encode(b"".join(path)).decode()
    )


def check_consistency(document: ConsistencyDocument) -> tuple[Checkpoint, Checkpoint]:
    """The older and the newer statement, once the one continues the other. Raises `ValueError` with the reason."""
    old, new = signed_statement(document.old), signed_statement(document.new)
    sizes = old.predicate.size, new.predicate.size
    if not consistent(*sizes, old.root, new.root, hashes_of(document.path)):
        raise ValueError(f"root {new.root.hex()} of {sizes[1]} leaves does not continue {old.root.hex()} of {sizes[0]}")
    return old, new
