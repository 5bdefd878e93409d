"""`limbeck terms ...`: the register of terms, and what it says of a recipe. Needs no torch."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from limbeck.recipe import Recipe
    from limbeck.terms.gate import Ruling
    from limbeck.terms.terms import Terms

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Read the register of terms, and ask what it says of a recipe. Not legal advice. Needs no torch.",
)

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("list")
def list_terms(as_json: _Json = False) -> None:
    """List all terms: what each says of training on outputs, and how it was read."""
    from limbeck.terms.terms import register

    rows = register().values()
    if as_json:
        typer.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=1, ensure_ascii=False))
        return
    for row in rows:
        typer.echo(f"{row.id:<46} {row.outputs:<12} {row.scope:<16} {row.read:<14} {row.covers}")


@app.command()
def show(
    terms_id: Annotated[str, typer.Argument(metavar="ID", help="An id of the register.")], as_json: _Json = False
) -> None:
    """Show one version of terms: clause, paraphrase, exceptions, and what travels with the student."""
    from limbeck.terms.terms import find

    row = find(terms_id)
    typer.echo(row.model_dump_json(indent=1) if as_json else _row_text(row))


@app.command()
def check(
    recipe_or_run: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or the directory of a run (its recipe is read).")
    ],
    day: Annotated[
        str | None,
        typer.Option("--day", metavar="YYYY-MM-DD", help="Day on which the outputs are generated; today without it."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Ask what the terms say of each teacher's outputs for the declared use, before anything is spent.

    For a run that has answers, the days on which they were written decide, unless --day says otherwise. Exit code 0:
    allowed; 1: refused or unknown, which refuses too.
    """
    from limbeck.terms.gate import rule, strictest

    recipe = _recipe_of(recipe_or_run)
    asked = _asked(recipe, recipe_or_run, day)
    rulings = [(name, when, rule(terms_id, recipe.use, when)) for name, terms_id, when in asked]
    whole = strictest(ruling for _, _, ruling in rulings)
    if as_json:
        teachers = [{"teacher": name, "day": str(when)} | _as_json(ruling) for name, when, ruling in rulings]
        result = _as_json(whole) | {"use": recipe.use.model_dump(mode="json"), "teachers": teachers}
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        typer.echo(_check_text(recipe, rulings, whole))
    if not whole.passes:
        raise typer.Exit(1)


def _asked(recipe: Recipe, path: Path, day: str | None) -> list[tuple[str, str, dt.date]]:
    """Teacher, terms and day of everything that is to be ruled on, sorted."""
    from limbeck.records import Completion
    from limbeck.tables import read_records

    answers = path / "completions.parquet"
    if day is None and answers.is_file():
        return sorted({(c.teacher, c.terms, c.created.date()) for c in read_records(answers, Completion)})
    when = _day(day)
    return sorted((teacher.name, teacher.terms, when) for teacher in recipe.teachers)


def _recipe_of(path: Path) -> Recipe:
    from limbeck.recipe_file import load_recipe
    from limbeck.rundir import RunDir

    return RunDir(path).recipe() if path.is_dir() else load_recipe(path)


def _day(text: str | None) -> dt.date:
    from limbeck.errors import InputError, Problem

    if text is None:
        return dt.datetime.now(dt.UTC).date()
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise InputError("not a day", [Problem("--day", text, "a day as 2026-11-24")]) from None


def _as_json(ruling: Ruling) -> dict[str, object]:
    return {
        "verdict": ruling.verdict.value,
        "terms": ruling.terms,
        "clause": ruling.clause,
        "reason": ruling.reason,
        "obligations": [o.model_dump(mode="json", exclude={"when", "text"}) for o in ruling.obligations],
    }


def _check_text(recipe: Recipe, rulings: list[tuple[str, dt.date, Ruling]], whole: Ruling) -> str:
    use = recipe.use
    lines = [
        f"{whole.verdict.value}: for a student that is {use.distribution}, {use.purpose}, "
        f"{'commercial' if use.commercial else 'not commercial'}"
    ]
    for name, when, ruling in rulings:
        lines += ["", f"{name}, outputs generated on {when}", f"  {ruling.verdict.value} under {ruling.terms}"]
        lines.append(f"  {ruling.reason}")
        if ruling.clause:
            lines.append(f"  clause: {ruling.clause}")
    if whole.obligations:
        lines += ["", "What travels with the student:", *(f"  {o.kind}: {o.value}" for o in whole.obligations)]
    lines += ["", "Our reading of the register's rows; not legal advice."]
    return "\n".join(lines)


def _row_text(row: Terms) -> str:
    lines = [
        row.id,
        f"  {row.holder}: {row.covers}",
        f"  route {row.route}, {row.kind}, holds from {row.effective}"
        + (f" until {row.superseded}" if row.superseded else ""),
        f"  read on {row.retrieved}: {row.read}; {row.address}",
        f"  clause: {row.clause}",
        f"  training on outputs: {row.outputs} ({row.scope})",
        f"  {row.says}",
    ]
    for title, clauses in (("refused", row.forbidden), ("excepted", row.exceptions)):
        lines += [f"  {title} for {_when(c.when)}: {c.says} ({c.clause})" for c in clauses]
    lines += [f"  travels with the student, for {_when(o.when)}: {o.kind}: {o.value}" for o in row.obligations]
    return "\n".join([*lines, f"  {row.note}"] if row.note else lines)


def _when(when: object) -> str:
    from limbeck.terms.terms import When

    assert isinstance(when, When)
    parts = [" or ".join(values) for values in (when.distribution, when.purpose) if values]
    if when.commercial is not None:
        parts.append("commercial" if when.commercial else "not commercial")
    return ", ".join(parts) or "every use"
