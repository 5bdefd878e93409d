"""The gate stage: the frozen set to RUN/gate, or a refusal. And the same question before anything is bought."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from limbeck.errors import Problem, RecipeError, RefusedError
from limbeck.ledger.merkle.tree import root
from limbeck.ledger.sealing import parse_row, read_rows
from limbeck.recipe import Recipe
from limbeck.rundir import RunDir, atomic
from limbeck.terms.gate import OTHER_ROUTE, STRICTNESS, Outcome, strictest
from limbeck.terms.obligations import name_problems
from limbeck.terms.rulings import GATE, ROWS, RULINGS, TOKEN, Judged, Ruled, Rulings, WaiverSeen, judge
from limbeck.terms.sources import Source, day_of, declared, prompt_files, rows_behind, signals, today, writer
from limbeck.terms.terms import UNKNOWN
from limbeck.terms.token import issue

_LISTED = 40
_SCHEMA = pa.schema([("example", pa.string()), ("verdict", pa.string()), ("rulings", pa.list_(pa.int32()))])


def gate(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Rule on every row of RUN/leaves.parquet, by the terms in force on the day its tokens were generated and by the
    recipe's use; write RUN/gate and issue a token bound to the set's root.

    Raises:
        RefusedError: all sources whose terms refuse the use or are unknown; nothing is written.
        RecipeError: the student's name is not one that the terms allow.
        InputError: terms or waivers that are not there.
    """
    day, files = today(), prompt_files(recipe)
    behind = rows_behind(run.root) if files else {}
    with run.progress.line("gate", None, "examples") as line:
        rows = _Rows(recipe, day)
        for row in read_rows(run.root):
            leaf = parse_row(row)
            own = tuple(files[name] for name in behind.get(str(leaf.values["prompt"]), ()) if name in files)
            rows.add(row.leaf, leaf.values, leaf.share.tokens * (leaf.share.split == "train"), own)
            line.advance()
        judged = judge(recipe, list(rows.places), day, counts=rows.counts, tokens=rows.tokens)
        refuse(recipe, judged)
        return _write(recipe, run, rows, judged, day)


class _Rows:
    """The rows of a set, each with the sources of its tokens; a set has few different ones."""

    def __init__(self, recipe: Recipe, day: dt.date):
        self._recipe = recipe
        self._teachers = {teacher.name: teacher for teacher in recipe.teachers}
        self._signals: dict[str, list[Source]] = {}
        for one in signals(recipe, day):
            self._signals.setdefault(one.name, []).append(one)
        self._known: dict[tuple, tuple[int, ...]] = {}
        self._rows: Counter[tuple[int, ...]] = Counter()
        self._tokens: Counter[tuple[int, ...]] = Counter()
        self.places: dict[Source, int] = {}
        self.hashes: list[bytes] = []
        self.examples: list[str] = []
        self.rulings: list[tuple[int, ...]] = []

    def add(self, leaf: bytes, values: dict[str, JsonValue], tokens: int, files: tuple[Source, ...]) -> None:
        """Take in a row: its leaf, what it says, the tokens that are learnt from, the files its prompt is from."""
        key = (values["teacher"], values["terms"], values["route"], str(values["created"])[:10],
               json.dumps(values["writers"]), files)  # fmt: skip
        if key not in self._known:
            found = dict.fromkeys(self._sources(values, files))
            self._known[key] = tuple(self.places.setdefault(source, len(self.places)) for source in found)
        self._rows[self._known[key]] += 1
        self._tokens[self._known[key]] += tokens
        self.hashes.append(leaf)
        self.examples.append(str(values["example"]))
        self.rulings.append(self._known[key])

    @property
    def counts(self) -> Counter[Source]:
        """Rows that each source counts for."""
        return self._by_source(self._rows)

    @property
    def tokens(self) -> Counter[Source]:
        """Supervised tokens of training rows that each source counts for."""
        return self._by_source(self._tokens)

    def _by_source(self, sums: Counter[tuple[int, ...]]) -> Counter[Source]:
        sources, found = list(self.places), Counter[Source]()
        for places, n in sums.items():
            for place in places:
                found[sources[place]] += n
        return found

    def _sources(self, values: dict[str, JsonValue], files: tuple[Source, ...]) -> Iterator[Source]:
        name, created = str(values["teacher"]), dt.date.fromisoformat(str(values["created"])[:10])
        teacher = self._teachers.get(name)
        terms = str(values["terms"])
        if teacher is None or teacher.terms != terms:
            terms = UNKNOWN  # a row of another recipe; verification says so too
        yield Source("answer", name, terms, str(values["route"]), day_of(teacher, created))
        writers = values["writers"]
        for pair in writers if isinstance(writers, list) else ():
            if isinstance(pair, list) and pair[0] == "prompt":
                yield writer(self._recipe, str(pair[1]), created)
        yield from files
        yield from self._signals.get(name, ())


