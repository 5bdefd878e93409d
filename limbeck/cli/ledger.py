"""`limbeck ledger ...`: read, check and sign the evidence. Needs no torch. What is handed to strangers: `proofs`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limbeck.cli.edge import in_line, printable, writing

if TYPE_CHECKING:
    from limbeck.ledger.signing.checkpoints import Made
    from limbeck.ledger.signing.timestamps import Stamp
    from limbeck.ledger.store import Ledger
    from limbeck.ledger.verification import Verification
    from limbeck.recipe import Recipe
    from limbeck.records import Entry

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Verify, sign and disclose what a run recorded about itself. Needs no torch.",
)

_RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_PERMIT = "what is signed is written into RUN: change the permissions there, or sign where RUN may be written"


_Head = Annotated[
    str | None,
    typer.Option("--head", metavar="DIGEST", help="A head digest noted down earlier; the ledger must still hold it."),
]


_Key = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="The public key (64 hexadecimal digits) that has to have signed."),
]
_Salts = Annotated[
    Path | None,
    typer.Option("--salts", metavar="FILE", help="The run's salts' key, as `limbeck ledger salts` wrote it."),
]
_Authority = Annotated[
    Path | None,
    typer.Option("--authority", metavar="FILE", help="Root certificates of time-stamping authorities, PEM."),
]

_Audit = Annotated[
    bool,
    typer.Option(
        "--audit", help="Also run the teacher again over some examples and compare the stored signals; needs torch."
    ),
]
_AuditShare = Annotated[
    float, typer.Option("--audit-share", metavar="SHARE", help="Share of the training examples that is audited.")
]


@app.command()
def verify(
    run: _RunPath,
    head: _Head = None,
    key: _Key = None,
    salts: _Salts = None,
    authority: _Authority = None,
    audit: _Audit = False,
    audit_share: _AuditShare = 0.02,
    as_json: _Json = False,
) -> None:
    """Recompute everything the ledger says and list every difference.

    Files, chain, tree, signatures, time-stamps, records and their parents; with --audit also what the teacher said.
    Exit code 0: nothing differs; 1: something does; 2: not a run, or nothing to audit.
    """
    from limbeck.ledger import verify as recompute
    from limbeck.ledger.sealing import read_salts_key

    found = read_salts_key(salts) if salts else None
    result = recompute(run, head=head, key=key, salts=found, authority=authority)
    told = result.to_json() if as_json else _verification_text(result)
    audited = None
    if audit:
        from limbeck.cli.audit import audit_run, with_audit  # imports torch

        audited = audit_run(run, audit_share)
        told = with_audit(told, audited) if as_json else "\n".join([told, printable("\n".join(audited.lines()))])
    typer.echo(told)
    if not result.ok or (audited and audited.problems):
        raise typer.Exit(1)


@app.command()
def checkpoint(
    run: _RunPath,
    timestamp: Annotated[
        Path | None,
        typer.Option("--timestamp", metavar="FILE", help="An RFC 3161 time-stamp of a checkpoint, to be kept with it."),
    ] = None,
    authority: _Authority = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the signed checkpoint (DSSE) to a file.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Sign everything recorded so far, or add a time-stamp to a checkpoint.

    A run signs by itself when the collection is closed, when training is intended, and when it is done. Where
    nothing was recorded since, the last checkpoint is shown. The file of --out is what an authority stamps:
    openssl ts -query -data FILE -sha256 -cert -out QUERY.
    """
    from limbeck.ledger.signing.checkpoints import checkpoints, sign_checkpoint, worth_signing
    from limbeck.ledger.signing.timestamps import attach, read_authorities

    stamp = None
    with writing(run, _PERMIT), _held(run) as (recipe, ledger):
        if timestamp is not None:
            made, stamp = attach(ledger, timestamp, read_authorities(authority) if authority else ())
        elif worth_signing(entries := ledger.entries()):
            made = sign_checkpoint(ledger, "by-hand", recipe)
        else:
            made = _last(run, list(checkpoints(entries)))
    if out is not None:
        write_new(out, made.envelope.data)
    trust = _trust(stamp, authority)
    told = made.statement.predicate
    values = {
        "kind": told.kind,
        "entry": made.entry.index,
        "size": told.size,
        "root": made.statement.root.hex(),
        "key": made.envelope.keyid,
        "at": told.at,
        "envelope": made.envelope.digest,
        "stamped": f"{stamp.at:%Y-%m-%dT%H:%M:%SZ}" if stamp else None,
        "trust": trust,
    }
    typer.echo(as_json_text(values) if as_json else _checkpoint_text(values))


@app.command()
def note(
    run: _RunPath,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is to be said about the run.")],
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who says it.")] = None,
    as_json: _Json = False,
) -> None:
    """Sign a note about the run as it stands, for the report's Discussion.

    `limbeck report` shows it. Notes are kept for ever; a second one can correct the first.
    """
    from limbeck.ledger.signing.notes import sign_note

    with writing(run, _PERMIT), _held(run) as (recipe, ledger):
        made = sign_note(ledger, text, by, recipe)
    told = made.statement.predicate
    values = {"entry": made.entry.index, "by": by, "key": made.envelope.keyid, "at": told.at, "text": text}
    line = f"note signed as entry {made.entry.index}; `limbeck report` shows it"
    typer.echo(as_json_text(values) if as_json else line)


