"""Faults of what an example was made from: in a table alone, and with all of the ledger written anew to agree with it;
and of the version of leaves, which says how that is told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import runs

from faults import forger
from faults.kit import Case, Fault
from faults.rows import rewritten
from limbeck.ledger.merkle.fields import commit, encode
from limbeck.ledger.merkle.order import leaf_sets
from limbeck.ledger.sealing import Row, known_salts, parse_row
from limbeck.ledger.store import Ledger

ROW = 3
"""Of leaves.parquet: the fifth prompt's, which was written from a seed and from the third prompt."""
EDITS: dict[str, Callable[[list, list], list]] = {
    "dropped": lambda own, _: own[:-1],
    "swapped with another's": lambda own, other: [*own[:-1], other[-1]],
    "in another order": lambda own, _: own[::-1],
    "altered": lambda own, _: [*own[:-1], edited_digest(own[-1])],
    "of another kind": lambda own, _: [*own[:-1], edited_kind(own[-1])],
}
"""Of the parents of a row, and of those of another."""


def edited_digest(parent: list | dict) -> list | dict:
    other = forger.tagged(b"another")
    return [parent[0], other] if isinstance(parent, list) else parent | {"id": other}


def edited_kind(parent: list | dict) -> list | dict:
    return ["document", parent[1]] if isinstance(parent, list) else parent | {"kind": "document"}


def later() -> str:
    """The last prompt's id."""
    return runs._prompt(runs.PROMPTS - 1).id


def column(path: Path, name: str, change: Callable[[list[str | None]], None]) -> None:
    """Other texts in a column."""
    table = pq.read_table(path)
    values = table.column(name).to_pylist()
    change(values)
    at = table.schema.get_field_index(name)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, pa.string())), path)


def in_leaves(edit: Callable[[list, list], list]) -> Callable[[Case], None]:
    """The value in leaves.parquet; the completion stays where it is."""

    def change(values: list[str | None]) -> None:
        own, other = (json.loads(values[row] or "") for row in (ROW, ROW + 1))
        own["parents"] = [own["parents"][0], *edit(own["parents"][1:], other["parents"][1:])]
        values[ROW] = json.dumps(own, sort_keys=True, separators=(",", ":"))

    return lambda case: column(case.run / "leaves.parquet", "fields", change)


def in_prompts(edit: Callable[[list, list], list]) -> Callable[[Case], None]:
    """What prompts.parquet says that the fifth prompt was made from."""

    def change(values: list[str | None]) -> None:
        own, other = (json.loads(values[row] or "") for row in (4, 5))
        values[4] = json.dumps(edit(own, other), separators=(",", ":"))

    return lambda case: column(case.run / "prompts.parquet", "parents", change)


def anew(do: Callable[[Case], None], name: str) -> Callable[[Case], None]:
    """The table, and every entry that wrote or read it; chain, tree and signatures agree."""

    def done(case: Case) -> None:
        do(case)
        case.rewrite(rewritten(case, name))

    return done


def sealed_anew(change_leaves: Callable[[Case], None]) -> Callable[[Case], None]:
    """By somebody who has the secret: the leaf and its salts agree with the other value, and all of the ledger."""

    def do(case: Case) -> None:
        change_leaves(case)
        path = case.run / "leaves.parquet"
        with Ledger(case.run / "ledger.db", read_only=True) as ledger:
            sets = leaf_sets(ledger.entries())
        salts = known_salts(sets[-1])
        assert salts is not None
        table = pq.read_table(path)
        row = Row(*(table.column(name)[ROW].as_py() for name in ("fields", "share", "leaf")))
        leaf = commit(salts, ROW, encode(parse_row(row)), 2).hash
        leaves = [*table.column("leaf").to_pylist()[:ROW], leaf, *table.column("leaf").to_pylist()[ROW + 1 :]]
        pq.write_table(table.set_column(2, table.schema.field(2), pa.array(leaves, pa.binary(32))), path)
        change = rewritten(case, "leaves.parquet")

        def both(bodies: list[dict], examples: dict[int, list[bytes]]) -> None:
            change(bodies, examples)
            examples[5][ROW] = leaf

        case.rewrite(both)

    return do


def version(number: object) -> Callable[[Case], None]:
    return lambda case: case.rewrite(lambda bodies, _: bodies[5]["facts"]["leaves"].update(version=number))


def older_after_newer(case: Case) -> None:
    """Everything is sealed once more, as leaves of the older version."""

    def change(bodies: list[dict], examples: dict[int, list[bytes]]) -> None:
        again = json.loads(json.dumps(bodies[5]))
        again["facts"]["leaves"]["version"] = 1
        examples[len(bodies)] = list(examples[5])
        bodies.append(again)

    case.rewrite(change)


PARQUET = "it reads no Parquet, and everything that it reads agrees"
_HASHES = "the hashes of examples have salts: that a number does not fit them shows where they are known"
FAULTS = [
    *(
        Fault(f"parents of a row of leaves: {how}", in_leaves(edit), "leaves.parquet", f"leaves.parquet: row {ROW}: p")
        for how, edit in EDITS.items()
    ),
    *(
        Fault(f"parents of a row of prompts: {how}", in_prompts(edit), "prompts.parquet", f"row {ROW}: parents")
        for how, edit in EDITS.items()
    ),
    *(
        Fault(
            f"parents of a row of leaves: {how}, all sealed and signed anew",
            sealed_anew(in_leaves(edit)),
            "",
            f"leaves.parquet: row {ROW}: parents",
            unseen=PARQUET,
        )
        for how, edit in EDITS.items()
    ),
    *(
        Fault(
            f"parents of a row of prompts: {how}, all signed anew",
            anew(in_prompts(edit), "prompts.parquet"),
            "",
            f"leaves.parquet: row {ROW}: parents",
            unseen=PARQUET,
        )
        for how, edit in EDITS.items()
    ),
    Fault(
        "an earlier prompt that is no prompt of the run",
        anew(in_prompts(EDITS["altered"]), "prompts.parquet"),
        "",
        "prompts.parquet: row 4: parents",
        unseen=PARQUET,
    ),
    Fault(
        "an earlier prompt that comes later",
        anew(in_prompts(lambda own, _: [own[0], own[1] | {"id": later()}]), "prompts.parquet"),
        "",
        "prompts.parquet: row 4: parents",
        unseen=PARQUET,
    ),
    Fault("leaves of an unknown version", version(3), "entry 5: facts: leaves: version", "entry 5: facts: leaves"),
    Fault("leaves of version 0", version(0), "entry 5: facts: leaves: version", "entry 5: facts: leaves"),
    Fault("leaves of version true", version(True), "entry 5: facts: leaves: version", "entry 5: facts: leaves"),
    Fault("leaves of version 2 as text", version("2"), "entry 5: facts: leaves: version", "entry 5: facts: leaves"),
    Fault(
        "leaves said to be older",
        lambda case: case.sql(
            "UPDATE entries SET body = replace(body, '\"version\":2', '\"version\":1') WHERE idx = 5"
        ),
        "entry 5",
    ),
    Fault(
        "leaves said to be older, all signed anew",
        version(1),
        "",
        f"leaves.parquet: row {ROW}: hash of fields and salts",
        unseen=_HASHES,
    ),
    Fault(
        "older leaves after newer ones",
        older_after_newer,
        "entry 14: facts: leaves: version",
        "entry 14: facts: leaves",
    ),
]
