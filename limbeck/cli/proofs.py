"""`limbeck ledger disclose|share|spot-check|check`: what is handed to strangers, and reading it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limbeck.cli.edge import in_line, printable
from limbeck.cli.ledger import app, as_json_text, write_new

if TYPE_CHECKING:
    from limbeck.ledger.proofs.documents import CheckedRoot, ClassShare, Document, ShareDocument
    from limbeck.ledger.signing.envelope import Envelope
    from limbeck.ledger.signing.statements import Checkpoint

_RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Share = Annotated[
    Path | None, typer.Option("--share", metavar="FILE", help="The manifest that `limbeck ledger share --out` wrote.")
]


@app.command()
def disclose(
    run: _RunPath,
    row: Annotated[int, typer.Option("--row", metavar="N", help="Row of leaves.parquet, from 0.")],
    field: Annotated[str, typer.Option("--field", metavar="F", help="Such as teacher, terms, model, prompt, share.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the proof to a file.")] = None,
    as_json: _Json = False,
) -> None:
    """Prove one field of one example to a stranger, and show nothing else.

    The proof, canonical JSON of less than 2 kB for most values, goes to standard output or to --out. Whoever gets it
    runs `limbeck ledger check FILE`.
    """
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.proofs.disclosure import disclose as prove
    from limbeck.ledger.proofs.documents import document_bytes

    refuse_other_than_run(run)
    proof = prove(run, row, field)
    data, meant = document_bytes(proof), _meaning(field, proof.value)
    if out is None:
        if meant:
            typer.echo(meant, err=True)
        typer.echo(data.decode())
        return
    write_new(out, data)
    told = {"row": row, "field": field, "value": proof.value, "bytes": len(data), "file": str(out)}
    told |= {"meaning": meant} if meant else {}
    line = f"{field} of row {row}: {in_line(proof.value)}; wrote {out}"
    typer.echo(as_json_text(told) if as_json else printable("\n".join(filter(None, (line, meant)))))


def _meaning(field: object, value: object) -> str:
    """What a value means that does not say so itself."""
    from limbeck.ledger.merkle.fields import NOT_ASKED

    if (field, value) != ("gate", NOT_ASKED):
        return ""
    return (
        "no example says what the terms gate decided, since it rules on the whole set after that was sealed: its "
        "decision stands in the next entry of the stage gate (`limbeck ledger log RUN`), bound to this set's root"
    )


@app.command()
def share(
    run: _RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the blinded manifest to a file.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Say how much of the supervised tokens each teacher wrote, provably.

    --out writes the blinded manifest: of every row its class and tokens and one digest. With it anybody recomputes
    root and shares (`limbeck ledger check FILE`).
    """
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.proofs.documents import checked_root, document_bytes
    from limbeck.ledger.proofs.share import share as add_up

    refuse_other_than_run(run)
    document = add_up(run)
    if out is not None:
        write_new(out, document_bytes(document))
    root = checked_root(document.checkpoint)
    values = _root_values(root) | {"shares": _shares(document.shares), "file": str(out) if out else None}
    typer.echo(as_json_text(values) if as_json else _share_text(document.shares, root))


@app.command("spot-check")
def spot_check(
    run: _RunPath,
    seed: Annotated[
        str, typer.Option("--seed", metavar="S", help="Drawn by others, or by a public beacon, after the checkpoint.")
    ],
    share_file: _Share = None,
    draws: Annotated[int, typer.Option("--draws", metavar="N", help="How many draws.", min=1, max=1_000_000)] = 300,
    raw: Annotated[bool, typer.Option("--raw", help="Add the raw request and response of each row.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the opened rows to a file.")] = None,
    as_json: _Json = False,
) -> None:
    """Open the rows that a public seed picks, so that somebody can look whether they are true.

    Rows are picked in proportion to their tokens. If none of them turns out wrong, no more than the bound of all
    supervised tokens is misstated, with 95 % confidence: 300 draws bound it to 1 %. The seed must not be known before
    the checkpoint is published.
    """
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.proofs.bounds import CONFIDENCE, upper_limit
    from limbeck.ledger.proofs.documents import document_bytes
    from limbeck.ledger.proofs.share import share as add_up
    from limbeck.ledger.proofs.spot_check import spot_check as pick

    refuse_other_than_run(run)
    manifest = _manifest(share_file) if share_file else add_up(run)
    document = pick(run, manifest, seed, draws, raw=raw)
    if out is not None:
        write_new(out, document_bytes(document))
    values = {
        "seed": seed,
        "draws": draws,
        "rows": [opened.row for opened in document.rows],
        "confidence": CONFIDENCE,
        "misstated_at_most": upper_limit(draws),
        "file": str(out) if out else None,
    }
    typer.echo(as_json_text(values) if as_json else _bound_text(draws, len(document.rows)))


