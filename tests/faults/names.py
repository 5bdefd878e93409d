"""Faults of how a provider named an answer and what gave it: in a table alone, and with all of the ledger written anew
to agree with it. The answers themselves are of a teacher on this machine and have no such names; those of endpoints are
in tests/test_exchanges.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from faults.kit import Case, Fault
from faults.parents import PARQUET, ROW, anew, column, sealed_anew

COMPLETION = 4
"""The row of completions.parquet that the row of leaves.parquet is of."""
FIELDS = {"answer_id": ("response", "id"), "fingerprint": ("weights", "fingerprint")}
"""Where a leaf has what a completion has under this name."""
EDITS: dict[str, Callable[[dict], object]] = {
    "altered": lambda value: value | {next(key for key in value if key != "digest"): "another"},
    "left out": lambda value: {"digest": value["digest"]},
    "as leaves of version 1 have it": lambda value: value["digest"],
}


def in_completions(name: str) -> Callable[[Case], None]:
    """A name that no provider gave."""

    def change(values: list[str | None]) -> None:
        values[COMPLETION] = "another"

    return lambda case: column(case.run / "completions.parquet", name, change)


def in_leaves(field: str, edit: Callable[[dict], object]) -> Callable[[Case], None]:
    def change(values: list[str | None]) -> None:
        own = json.loads(values[ROW] or "")
        own[field] = edit(own[field])
        values[ROW] = json.dumps(own, sort_keys=True, separators=(",", ":"))

    return lambda case: column(case.run / "leaves.parquet", "fields", change)


FAULTS = [
    *(
        fault
        for name, (field, _) in FIELDS.items()
        for fault in (
            Fault(
                f"{name} of a completion altered",
                in_completions(name),
                "completions.parquet",
                f"completions.parquet: row {COMPLETION}: {name} answered",
            ),
            Fault(
                f"{name} of a completion altered, all signed anew",
                anew(in_completions(name), "completions.parquet"),
                "",
                f"completions.parquet: row {COMPLETION}: {name} answered",
                unseen=PARQUET,
            ),
            *(
                Fault(
                    f"{name} of a leaf {how}",
                    in_leaves(field, edit),
                    "leaves.parquet",
                    f"leaves.parquet: row {ROW}: {field}",
                )
                for how, edit in EDITS.items()
            ),
            *(
                Fault(
                    f"{name} of a leaf {how}, all sealed and signed anew",
                    sealed_anew(in_leaves(field, edit)),
                    "",
                    f"leaves.parquet: row {ROW}: {field}",
                    unseen=PARQUET,
                )
                for how, edit in EDITS.items()
            ),
        )
    ),
]
