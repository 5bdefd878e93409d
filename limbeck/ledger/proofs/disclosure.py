"""One field of one row, with a path to a signed root: nothing else of the row, and nothing of any other, is shown."""

from __future__ import annotations

import base64
from pathlib import Path

from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import canonical
from limbeck.ledger.merkle.fields import (
    FIELDS,
    SHARE,
    commit,
    encode,
    example_hash,
    field_digest,
    fields_path,
    fields_root_from_path,
)
from limbeck.ledger.merkle.salts import SALT
from limbeck.ledger.merkle.stored import WIDTH
from limbeck.ledger.merkle.tree import Hash, root_from_path
from limbeck.ledger.proofs.documents import CheckedRoot, Disclosure, checked_root, covering, form_of, version_of
from limbeck.ledger.sealing import LEAVES, parse_row, read_row, salts_for
from limbeck.ledger.signing.envelope import unbase64
from limbeck.ledger.store import Ledger

NAMES = (*FIELDS, SHARE)
_DEPTH = 4
"""Digests from a field to the root over its row's sixteen."""


def disclose(run: Path, row: int, field: str) -> Disclosure:
    """The proof of a field.

    Raises:
        InputError: no such row or field, nothing signed covers it, or the salts' secret is not on this machine.
        VerificationError: the ledger was changed, or the row is not what the ledger committed to.
    """
    if field not in NAMES:
        problem = Problem("--field", field, f"one of {', '.join(NAMES)}", "see docs/ledger-format.md")
        raise InputError("no such field", [problem])
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        cover = covering(run, ledger.entries(), shortest=True)
        if not 0 <= row < cover.found.fact.count:
            problem = Problem("--row", str(row), f"0 to {cover.found.fact.count - 1}", f"rows are those of {LEAVES}")
            raise InputError("no such row", [problem])
        place = cover.found.first + row
        path, due = ledger.tree.path(place, cover.size), ledger.tree.leaves(place, place + 1)
    found = read_row(run, row)
    if found is None:
        raise InputError("no such row", [Problem(f"{run / LEAVES}: row {row}", "nothing", "a row", "verify the run")])
    leaf = parse_row(found)
    made = commit(salts_for(cover.found), row, encode(leaf), cover.found.fact.version)
    refuse_changed(run, row, made.hash, due)
    if field == SHARE:
        value, salt, inner = leaf.share.value(), made.salts[-1], [made.private]
    else:
        at = FIELDS.index(field)
        value, salt, inner = leaf.fields[at], made.salts[at], [*fields_path(made.digests, at), made.share]
    return Disclosure(
        form=form_of(Disclosure, cover.found.fact.version),
        checkpoint=cover.as_json(),
        row=row,
        field=field,
        value=value,
        salt=base64.b64encode(salt).decode(),
        path=base64.b64encode(b"".join([*inner, *path])).decode(),
    )


def refuse_changed(run: Path, row: int, found: Hash, due: list[Hash]) -> None:
    """Raises `VerificationError` where a row is not what the ledger committed to."""
    from limbeck.errors import VerificationError

    if due != [found]:
        expected = due[0].hex() if due else "a leaf"
        problem = Problem(f"{run / LEAVES}: row {row}", found.hex(), expected, "see what `limbeck ledger verify` says")
        raise VerificationError("the row is not what the ledger committed to", [problem])


def check_disclosure(proof: Disclosure) -> CheckedRoot:
    """That the value is what the signed root commits to. Raises `ValueError` with the reason."""
    root = checked_root(proof.checkpoint)
    if proof.row >= root.examples.count:
        raise ValueError(f"row {proof.row} of {root.examples.count} examples")
    salt, path = unbase64(proof.salt), hashes_of(proof.path)
    if proof.field not in NAMES or len(salt) != SALT:
        raise ValueError(f"field {proof.field!r} with a salt of {len(salt)} bytes")
    digest = field_digest(proof.field, salt, canonical(proof.value))
    inner = 1 if proof.field == SHARE else _DEPTH + 1
    if len(path) < inner:
        raise ValueError(f"a path of {len(path)} digests")
    if proof.field == SHARE:
        leaf = example_hash(path[0], digest, version_of(proof))
    else:
        private = fields_root_from_path(digest, FIELDS.index(proof.field), path[:_DEPTH])
        leaf = example_hash(private, path[_DEPTH], version_of(proof))
    found = root_from_path(leaf, root.examples.first + proof.row, root.size, path[inner:])
    if found != root.statement.root:
        raise ValueError(f"the path leads to root {found.hex()}, the signed one is {root.statement.root.hex()}")
    return root


def hashes_of(text: str) -> list[Hash]:
    """The digests of a path. Raises `ValueError`."""
    data = unbase64(text)
    if len(data) % WIDTH:
        raise ValueError(f"a path of {len(data)} bytes, not a multiple of {WIDTH}")
    return [data[i : i + WIDTH] for i in range(0, len(data), WIDTH)]
