"""`limbeck export`: a run in the formats that others ask for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.edge import writing


class To(StrEnum):
    """The formats, by the names of the command line."""

    CARD = "card"
    DATA_CARD = "data-card"
    GGUF = "gguf"
    SPDX = "spdx"
    CYCLONEDX = "cyclonedx"
    CROISSANT = "croissant"
    EU_SUMMARY = "eu-summary"


class Precision(StrEnum):
    """How a GGUF file stores the weights."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    to: Annotated[To, typer.Option("--to", help="The format.", case_sensitive=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write to a new file; without it, standard output (not for gguf)."),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option("--precision", help="Of the weights in a GGUF file; auto is the student's own."),
    ] = Precision.AUTO,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --out: print name, size and digest of the file as JSON.")
    ] = False,
) -> None:
    """Hand a run to others in a format they know, made from its ledger and records.

    card and data-card are for the Hugging Face hub, gguf is the student for llama.cpp and its kin, spdx (3.0.1),
    cyclonedx (1.7) and croissant (1.1) are what inventories and data catalogues read, eu-summary is the public summary
    of training content that Article 53(1)(d) of the EU's AI Act asks for. Each names the teachers, their shares of the
    supervised tokens, their terms, and the ledger's root and signer.

    The ledger is verified first. Exit code 0: exported; 1: the ledger does not verify, nothing is exported; 2: not a
    finished run, or a student that the format cannot hold.
    """
    from limbeck.export.facts import read_facts
    from limbeck.export.formats import DOCUMENTS, GGUF

    _refuse(to, out, precision, as_json)
    facts = read_facts(run)
    if to == GGUF:
        from limbeck.export.gguf_file import write_gguf

        assert out is not None
        with writing(out.parent):
            write_gguf(facts, out, precision.value)
    else:
        text = next(one for one in DOCUMENTS if one.name == to).make(facts)
        if out is None:
            typer.echo(text, nl=False)
            return
        from limbeck.cli.ledger import write_new

        write_new(out, text.encode())
    _told(to, out, as_json)


def _refuse(to: To, out: Path | None, precision: Precision, as_json: bool) -> None:
    """What the options do not go together with, before the run is read."""
    from limbeck.errors import InputError, Problem

    problems = []
    if out is None and (to is To.GGUF or as_json):
        problems.append(Problem("--out", "nothing", "a file to write", "add --out FILE"))
    if out is not None and out.exists():
        problems.append(Problem(str(out), "something is there", "nothing there yet", "use another name, or remove it"))
    if to is not To.GGUF and precision is not Precision.AUTO:
        problems.append(Problem("--precision", precision.value, f"nothing with --to {to.value}", "leave it out"))
    if problems:
        raise InputError("nothing was exported", problems)


def _told(to: To, out: Path, as_json: bool) -> None:
    from limbeck.cli.ledger import as_json_text
    from limbeck.ledger.canonical import digest_file

    values = {"to": to.value, "file": str(out), "bytes": out.stat().st_size, "digest": digest_file(out)}
    line = f"wrote {out}: {values['bytes']:,} bytes, {values['digest']}"
    typer.echo(as_json_text(values) if as_json else line)