def _write(recipe: Recipe, run: RunDir, rows: _Rows, judged: Judged, day: dt.date) -> dict[str, JsonValue]:
    whole = strictest(one.ruling for one in judged.ruled)
    seen = tuple(
        WaiverSeen(digest=w.digest, terms=w.said.terms, by=w.said.by, reason=w.said.reason, expires=w.last_day)
        for w in judged.waivers
    )
    rulings = Rulings(
        use=recipe.use,
        day=day,
        verdict=whole.verdict,
        clause=whole.clause,
        reason=whole.reason,
        obligations=whole.obligations,
        rows=len(rows.hashes),
        rulings=judged.ruled,
        waivers=seen,
    )
    with atomic(run / GATE) as half:
        half.mkdir()
        (half / RULINGS).write_text(rulings.model_dump_json(indent=1), encoding="utf-8")
        verdicts = [_verdict(judged.ruled, places) for places in rows.rulings]
        pq.write_table(pa.table([rows.examples, verdicts, rows.rulings], schema=_SCHEMA), half / ROWS,
                       compression="zstd")  # fmt: skip
        file = issue(recipe, half, root=root(rows.hashes), count=len(rows.hashes), verdict=whole.verdict,
                     waivers=judged.waivers)  # fmt: skip
        (half / TOKEN).write_text(file.model_dump_json(by_alias=True, indent=1), encoding="utf-8")
    told = file.model_dump(mode="json", by_alias=True)
    return {
        "verdict": whole.verdict.value,
        "rows": len(rows.hashes),
        "sources": len(judged.ruled),
        "obligations": len(whole.obligations),
        "waived": sum(one.waiver is not None for one in judged.ruled),
        "gate": {"version": 1, **told},
    }


def _verdict(ruled: Sequence[Ruled], places: tuple[int, ...]) -> str:
    return max((ruled[place].verdict for place in places), key=STRICTNESS.__getitem__).value


def refuse(recipe: Recipe, judged: Judged) -> None:
    """Raises `RefusedError` with everything that does not pass, or `RecipeError` for a name that may not be."""
    if problems := refusals(judged):
        raise RefusedError("the terms gate refuses this recipe, by our reading of the terms", problems)
    if wrong := name_problems(recipe.name, strictest(one.ruling for one in judged.ruled).obligations):
        raise RecipeError("the student needs another name", wrong)


def refusals(judged: Judged) -> list[Problem]:
    """Every source whose terms do not let its outputs be learnt from, with what can be done."""
    found: dict[tuple[str, str, str], Problem] = {}
    for one in judged.ruled:
        if not one.ruling.passes:
            where = (
                f"{one.role} of {one.name}, by the route {one.route}, generated on {one.day or 'no day that was said'}"
            )
            found.setdefault((one.name, one.terms, one.reason), Problem(where, _found(one), "terms that allow this use",
                                                                        _remedy(one)))  # fmt: skip
    problems = list(found.values())
    more = [Problem("the rest", f"{len(problems) - _LISTED} more", "none")] if len(problems) > _LISTED else []
    return [*problems[:_LISTED], *more, *judged.unfit]


def _found(one: Ruled) -> str:
    if one.terms == UNKNOWN:
        return f"terms: unknown; {one.reason}, and unknown refuses"
    if one.reason.startswith("refused under"):
        return one.reason
    if _other_route(one):
        return (
            f"the route does not match: {one.reason} (version {one.terms}); what holds by the other route is unknown, "
            "and unknown refuses"
        )
    clause = f"clause {one.clause}, version {one.terms}" if one.clause else f"terms {one.terms}"
    return f"refused under our reading of {clause}: {one.reason}; that is unknown, and unknown refuses"


def _remedy(one: Ruled) -> str:
    if one.terms == UNKNOWN:
        return (
            "say under which terms: `terms: ID`, an id of `limbeck terms list`, or `terms: own-model` if it is one's "
            "own; or take another teacher, or a waiver (`limbeck terms waive`)"
        )
    other = "take another teacher or another use, or a waiver (`limbeck terms waive`)"
    if _other_route(one):
        return f"name the terms of that route, or say `route:` where it is another; or {other}"
    return other


def _other_route(one: Ruled) -> bool:
    """Whether no clause was looked at, since the terms are about another route."""
    return one.ruling.verdict is Outcome.UNKNOWN and one.reason.startswith(OTHER_ROUTE)


def refuse_before(recipe: Recipe) -> None:
    """Refuse, by today's date and the declared use, what would be refused once it was paid for.

    Raises:
        RefusedError, RecipeError, InputError: as `gate`.
    """
    refuse(recipe, judge(recipe, declared(recipe, today()), today()))
