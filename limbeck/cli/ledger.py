"""`limbeck ledger ...`: read the evidence. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limbeck.cli.edge import printable

if TYPE_CHECKING:
    from limbeck.ledger.verification import Verification
    from limbeck.records import Entry

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Read and verify what a run recorded about itself. Needs no torch.",
)

_RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


_Head = Annotated[
    str | None,
    typer.Option("--head", metavar="DIGEST", help="A head digest noted down earlier; the ledger must still hold it."),
]


@app.command()
def verify(run: _RunPath, head: _Head = None, as_json: _Json = False) -> None:
    """Recompute everything the ledger says and list every difference.

    Exit code 0: nothing differs; 1: something does; 2: not a run.
    """
    from limbeck.ledger import verify as recompute

    result = recompute(run, head=head)
    typer.echo(result.to_json() if as_json else _verification_text(result))
    if not result.ok:
        raise typer.Exit(1)


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
    lines = [line for problem in result.differences for line in str(problem).split("\n")]
    count = len(result.differences)
    verdict = "verified: nothing differs" if result.ok else f"NOT verified: {count} difference{'s' * (count > 1)}"
    notes = [f"note: {note}" for note in result.notes]
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
        lines.append(f"{entry.index:>3}  {entry.finished:%Y-%m-%d %H:%M:%SZ}  {entry.stage}  ({seconds:.1f} s, {code})")
        lines.append(f"     entry  {entry_digest(entry)}")
        lines += [f"     read   {digest}  {name}" for name, digest in sorted(entry.inputs.items())]
        lines += [f"     wrote  {digest}  {name}" for name, digest in sorted(entry.outputs.items())]
    return printable("\n".join(lines) or "no entries yet")


def _log_json(entries: list[Entry]) -> str:
    import json

    from limbeck.ledger.store import entry_digest

    rows = [{"digest": entry_digest(entry)} | entry.model_dump(mode="json") for entry in entries]
    return json.dumps(rows, ensure_ascii=False, indent=2)
