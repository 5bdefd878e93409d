"""What `limbeck ledger verify --audit` adds: stored signals against a fresh pass of the teacher. Imports torch."""

from __future__ import annotations

import json
import math
import secrets
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.errors import InputError, Problem, StaleError
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal.audit import Audit, audit


class Audited(NamedTuple):
    """An audit in words and numbers."""

    share: float
    seed: int
    """What the examples were drawn with: a new one each time, so that nobody knows beforehand which are looked at."""
    found: Audit | None
    """None where the store could not be opened."""
    problems: tuple[Problem, ...]

    def values(self) -> dict[str, JsonValue]:
        """For JSON; a mean of nothing is null."""
        told = self.found._asdict() if self.found else {}
        numbers = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in told.items() if k != "problems"}
        problems: list[JsonValue] = [dict(p._asdict()) for p in self.problems]
        return {"share": self.share, "seed": self.seed, "ok": not self.problems, **numbers, "problems": problems}

    def lines(self) -> list[str]:
        """For people: every problem, then what was looked at."""
        told = [line for problem in self.problems for line in str(problem).split("\n")]
        if self.found is None:
            return [*told, "NOT audited: the signals cannot be read"]
        count = len(self.problems)
        verdict = "nothing differs" if not count else f"NOT confirmed, {count} difference{'s' * (count > 1)}"
        looked = f"{self.found.examples} examples drawn with seed {self.seed}, {self.found.positions} positions"
        mean = f"stored probabilities are {self.found.head_difference:.2g} off on average"
        return [*told, f"audited against the teacher: {verdict}; {looked}, {mean}"]


def audit_run(run: Path, share: float) -> Audited:
    """Audit the signals of a RUN directory.

    Raises:
        InputError: a share that is none; nothing is stored that could be audited; the teacher cannot be had.

    """
    if not 0 < share <= 1:
        problem = Problem("--audit-share", str(share), "a share above 0, at most 1")
        raise InputError("not a share of the examples", [problem])
    root, seed = RunDir(run), secrets.randbelow(2**32)
    try:
        found = audit(root / "signals", root.recipe(), read_examples(root / "examples"), share=share, seed=seed)
    except StaleError as error:  # what the digests say is a difference, as everywhere in a verification
        return Audited(share, seed, None, error.problems)
    return Audited(share, seed, found, found.problems)


def with_audit(verification: str, audited: Audited) -> str:
    """The verification's JSON with the audit beside it."""
    told = json.loads(verification)
    told |= {"ok": told["ok"] and not audited.problems, "audit": audited.values()}
    return json.dumps(told, ensure_ascii=False, indent=2)
