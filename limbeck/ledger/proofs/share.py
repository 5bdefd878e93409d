"""Each teacher's share of the supervised tokens, with a manifest from which anybody recomputes root and shares.

Of every row the manifest shows class, split and tokens, which are bound to its leaf, and one digest that stands for
all the rest. It shows that the shares follow from what was committed to. That each row's class is true it cannot show;
that is what a spot-check is for.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import NamedTuple

from limbeck.ledger.canonical import canonical
from limbeck.ledger.merkle.fields import SHARE, Version, commit, encode, example_hash, field_digest, share_bytes
from limbeck.ledger.merkle.salts import SALT
from limbeck.ledger.merkle.stored import WIDTH
from limbeck.ledger.merkle.tree import Hash, root
from limbeck.ledger.proofs.disclosure import refuse_changed
from limbeck.ledger.proofs.documents import (
    CheckedRoot,
    ClassShare,
    ShareDocument,
    ShareRows,
    checked_root,
    covering,
    form_of,
    version_of,
)
from limbeck.ledger.sealing import parse_row, read_rows, salts_for
from limbeck.ledger.signing.envelope import unbase64
from limbeck.ledger.store import Ledger

SPLITS = ("train", "held_out")


def share(run: Path) -> ShareDocument:
    """The manifest of a run, at its latest checkpoint.

    Raises:
        InputError: nothing signed covers the examples, or the salts' secret is not on this machine.
        VerificationError: the ledger was changed, or a row is not what it committed to.
    """
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        cover = covering(run, ledger.entries())
        first, end = cover.found.first, cover.found.first + cover.found.fact.count
        before, own, after = (ledger.tree.leaves(*part) for part in ((0, first), (first, end), (end, cover.size)))
    keys, version = salts_for(cover.found), cover.found.fact.version
    private, salts, told = [], [], []
    for row, (found, due) in enumerate(zip_longest(read_rows(run), own)):
        leaf = parse_row(found) if found else None
        made = commit(keys, row, encode(leaf), version) if leaf else None
        refuse_changed(run, row, made.hash if made else b"", [due] if due else [])
        if leaf and made:
            private.append(made.private)
            salts.append(made.salts[-1])
            told.append(leaf.share)
    classes = sorted({one.teacher for one in told})
    places = {name: place for place, name in enumerate(classes)}
    columns = {
        "private": base64.b64encode(b"".join(private)).decode(),
        "salts": base64.b64encode(b"".join(salts)).decode(),
        "class": [places[one.teacher] for one in told],
        "split": [0 if one.split == "train" else 1 for one in told],
        "tokens": [one.tokens for one in told],
    }
    rows = ShareRows.model_validate(columns)
    return ShareDocument(
        form=form_of(ShareDocument, version),
        checkpoint=cover.as_json(),
        before=_texts(before),
        classes=classes,
        rows=rows,
        after=_texts(after),
        shares=added_up(classes, rows),
    )


def added_up(classes: Sequence[str], rows: ShareRows) -> list[ClassShare]:
    """What the rows come to, by class, over the split that is trained on."""
    counts, tokens = [0] * len(classes), [0] * len(classes)
    for place, split, many in zip(rows.class_, rows.split, rows.tokens, strict=True):
        if split == 0:
            counts[place] += 1
            tokens[place] += many
    rows_of = zip(classes, counts, tokens, strict=True)
    return [ClassShare.model_validate({"class": name, "rows": n, "tokens": t}) for name, n, t in rows_of]


class CheckedShare(NamedTuple):
    """A manifest that holds."""

    root: CheckedRoot
    private: list[Hash]
    shares: list[Hash]
    """Digests of the rows' shares."""
    running: list[int]
    """Tokens of split train, summed up to and with each row."""
    version: Version
    """Of the rows' leaves."""

    @property
    def total(self) -> int:
        """Supervised tokens that are trained on."""
        return self.running[-1] if self.running else 0


def check_share(document: ShareDocument) -> CheckedShare:
    """That root and shares follow from the manifest. Raises `ValueError` with the reason."""
    signed, rows = checked_root(document.checkpoint), document.rows
    count = signed.examples.count
    private, salts = _cut(rows.private, WIDTH), _cut(rows.salts, SALT)
    before, after = ([_one_hash(text) for text in part] for part in (document.before, document.after))
    found = {len(private), len(salts), len(rows.class_), len(rows.split), len(rows.tokens)}
    if found != {count} or (len(before), len(before) + count + len(after)) != (signed.examples.first, signed.size):
        raise ValueError(f"{len(before)}, {sorted(found)} and {len(after)} leaves, where {signed.examples} is signed")
    if document.classes != sorted(set(document.classes)) or any(c >= len(document.classes) for c in rows.class_):
        raise ValueError("classes that are not sorted, come twice, or are missing")
    shares = list(_share_digests(document.classes, rows, salts))
    leaves = [example_hash(p, s, version_of(document)) for p, s in zip(private, shares, strict=True)]
    if (made := root([*before, *leaves, *after])) != signed.statement.root:
        raise ValueError(f"the rows make root {made.hex()}, the signed one is {signed.statement.root.hex()}")
    if document.shares != (due := added_up(document.classes, rows)):
        raise ValueError(f"the shares are said to be {document.shares}, the rows add up to {due}")
    weights = (tokens if split == 0 else 0 for tokens, split in zip(rows.tokens, rows.split, strict=True))
    return CheckedShare(signed, private, shares, list(accumulate(weights)), version_of(document))


def _share_digests(classes: Sequence[str], rows: ShareRows, salts: Sequence[bytes]) -> Iterator[Hash]:
    names = [canonical(name) for name in classes]
    for place, split, tokens, salt in zip(rows.class_, rows.split, rows.tokens, salts, strict=True):
        yield field_digest(SHARE, salt, share_bytes(names[place], SPLITS[split], tokens))


def _texts(hashes: Sequence[Hash]) -> list[str]:
    return [base64.b64encode(one).decode() for one in hashes]


def _one_hash(text: str) -> Hash:
    data = unbase64(text)
    if len(data) != WIDTH:
        raise ValueError(f"a leaf hash of {len(data)} bytes")
    return data


def _cut(text: str, width: int) -> list[bytes]:
    data = unbase64(text)
    if len(data) % width:
        raise ValueError(f"{len(data)} bytes, not a multiple of {width}")
    return [data[i : i + width] for i in range(0, len(data), width)]
