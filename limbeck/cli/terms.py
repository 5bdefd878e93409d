"""`limbeck terms ...`: the register of terms, and what it says of a recipe. Needs no torch."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from limbeck.recipe import Recipe
    from limbeck.terms.gate import Ruling
    from limbeck.terms.rulings import Judged, Ruled
    from limbeck.terms.terms import Only, Terms, When

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

    `limbeck run` asks the same. For a run that has answers, the days on which they were generated decide, unless --day
    says otherwise. Exit code 0: allowed, or let through by a waiver; 1: refused or unknown, which refuses too; 2: the
    use is allowed, but the recipe's name is not one that the terms ask for, and `limbeck run` would stop at that.
    """
    from limbeck.errors import RecipeError
    from limbeck.terms.gate import strictest
    from limbeck.terms.obligations import name_problems
    from limbeck.terms.stage import refusals

    recipe = _recipe_of(recipe_or_run)
    judged = _judged(recipe, recipe_or_run, day)
    whole = strictest(one.ruling for one in judged.ruled)
    unmet = name_problems(recipe.name, whole.obligations)
    if as_json:
        teachers = [
            {"teacher": one.name, "role": one.role, "route": one.route, "day": str(one.day) if one.day else None}
            | _as_json(one.ruling)
            for one in judged.ruled
        ]
        more = {"unmet": [problem._asdict() for problem in unmet], "refusals": [p._asdict() for p in refusals(judged)]}
        result = _as_json(whole) | {"use": recipe.use.model_dump(mode="json"), "teachers": teachers} | more
        typer.echo(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        typer.echo(_check_text(recipe, judged.ruled, whole))
        for problem in (*unmet, *judged.unfit):
            typer.echo(f"\n{problem}")
        if whole.passes and unmet:
            typer.echo("\nThe student needs another name: until it has one, nothing is bought and nothing trained.")
    if not whole.passes:
        raise typer.Exit(1)
    if unmet:
        raise typer.Exit(RecipeError.exit_code)


@app.command()
def waive(
    recipe_or_run: Annotated[
        Path,
        typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or the directory of a run: the use it declares."),
    ],
    terms: Annotated[str, typer.Option("--terms", metavar="ID", help="The terms that are not kept to.")],
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Who takes it on themselves.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, in words that will be published.")],
    expires: Annotated[
        str, typer.Option("--expires", metavar="YYYY-MM-DD", help="The last day on which it holds, UTC.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the waiver goes.")],
) -> None:
    """Sign a waiver: the terms ID shall not refuse the recipe's use, until a day. Name it in the recipe under waivers.

    It is signed with the key that signs ledgers, and stands in the ledger, the card and the report of every run that it
    lets through. It holds for these terms and this use only, and is no permission by the owner of the teacher.
    """
    from limbeck.cli.edge import writing
    from limbeck.rundir import atomic
    from limbeck.terms.waivers import make_waiver, refuse_other_file

    recipe = _recipe_of(recipe_or_run)
    last = _day(expires, "--expires")
    refuse_other_file(out)
    made = make_waiver(terms, recipe.use, by=by, reason=reason, expires=last)
    with writing(out), atomic(out) as half:
        half.write_bytes(made.envelope.data + b"\n")
    typer.echo(f"{out}: signed by {made.envelope.keyid}\nname it in the recipe: waivers: [{out}]")


def _judged(recipe: Recipe, path: Path, day: str | None) -> Judged:
    """The rulings on everything that counts: as the gate would give them."""
    from limbeck.terms.rulings import judge
    from limbeck.terms.sources import answered, declared, today

    if day is None and (path / "completions.parquet").is_file():
        return judge(recipe, answered(recipe, path, today()), today())
    return judge(recipe, declared(recipe, _day(day, "--day")), today())


def _recipe_of(path: Path) -> Recipe:
    from limbeck.recipe_file import load_recipe
    from limbeck.rundir import RunDir

    return RunDir(path).recipe() if path.is_dir() else load_recipe(path)


def _day(text: str | None, option: str) -> dt.date:
    from limbeck.errors import InputError, Problem

    if text is None:
        return dt.datetime.now(dt.UTC).date()
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise InputError("not a day", [Problem(option, text, "a day as 2026-11-24")]) from None


def _as_json(ruling: Ruling) -> dict[str, object]:
    return {
        "verdict": ruling.verdict.value,
        "terms": ruling.terms,
        "clause": ruling.clause,
        "reason": ruling.reason,
        "obligations": [o.model_dump(mode="json", exclude={"when", "text"}) for o in ruling.obligations],
    }


def _check_text(recipe: Recipe, ruled: Sequence[Ruled], whole: Ruling) -> str:
    use = recipe.use
    lines = [
        f"{whole.verdict.value}: for a student that is {use.distribution}, {use.purpose}, "
        f"{'commercial' if use.commercial else 'not commercial'}"
    ]
    for one in ruled:
        when = one.day or "a day that nobody said"
        lines += ["", f"{one.role} of {one.name}, by the route {one.route}, generated on {when}"]
        lines += [f"  {one.verdict.value} under {one.terms}", f"  {one.reason}"]
        if one.clause:
            lines.append(f"  clause: {one.clause}")
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


def _when(when: When | Only) -> str:
    parts = [" or ".join(values) for values in (when.distribution, when.purpose) if values]
    if isinstance(when.commercial, bool):
        parts.append("commercial" if when.commercial else "not commercial")
    return ", ".join(parts) or "every use"
