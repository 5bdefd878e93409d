"""The token that the gate issues and the trainer asks for: an in-toto statement about the root over a set of examples,
in a DSSE envelope signed with the key that signs ledgers.

What it binds: the root over the leaves of the set, their number, the recipe and its use, the rulings and the verdict on
every row by the digests of their files, and the waivers that let something through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from limbeck.errors import Problem, RefusedError
from limbeck.ledger.canonical import digest_bytes, digest_file, digest_json
from limbeck.ledger.merkle.tree import root
from limbeck.ledger.sealing import parse_row, read_rows
from limbeck.ledger.signing.envelope import Envelope, sign
from limbeck.ledger.signing.keys import key_id, signing_key
from limbeck.ledger.signing.statements import STATEMENT, Count, Hex, Moment, now
from limbeck.recipe import Recipe
from limbeck.records import Example
from limbeck.rundir import RunDir
from limbeck.terms.gate import Outcome
from limbeck.terms.rulings import GATE, ROWS, RULINGS, TOKEN, Rulings
from limbeck.terms.sources import signals, today
from limbeck.terms.waivers import Declared, Waiver, parse_waiver

PREDICATE = "urn:x-limbeck:gate:1"
_SUBJECT = "examples"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class _Sha256(_Strict):
    sha256: Hex


class _Subject(_Strict):
    name: Literal["examples"] = _SUBJECT
    digest: _Sha256


class TokenPredicate(_Strict):
    """What the gate decided, and on what. Digests are hex."""

    at: Moment
    count: Count
    """Examples of the set."""
    recipe: Hex
    rows: Hex
    """Of RUN/gate/rows.parquet."""
    rulings: Hex
    """Of RUN/gate/rulings.json."""
    use: Declared
    verdict: Literal["allowed", "waived"]
    waivers: list[Hex]
    """Of the envelopes of the waivers that let something through, sorted."""


class TokenStatement(_Strict):
    """What is signed; the subject is the root over the leaves of the set (RFC 9162), by themselves."""

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT, alias="_type")
    predicate: TokenPredicate
    predicate_type: Literal["urn:x-limbeck:gate:1"] = Field(default=PREDICATE, alias="predicateType")
    subject: Annotated[list[_Subject], Field(min_length=1, max_length=1)]

    @property
    def root(self) -> str:
        """Hex of the root."""
        return self.subject[0].digest.sha256


class TokenFile(_Strict):
    """RUN/gate/token.json, which the entry of the gate holds too."""

    token: Envelope
    waivers: list[Envelope] = []


def hex_of(digest: str) -> str:
    """The digits of a tagged digest."""
    return digest.removeprefix("sha256:")


def issue(
    recipe: Recipe, directory: Path, *, root: bytes, count: int, verdict: Outcome, waivers: Sequence[Waiver]
) -> TokenFile:
    """Sign a token for a set, whose rulings lie in `directory`."""
    ordered = sorted(waivers, key=lambda waiver: waiver.digest)
    predicate = TokenPredicate.model_validate(
        {
            "at": now(),
            "count": count,
            "recipe": hex_of(recipe.digest),
            "rows": hex_of(digest_file(directory / ROWS)),
            "rulings": hex_of(digest_file(directory / RULINGS)),
            "use": Declared.of(recipe.use),
            "verdict": verdict.value,
            "waivers": [hex_of(waiver.digest) for waiver in ordered],
        }
    )
    statement = TokenStatement(subject=[_Subject(digest=_Sha256(sha256=root.hex()))], predicate=predicate)
    envelope = sign(statement.model_dump(mode="json", by_alias=True), signing_key())
    return TokenFile(token=envelope, waivers=[waiver.envelope for waiver in ordered])


def parse_token(envelope: Envelope) -> TokenStatement:
    """What a token says. Raises `ValueError` where it is malformed."""
    said = envelope.statement()
    statement = TokenStatement.model_validate(said)
    if statement.model_dump(mode="json", by_alias=True) != said:
        raise ValueError("a statement in another form than it is written in")
    return statement


def require_token(recipe: Recipe, run: RunDir, examples: Sequence[Example]) -> None:
    """Refuse to go on unless RUN has a token of the gate for exactly these examples, by this machine's key, for the
    recipe's use and the teachers it learns from, with waivers that hold today. `examples` are all of RUN/examples, in
    their order.

    Raises:
        RefusedError: everything that is not so.
    """
    if problems := list(_problems(recipe, run, examples)):
        raise RefusedError("the terms gate did not let this set through", problems)


_ANEW = "run the recipe with `limbeck run`: the gate then rules anew, or says what refuses"


def _problems(recipe: Recipe, run: RunDir, examples: Sequence[Example]) -> Iterator[Problem]:
    where, place = f"{GATE}/{TOKEN}", run / GATE
    if not (place / TOKEN).is_file():
        yield Problem(str(place / TOKEN), "nothing", "a token that the stage gate issued", _ANEW)
        return
    try:
        file = TokenFile.model_validate_json((place / TOKEN).read_bytes())
        token, waivers = parse_token(file.token), [parse_waiver(one) for one in file.waivers]
        hashes, told = _set(run.root)
        ruled = Rulings.model_validate_json((place / RULINGS).read_bytes())
        digests = {name: hex_of(digest_file(place / name)) for name in (RULINGS, ROWS)}
    except (OSError, ValueError, KeyError, RecursionError) as error:
        yield Problem(where, " ".join(str(error).split())[:300], "a token of version 1 and its files", _ANEW)
        return
    said, key, day = token.predicate, key_id(signing_key()), today()
    if not file.token.signed() or file.token.keyid != key:
        yield Problem(f"{where}: signature", f"not a signature of {key}", "one by this machine's key", _ANEW)
    pairs: list[tuple[str, object, object]] = [
        ("set", token.root, root(hashes).hex()),
        ("count", said.count, len(hashes)),
        ("use", said.use.model_dump(), Declared.of(recipe.use).model_dump()),
        (RULINGS, said.rulings, digests[RULINGS]),
        (ROWS, said.rows, digests[ROWS]),
        ("waivers", said.waivers, [hex_of(waiver.digest) for waiver in waivers]),
        ("examples", digest_json(told), digest_json([_id(example) for example in examples])),
    ]
    for name, found, due in pairs:
        if found != due:
            yield Problem(f"{where}: {name}", str(found), f"{due}, as they are in RUN", _ANEW)
    due = {(s.role, s.name, s.terms, s.route) for s in signals(recipe, day)}
    for role, name, terms, route in sorted(due - {(r.role, r.name, r.terms, r.route) for r in ruled.rulings}):
        yield Problem(f"{where}: {role} of {name}, {terms}, {route}", "no ruling", "a ruling", _ANEW)
    for waiver in waivers:
        if why := waiver.problem(day, key):
            remedy = "sign a new one (`limbeck terms waive`) in its file, and run the recipe again"
            yield Problem(f"{where}: waiver by {waiver.said.by} for {waiver.said.terms}", why, "one in force", remedy)


def _set(root: Path) -> tuple[list[bytes], list[str]]:
    """The leaves of a run, and the examples that they say they are."""
    hashes, ids = [], []
    for row in read_rows(root):
        hashes.append(row.leaf)
        ids.append(str(parse_row(row).values["example"]))
    return hashes, ids


def _id(example: Example) -> str:
    """Recomputed: what was written beside tokens and mask proves nothing about them."""
    tokens, mask = example.tokens_T.astype("<i4").tobytes(), example.mask_T.astype("?").tobytes()
    return digest_json([example.completion, digest_bytes(tokens), digest_bytes(mask)])
