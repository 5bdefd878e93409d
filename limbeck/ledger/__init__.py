"""The ledger: what every stage read and wrote, hash-chained, and the verifier that recomputes it.

This is `limbeck.ledger.verify`:

    verification = limbeck.ledger.verify("runs/quickstart")
    verification.ok             # nothing differs
    verification.differences    # everything that does, with both values
    verification.notes          # what was not, or cannot be, checked

The room:

    canonical     the bytes that digests are taken of (RFC 8785)
    store         Ledger: the append-only file
    code          which code ran
    layout        the tables of that file
    sealing       the stage that makes a leaf of every example
    leaf_columns  the values of leaves, by column
    origins       who wrote the prompt of an example, and from what
    merkle/       the tree, its leaves, and their salts
    signing/      keys, envelopes, checkpoints, notes, time-stamps
    proofs/       what is handed to strangers
    commitments   the checks of tree and leaves
    verification  verify, and the Verification it ends in
    staleness     which stages rest on what has been made anew since
    parents       the checks that follow each record to its parents
    raw_answers   the journal as a verifier reads it
    exchanges     what a request and its answer say, of each API
    agreement     whether records agree with their parents, by column
    columns       tables read by column
    pages         sizes of Parquet pages, before they are unpacked
    recipe_text   the YAML that recipe.yaml may be
    paths         no path is read before it is sure that it lies in RUN
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from limbeck.ledger.store import Ledger
    from limbeck.ledger.verification import Verification, verify

__all__ = ["Ledger", "Verification", "verify"]

_HOMES = {"Ledger": "store", "Verification": "verification", "verify": "verification"}


def __getattr__(name: str) -> object:
    """Names are imported when they are first used: digests alone need neither SQLite nor pydantic."""
    if name in _HOMES:
        return getattr(import_module(f"limbeck.ledger.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'limbeck.ledger' has no attribute {name!r}")