@app.command()
def consistency(
    run: _RunPath,
    kept: Annotated[Path, typer.Option("--checkpoint", metavar="FILE", help="A checkpoint that was kept elsewhere.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the proof to a file.")] = None,
    as_json: _Json = False,
) -> None:
    """Prove that the run's last checkpoint continues one that somebody kept.

    Nothing that the kept one covers was then changed, removed or moved. Exit code 1 where the ledger does not
    continue it.
    """
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.proofs.consistency import check_consistency, continues
    from limbeck.ledger.proofs.documents import document_bytes, read_checkpoint

    refuse_other_than_run(run)
    document = continues(run, read_checkpoint(kept))
    if out is None:
        typer.echo(document_bytes(document).decode())
        return
    write_new(out, document_bytes(document))
    old, new = (statement.predicate for statement in check_consistency(document))
    told = {"old": old.size, "new": new.size, "file": str(out)}
    line = (
        f"the {new.size} leaves of the last checkpoint begin with the {old.size} of the one that was kept; wrote {out}"
    )
    typer.echo(as_json_text(told) if as_json else printable(line))


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A disclosure, share, spot-check, consistency or checkpoint.")
    ],
    share_file: _Share = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="KEY", help="The public key that has to have signed, both of two checkpoints."),
    ] = None,
    wrong: Annotated[
        int, typer.Option("--wrong", metavar="K", help="Draws of a spot-check that turned out wrong.", min=0)
    ] = 0,
    as_json: _Json = False,
) -> None:
    """Check a proof that somebody handed over; needs nothing of the run.

    Exit code 0: it holds; 1: it does not; 2: no proof.
    """
    from limbeck.errors import InputError
    from limbeck.ledger.proofs.documents import read_document
    from limbeck.ledger.signing.checks import refuse_malformed

    refuse_malformed(key=key)
    document, digest = read_document(file)
    manifest = (_manifest(share_file), read_document(share_file).digest) if share_file else None
    try:
        values = _checked(document, manifest, wrong) | {"digest": digest}
        for name, whose in (("key", "signed by"), (_OLDER, "the older checkpoint is signed by")):
            if key is not None and values.get(name, key) != key:
                raise ValueError(f"{whose} {values[name]}, not by {key}")
    except InputError:  # is a ValueError too
        raise
    except ValueError as error:
        told = {"ok": False, "why": str(error)}
        typer.echo(as_json_text(told) if as_json else printable(f"does NOT hold: {error}"))
        raise typer.Exit(1) from None
    typer.echo(as_json_text({"ok": True} | values) if as_json else _holds_text(document, values))


_OLDER = "key of the older one"
"""Who signed the older checkpoint of a consistency proof."""


def _holds_text(document: Document | Envelope, values: dict[str, object]) -> str:
    from limbeck.ledger.proofs.documents import ShareDocument

    shares = _share_lines(document.shares) if isinstance(document, ShareDocument) else []
    lines = [f"{name}: {in_line(value)}" for name, value in values.items() if name != "shares"]
    return printable("\n".join(["it holds", *shares, *lines]))


