"""The rows that a public seed picks, opened, so that somebody can look whether they are what they are said to be.

The seed has to be fixed by somebody else, or by a public beacon, after the checkpoint was published: who knows it
beforehand can seal again and again until it picks no row that is wrong. That the checkpoint is older is what a
time-stamp shows.
"""

from __future__ import annotations

import base64
from bisect import bisect_right
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import canonical, digest_bytes, digest_json
from limbeck.ledger.merkle.fields import FIELDS, commit, encode, field_digest, fields_root, salts_of
from limbeck.ledger.merkle.salts import SALT, Salts
from limbeck.ledger.merkle.tree import Hash
from limbeck.ledger.proofs.documents import (
    OpenedRow,
    ShareDocument,
    SpotCheckDocument,
    document_bytes,
    form_of,
    version_of,
)
from limbeck.ledger.proofs.share import CheckedShare, check_share
from limbeck.ledger.raw_answers import RawAnswers
from limbeck.ledger.sealing import parse_row, read_row, salts_for
from limbeck.ledger.signing.envelope import unbase64
from limbeck.records import Digest


def picks(root: Hash, seed: str, draws: int, running: list[int]) -> list[int]:
    """The rows that the draws pick, in the order of the draws; `running` are summed tokens."""
    total, text = running[-1], seed.encode()
    head = b"limbeck/spot/1" + root + len(text).to_bytes(4, "big") + text
    numbers = (int.from_bytes(sha256(head + i.to_bytes(4, "big")).digest(), "big") for i in range(draws))
    return [bisect_right(running, number % total) for number in numbers]


def spot_check(run: Path, manifest: ShareDocument, seed: str, draws: int, *, raw: bool = False) -> SpotCheckDocument:
    """Open the rows that `seed` picks of the run that `manifest` was made of; with `raw`, the journal's bytes as well.

    Raises:
        InputError: the manifest does not hold, is another run's, or has no tokens; or the secret is another one.
    """
    from limbeck.ledger.merkle.order import leaf_sets
    from limbeck.ledger.sealing import refuse_unsealed
    from limbeck.ledger.store import Ledger

    try:
        checked = check_share(manifest)
    except ValueError as error:
        problem = Problem("the share", str(error)[:300], "one that holds", "make it anew: limbeck ledger share RUN")
        raise InputError("a share that does not hold", [problem]) from None
    if not checked.total:
        raise InputError("nothing to pick", [Problem("the share", "no tokens to train on", "at least one", "")])
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        sets = leaf_sets(ledger.entries())
    refuse_unsealed(run, sets)
    salts = salts_for(sets[-1])
    rows = sorted(set(picks(checked.root.statement.root, seed, draws, checked.running)))
    return SpotCheckDocument(
        form=form_of(SpotCheckDocument, version_of(manifest)),
        checkpoint=manifest.checkpoint,
        share=digest_bytes(document_bytes(manifest)),
        seed=seed,
        draws=draws,
        rows=[_opened(run, row, salts, checked, raw) for row in rows],
    )


def _opened(run: Path, row: int, salts: Salts, checked: CheckedShare, raw: bool) -> OpenedRow:
    found = read_row(run, row)
    made = commit(salts, row, encode(parse_row(found)), checked.version) if found else None
    if found is None or made is None or made.private != checked.private[row]:
        remedy = "make the share anew, of this run, and see what `limbeck ledger verify` says"
        problem = Problem(f"row {row}", made.private.hex() if made else "nothing", checked.private[row].hex(), remedy)
        raise InputError("the share is of other rows", [problem])
    values = parse_row(found).values
    told = {}
    if raw:
        with RawAnswers(run / "journal.db") as journal:
            answer = journal.find(str(values["request"]))
        if answer is None:
            problem = Problem("journal.db", "nothing", f"request {values['request']}", "leave out --raw")
            raise InputError("the journal lacks an answer", [problem])
        told = {name: base64.b64encode(getattr(answer, part)).decode() for name, part in _RAW}
    return OpenedRow(row=row, fields=values, salts=base64.b64encode(b"".join(made.salts[:-1])).decode(), **told)


_RAW = (("request", "request"), ("response", "raw"))


class SpotChecked(NamedTuple):
    """What a spot-check that holds came to."""

    share: CheckedShare
    draws: int
    rows: tuple[int, ...]


def check_spot_check(document: SpotCheckDocument, manifest: ShareDocument, digest: Digest) -> SpotChecked:
    """That exactly the picked rows are opened, and as they were committed to. `digest` is that of the manifest's file.
    Raises `ValueError` with every reason.
    """
    if document.share != digest:
        raise ValueError(f"a spot-check of share {document.share}, not of {digest}; {_OTHER_SHARE}")
    if version_of(document) != version_of(manifest):
        raise ValueError(f"a spot-check of the form {document.form} of a share of the form {manifest.form}")
    if document.checkpoint != manifest.checkpoint:
        own, due = (digest_json(one.model_dump(mode="json")) for one in (document.checkpoint, manifest.checkpoint))
        raise ValueError(f"a spot-check at the checkpoint {own}, of a share at {due}; {_OTHER_SHARE}")
    checked = check_share(manifest)
    if not checked.total:
        raise ValueError("no tokens to pick from")
    due = sorted(set(picks(checked.root.statement.root, document.seed, document.draws, checked.running)))
    found = [opened.row for opened in document.rows]
    if found != due:
        raise ValueError(f"rows {_few(found)} are opened, the seed picks {_few(due)}")
    wrong = [why for opened in document.rows if (why := _differs(opened, manifest, checked))]
    if wrong:
        raise ValueError("; ".join(wrong[:20]))
    return SpotChecked(checked, document.draws, tuple(found))


_OTHER_SHARE = (
    "a share made after another checkpoint is another share: give the one that these rows were picked from, or have "
    "rows opened for yours: limbeck ledger spot-check RUN --seed S --share FILE"
)


def _differs(opened: OpenedRow, manifest: ShareDocument, checked: CheckedShare) -> str:
    row, salts = opened.row, salts_of(unbase64(opened.salts))
    if tuple(sorted(opened.fields)) != FIELDS or [len(s) for s in salts] != [SALT] * len(FIELDS):
        return f"row {row}: other fields or salts than the sixteen"
    digests = [field_digest(n, s, canonical(opened.fields[n])) for n, s in zip(FIELDS, salts, strict=True)]
    if fields_root(digests) != checked.private[row]:
        return f"row {row}: fields that the ledger did not commit to"
    named = manifest.classes[manifest.rows.class_[row]]
    if opened.fields["teacher"] != named:
        return f"row {row}: counted for {named}, teacher {opened.fields['teacher']}"
    for name, data in (("request", opened.request), ("response", opened.response)):
        if data is not None and digest_bytes(unbase64(data)) != _digest_in(opened.fields[name]):
            return f"row {row}: raw {name} of another digest"
    return ""


def _digest_in(value: JsonValue) -> JsonValue:
    """The digest in a field's value, which may have more beside it, by the version of the leaf."""
    return value.get("digest") if isinstance(value, dict) else value


def _few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
