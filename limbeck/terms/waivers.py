"""Waivers: somebody takes it on themselves, by name, with a reason and until a day, that terms are not kept to.

A waiver is an in-toto statement in a DSSE envelope, signed with the key that signs ledgers. It is about one id of terms
and one declared use, and lets through nothing else.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from limbeck.errors import InputError, Problem
from limbeck.ledger.canonical import digest_json
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.ledger.signing.keys import key_id, signing_key
from limbeck.ledger.signing.statements import STATEMENT, Moment, now
from limbeck.recipe import Recipe, Use
from limbeck.records import Digest
from limbeck.terms.gate import Outcome, Ruling
from limbeck.terms.terms import OWN_MODEL, UNKNOWN, find

WAIVER = "urn:x-limbeck:waiver:1"
LONGEST = 2000
"""Characters of a reason."""

Day = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\d$")]
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class Declared(_Strict):
    """A use, all of it said."""

    distribution: Literal["internal", "hosted", "public-weights"]
    purpose: Literal["general-assistant", "task-specific", "classifier", "research"]
    commercial: bool

    @classmethod
    def of(cls, use: Use) -> Declared:
        """The use of a recipe."""
        return cls.model_validate(use.model_dump())


class _Sha256(_Strict):
    sha256: Hex


class _Subject(_Strict):
    name: str
    digest: _Sha256


class WaiverPredicate(_Strict):
    """Who lets which terms through, for which use, why, and until when."""

    at: Moment
    by: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    expires: Day
    """The last day on which it holds, UTC."""
    reason: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST)]
    terms: str
    use: Declared


class WaiverStatement(_Strict):
    """What is signed. The subject is the row of the register as the signer's limbeck had it."""

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT, alias="_type")
    predicate: WaiverPredicate
    predicate_type: Literal["urn:x-limbeck:waiver:1"] = Field(default=WAIVER, alias="predicateType")
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]


class Waiver(NamedTuple):
    """A waiver, parsed; nothing about it is checked but its form."""

    envelope: Envelope
    said: WaiverPredicate

    @property
    def digest(self) -> Digest:
        """Of its envelope."""
        return self.envelope.digest

    @property
    def last_day(self) -> dt.date:
        """The last day on which it holds."""
        return dt.date.fromisoformat(self.said.expires)

    def problem(self, day: dt.date, key: str) -> str | None:
        """Why it does not hold on `day` where `key` (hex) signs; None where it does."""
        if not self.envelope.signed():
            return "its signature does not hold"
        if self.envelope.keyid != key:
            return f"signed by {self.envelope.keyid}, not by {key}, which signs the ledger"
        return f"expired after {self.said.expires}" if day > self.last_day else None


def make_waiver(terms_id: str, use: Use, *, by: str, reason: str, expires: dt.date) -> Waiver:
    """Sign a waiver.

    Raises:
        InputError: no such terms, nobody's name, no reason, or a day that is past; all of them in one.
    """
    problems = []
    for where, text, longest in (("--by", by, 200), ("--reason", reason, LONGEST)):
        if not text.strip() or len(text) > longest:
            problems.append(Problem(where, f"{len(text)} characters", f"1 to {longest}, not only white space"))
    if expires < (today := dt.datetime.now(dt.UTC).date()):
        problems.append(Problem("--expires", str(expires), f"{today} or later"))
    if terms_id == OWN_MODEL:
        problems.append(Problem("--terms", terms_id, "terms of somebody else; one's own model needs no waiver"))
    try:
        row = _row(terms_id)
    except InputError as error:
        problems += error.problems
        row = ""
    if problems:
        raise InputError("no waiver", problems)
    predicate = WaiverPredicate(
        at=now(), by=by, expires=expires.isoformat(), reason=reason, terms=terms_id, use=Declared.of(use)
    )
    subject = [_Subject(name=f"terms:{terms_id}", digest=_Sha256(sha256=row))]
    statement = WaiverStatement(subject=subject, predicate=predicate)
    return parse_waiver(sign(statement.model_dump(mode="json", by_alias=True), signing_key()))


def _row(terms_id: str) -> str:
    """Hex of the digest of what the register says under an id; of the id where nobody said which terms."""
    told: JsonValue = (
        terms_id if terms_id in (UNKNOWN, OWN_MODEL) else find(terms_id).model_dump(mode="json", exclude_defaults=True)
    )
    return digest_json(told).removeprefix("sha256:")


def parse_waiver(envelope: Envelope) -> Waiver:
    """The waiver of an envelope. Raises `ValueError` where it is malformed."""
    said = envelope.statement()
    statement = WaiverStatement.model_validate(said)
    if statement.model_dump(mode="json", by_alias=True) != said:
        raise ValueError("a statement in another form than it is written in")
    dt.date.fromisoformat(statement.predicate.expires)
    if statement.subject[0].name != f"terms:{statement.predicate.terms}":
        raise ValueError(f"about {statement.subject[0].name}, and it says {statement.predicate.terms}")
    return Waiver(envelope, statement.predicate)


def refuse_other_file(path: Path) -> None:
    """Raises `InputError` where a file that is no waiver would be written over."""
    if not path.exists():
        return
    try:
        parse_waiver(Envelope.model_validate_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        problem = Problem(str(path), "a file that is no waiver", "nothing, or an older waiver", "use another --out")
        raise InputError("will not overwrite a file", [problem]) from None


def read_waivers(recipe: Recipe) -> list[tuple[str, Waiver]]:
    """The waivers that a recipe names, with their files. Raises `InputError` with every file that holds none."""
    found, problems = [], []
    for path in recipe.waivers:
        try:
            text = Path(path).read_text(encoding="utf-8")
            found.append((path, parse_waiver(Envelope.model_validate_json(text))))
        except (OSError, ValueError, RecursionError) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            told = " ".join(said.split())[:300]
            problems.append(Problem(f"waivers: {path}", told, "a waiver", "make it with `limbeck terms waive`"))
    if problems:
        raise InputError("a waiver cannot be read", problems)
    return found


class Waived(NamedTuple):
    """Rulings after waivers, and what was wrong with waivers that could have helped."""

    rulings: list[Ruling]
    used: list[Waiver | None]
    """For each ruling, the waiver that lets it through."""
    unfit: list[Problem]


def apply_waivers(rulings: Iterable[Ruling], use: Use, waivers: Sequence[tuple[str, Waiver]], day: dt.date) -> Waived:
    """Let through what a waiver for the same terms and use, in force on `day`, is there for."""
    key = key_id(signing_key()) if waivers else ""
    result, declared = Waived([], [], []), Declared.of(use)
    unfit: dict[Problem, None] = {}
    for ruling in rulings:
        held = None
        for path, waiver in waivers if not ruling.passes else ():
            said = waiver.said
            if said.terms != ruling.terms:
                continue
            why = waiver.problem(day, key)
            if why is None and said.use != declared:
                why = f"for another use: {json.dumps(said.use.model_dump())}"
            if why is None:
                held = waiver
                break
            remedy = "sign another one with `limbeck terms waive`, or take another teacher or use"
            unfit[Problem(f"waiver {path}", why, f"one for {ruling.terms} that holds on {day}", remedy)] = None
        result.rulings.append(_let_through(ruling, held) if held else ruling)
        result.used.append(held)
    return result._replace(unfit=list(unfit))


def _let_through(ruling: Ruling, waiver: Waiver) -> Ruling:
    said = waiver.said
    told = f"waived by {said.by} until {said.expires}: {said.reason} (without the waiver: {ruling.reason})"
    return ruling._replace(verdict=Outcome.WAIVED, reason=told)
