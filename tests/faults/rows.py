"""Faults of the rows of tables: dropped, reordered, doubled; in the file alone, and with all of the ledger written anew
to agree with it.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.parquet as pq

from faults.kit import Case, Fault
from limbeck.ledger.canonical import digest_file, digest_path, manifest

TABLES = {
    "leaves.parquet": ("leaves.parquet: row 1", "leaves.parquet: row 1", "leaves.parquet: row 2"),
    "completions.parquet": ("verdicts.parquet: row 1", "verdicts.parquet: row 1", "completions.parquet: row 2"),
    "verdicts.parquet": ("verdicts.parquet: row 1", "verdicts.parquet: row 1", "verdicts.parquet: row 2"),
    "examples/examples.parquet": ("leaves.parquet: row 1", "examples: row 2: parent", "examples: row 2: parent"),
}
"""Which row the first verifier names, by the edits below."""
EDITS: dict[str, Callable[[list[int]], list[int]]] = {
    "dropped": lambda rows: [*rows[:1], *rows[2:]],
    "reordered": lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
    "doubled": lambda rows: [*rows[:2], *rows[1:]],
}
"""Of the places of a table's rows."""


def edited(name: str, edit: Callable[[list[int]], list[int]]) -> Callable[[Case], None]:
    """The file alone."""

    def do(case: Case) -> None:
        table = pq.read_table(case.run / name)
        pq.write_table(table.take(edit(list(range(len(table))))), case.run / name, compression="zstd")

    return do


def forged(name: str, edit: Callable[[list[int]], list[int]]) -> Callable[[Case], None]:
    """The file, and every entry that wrote or read it; chain, tree and signatures agree."""

    def do(case: Case) -> None:
        edited(name, edit)(case)
        case.rewrite(rewritten(case, name))

    return do


def rewritten(case: Case, name: str) -> Callable[[list[dict], object], None]:
    """A change of entries that makes them agree with what lies there under a name."""
    top = name.split("/")[0]
    digest = digest_path(case.run / top) if "/" in name else digest_file(case.run / name)

    def change(bodies: list[dict], _: object) -> None:
        for body in bodies:
            for side in ("inputs", "outputs"):
                if top in body[side]:
                    body[side][top] = digest
            if top in body["facts"].get("manifests", {}):
                body["facts"]["manifests"][top] = manifest(case.run / top)

    return change


_PARQUET = "it reads no Parquet, and everything that it reads agrees"
FAULTS = [
    *(
        Fault(f"a row of {name} {how}", edited(name, EDITS[how]), name, where)
        for name, wheres in TABLES.items()
        for how, where in zip(EDITS, wheres, strict=True)
    ),
    *(
        Fault(f"a row of {name} {how}, all written anew", forged(name, EDITS[how]), "", where, unseen=_PARQUET)
        for name, wheres in TABLES.items()
        for how, where in zip(EDITS, wheres, strict=True)
    ),
]