def _checked(
    document: Document | Envelope, manifest: tuple[ShareDocument, str] | None, wrong: int
) -> dict[str, object]:
    """What a proof shows. Raises `ValueError` where it does not hold."""
    from limbeck.errors import InputError, Problem
    from limbeck.ledger.proofs.bounds import CONFIDENCE, upper_limit
    from limbeck.ledger.proofs.consistency import check_consistency
    from limbeck.ledger.proofs.disclosure import check_disclosure
    from limbeck.ledger.proofs.documents import (
        ConsistencyDocument,
        Disclosure,
        ShareDocument,
        SignedRoot,
        signed_statement,
    )  # fmt: skip
    from limbeck.ledger.proofs.share import check_share
    from limbeck.ledger.proofs.spot_check import check_spot_check
    from limbeck.ledger.signing.envelope import Envelope

    if isinstance(document, Envelope):
        return _signed_values(signed_statement(SignedRoot.of(document)), document.keyid)
    if isinstance(document, Disclosure):
        root = check_disclosure(document)
        told = _root_values(root) | {"row": document.row, "field": document.field, "value": document.value}
        meant = _meaning(document.field, document.value)
        return told | ({"meaning": meant} if meant else {})
    if isinstance(document, ShareDocument):
        return _root_values(check_share(document).root) | {"shares": _shares(document.shares)}
    if isinstance(document, ConsistencyDocument):
        old, new = check_consistency(document)
        values: dict[str, object] = {"old": old.predicate.size, "new": new.predicate.size}
        return values | {"root": new.root.hex(), "key": document.new.keyid, _OLDER: document.old.keyid}
    if manifest is None:
        problem = Problem("--share", "nothing", "the manifest that the rows were picked from", "give its file")
        raise InputError("a spot-check needs its share", [problem])
    held = check_spot_check(document, *manifest)
    return _root_values(held.share.root) | {
        "seed": document.seed,
        "draws": held.draws,
        "rows": len(held.rows),
        "confidence": CONFIDENCE,
        "misstated_at_most": upper_limit(held.draws, wrong),
    }


def _manifest(path: Path) -> ShareDocument:
    from limbeck.errors import InputError, Problem
    from limbeck.ledger.proofs.documents import ShareDocument, read_document

    document = read_document(path).document
    if not isinstance(document, ShareDocument):
        found = getattr(document, "form", "a signed checkpoint")
        problem = Problem(str(path), found, "limbeck-share/1", "give what `limbeck ledger share --out` wrote")
        raise InputError("no share", [problem])
    return document


def _root_values(root: CheckedRoot) -> dict[str, object]:
    return _signed_values(root.statement, root.keyid)


def _signed_values(statement: Checkpoint, keyid: str) -> dict[str, object]:
    told = statement.predicate
    return {
        "kind": told.kind,
        "signed": told.at,
        "root": statement.root.hex(),
        "size": told.size,
        "key": keyid,
        "trust": "unanchored: signed, but nothing in this file says when",
    }


def _shares(shares: list[ClassShare]) -> list[dict[str, object]]:
    total = sum(one.tokens for one in shares)
    return [
        {"class": s.name, "rows": s.rows, "tokens": s.tokens, "share": s.tokens / total if total else 0.0}
        for s in shares
    ]


def _share_lines(shares: list[ClassShare]) -> list[str]:
    total = sum(one.tokens for one in shares)
    return [
        f"{100 * one.tokens / total if total else 0:6.2f} %  {one.tokens:>12,} tokens  {one.rows:>9,} rows  "
        + in_line(one.name)
        for one in shares
    ]


def _share_text(shares: list[ClassShare], root: CheckedRoot) -> str:
    values = _root_values(root)
    return printable("\n".join([*_share_lines(shares), *(f"{name:<8}{value}" for name, value in values.items())]))


def _bound_text(draws: int, rows: int) -> str:
    from limbeck.ledger.proofs.bounds import upper_limit

    return (
        f"{draws} draws opened {rows} rows; if none of them is wrong, at most {100 * upper_limit(draws):.3g} % of the "
        "supervised tokens are misstated, with 95 % confidence"
    )
