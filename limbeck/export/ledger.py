"""The ledger in figures that somebody else can check. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from limbeck.export.words import several
from limbeck.ledger.signing.checkpoints import checkpoints
from limbeck.ledger.store import Ledger, entry_digest
from limbeck.records import Entry


class LedgerTold(NamedTuple):
    """The ledger in figures that somebody else can check, and who signed it, as far as it was signed."""

    entries: int
    head: str
    """Digest of the last entry; empty where there is none."""
    root: str
    """Root of the tree at the last checkpoint, or now where nothing is signed; 64 hexadecimal digits."""
    size: int
    """Leaves under that root."""
    signed: str | None
    """When the last checkpoint was signed, by the signer's clock."""
    keys: tuple[str, ...]
    """Public keys (Ed25519) that signed; 64 hexadecimal digits each."""
    checkpoints: int
    stamps: int
    """Time-stamps that lie in it; whether their authorities vouch for them is not looked at here."""

    @property
    def trust(self) -> str:
        """What that is worth, in a few words."""
        if not self.checkpoints:
            return "unsigned and unanchored"
        signed = f"signed at {several(self.checkpoints, 'checkpoint')}"
        return f"{signed}, with time-stamps to be checked" if self.stamps else f"{signed} and unanchored"


def ledger_told(ledger: Ledger, entries: Sequence[Entry]) -> LedgerTold:
    """What is to be told of an open ledger, whose entries were read already."""
    made = [one for one in checkpoints(entries) if one.envelope.signed()]
    root, size = ledger.tree.root().hex(), ledger.tree.size
    if made:
        root, size = made[-1].statement.root.hex(), made[-1].statement.predicate.size
    return LedgerTold(
        entries=len(entries),
        head=entry_digest(entries[-1]) if entries else "",
        root=root,
        size=size,
        signed=made[-1].statement.predicate.at if made else None,
        keys=tuple(sorted({one.envelope.keyid for one in made})),
        checkpoints=len(made),
        stamps=sum(entry.stage == "timestamp" for entry in entries),
    )