@app.command()
def salts(
    run: _RunPath,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the key; never overwrites.")],
) -> None:
    """Write the key of this run's salts, for an auditor who has the whole run.

    With it `limbeck ledger verify --salts FILE` checks every example's leaf. It opens every row of this run, and
    no other run's.
    """
    from limbeck.ledger.merkle.order import leaf_sets
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.sealing import refuse_unsealed, salts_for
    from limbeck.ledger.store import Ledger

    refuse_other_than_run(run)
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        sets = leaf_sets(ledger.entries())
    refuse_unsealed(run, sets)
    write_new(out, salts_for(sets[-1]).key.hex().encode(), private=True)
    typer.echo(f"wrote {out}; who has it can open every row of this run")


@contextmanager
def _held(run: Path) -> Iterator[tuple[Recipe, Ledger]]:
    """The run, held against other writers, with its ledger."""
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.store import Ledger
    from limbeck.rundir import RunDir, open_run

    refuse_other_than_run(run)
    recipe = RunDir(run).recipe()
    with open_run(run, recipe) as held, Ledger(held / "ledger.db") as ledger:
        yield recipe, ledger


def _checkpoint_text(values: Mapping[str, object]) -> str:
    told = {name: value for name, value in values.items() if value is not None}
    if "stamped" not in told:
        told["remedy"] = (
            "have the file of --out stamped by an authority (RFC 3161), and keep its answer: "
            "limbeck ledger checkpoint RUN --timestamp FILE --authority FILE"
        )
    return "\n".join(f"{name:<9}{value}" for name, value in told.items())


def _last(run: Path, made: list[Made]) -> Made:
    from limbeck.errors import InputError, Problem

    if not made:
        problem = Problem(str(run / "ledger.db"), "no entries", "something to sign", "run `limbeck run` first")
        raise InputError("nothing to sign", [problem])
    return made[-1]


def _trust(stamp: Stamp | None, authority: Path | None) -> str:
    """What the checkpoint is worth to somebody who does not trust its signer."""
    if stamp is None:
        return "unanchored: signed, but nothing outside says when"
    if authority is None:
        return "unanchored: stamped, but the authority was not checked; give --authority FILE"
    return "anchored: the authority whose certificate was given vouches for the time"


def write_new(path: Path, data: bytes, *, private: bool = False) -> None:
    """A new file, whole or not at all, its directory made if it is not there; what is there is left alone."""
    from limbeck.errors import InputError, Problem

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        except FileExistsError:
            problem = Problem(str(path), "a file", "nothing there yet", "use another name, or remove it")
            raise InputError("would overwrite a file", [problem]) from None
        except FileNotFoundError:
            problem = Problem(str(path), "no file can be made there", "a place that may be written", "use another name")
            raise InputError("cannot write", [problem]) from None
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def as_json_text(values: object) -> str:
    """JSON for standard output."""
    import json

    return json.dumps(values, ensure_ascii=False, indent=2)


@app.command()
def log(run: _RunPath, as_json: _Json = False) -> None:
    """List the entries, oldest first: what each stage read and wrote, when, with which code.

    A ledger that was changed after it was written is refused; `limbeck ledger verify` lists the changes.
    """
    from limbeck.ledger.paths import refuse_other_than_run
    from limbeck.ledger.store import Ledger

    refuse_other_than_run(run)
    with Ledger(run / "ledger.db", read_only=True) as ledger:
        entries = ledger.entries()
    typer.echo(_log_json(entries) if as_json else _log_text(entries))


def _verification_text(result: Verification) -> str:
    from limbeck.errors import Problem

    lines = [str(Problem(*map(in_line, problem))) for problem in result.differences]
    count = len(result.differences)
    verdict = "verified: nothing differs" if result.ok else f"NOT verified: {count} difference{'s' * (count > 1)}"
    notes = [f"note: {in_line(note)}" for note in result.notes]
    summary = f"{verdict}; {result.entries} entries, head {result.head}"
    return printable("\n".join([*lines, *notes, summary]))


def _log_text(entries: list[Entry]) -> str:
    from limbeck.ledger.store import entry_digest

    lines = []
    for entry in entries:
        code = (
            f"limbeck {entry.limbeck}"
            + (f" {entry.commit[:12]}" if entry.commit else "")
            + (" dirty" if entry.dirty else "")
        )
        seconds = (entry.finished - entry.started).total_seconds()
        when = f"{entry.finished:%Y-%m-%d %H:%M:%SZ}"
        lines.append(f"{entry.index:>3}  {when}  {in_line(entry.stage)}  ({seconds:.1f} s, {in_line(code)})")
        lines.append(f"     entry  {entry_digest(entry)}")
        lines += [f"     read   {digest}  {in_line(name)}" for name, digest in sorted(entry.inputs.items())]
        lines += [f"     wrote  {digest}  {in_line(name)}" for name, digest in sorted(entry.outputs.items())]
    return printable("\n".join(lines) or "no entries yet")


def _log_json(entries: list[Entry]) -> str:
    import json

    from limbeck.ledger.store import entry_digest

    rows = [{"digest": entry_digest(entry)} | entry.model_dump(mode="json") for entry in entries]
    return json.dumps(rows, ensure_ascii=False, indent=2)
