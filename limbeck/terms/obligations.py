"""What the terms of a teacher's outputs ask of the student, carried out: its name, the notices beside its weights, the
words that have to be shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.errors import Problem
from limbeck.terms.rulings import Ruled
from limbeck.terms.terms import Obligation, find

NOTICE = "NOTICE"
"""The file beside the weights."""


def name_problems(name: str, obligations: Iterable[Obligation]) -> list[Problem]:
    """Where the student's name does not begin as licences ask."""
    prefixes = sorted({o.value for o in obligations if o.kind == "name-prefix"})
    if len(prefixes) > 1:
        told = f"licences that ask for names beginning with {' and with '.join(prefixes)}"
        return [Problem("name", told, "one beginning", "leave out the teachers of all but one of them")]
    return [
        Problem("name", name, f"a name that begins with {prefix}, as a teacher's licence asks", _remedy(prefix, name))
        for prefix in prefixes
        if not name.startswith(prefix)
    ]


def _remedy(prefix: str, name: str) -> str:
    return f"set name: {prefix}-{name}, or use: distribution: internal, if nobody outside gets the student"


def shown(obligations: Iterable[Obligation]) -> list[str]:
    """The words that have to be shown with the student."""
    return list(dict.fromkeys(o.text for o in obligations if o.kind == "display" and o.text))


def notice(ruled: Sequence[Ruled]) -> str:
    """The text of the file NOTICE; empty where no terms ask for one."""
    parts: dict[str, list[str]] = {}
    for one in ruled:
        due = [o for o in one.obligations if o.kind != "name-prefix"]
        lines = parts.setdefault(one.terms, []) if due else []
        lines += [line for o in due for line in _lines(o) if line not in lines]
    if not parts:
        return ""
    told = ["This model was trained on outputs of other models. Their terms ask for what follows."]
    for terms, lines in sorted(parts.items()):
        row = find(terms)
        told += ["", f"{row.holder}: {row.covers} ({row.id}, {row.clause}, {row.address})", *lines]
    return "\n".join(told) + "\n"


def _lines(o: Obligation) -> list[str]:
    return [f"  {o.kind}: {o.value}", *([f"  {o.text}"] if o.text and o.text != o.value else [])]
