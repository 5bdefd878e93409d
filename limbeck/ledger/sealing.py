"""The seal stage: every kept example becomes a leaf, RUN/leaves.parquet, to which the ledger then commits.

Values come from the records of the stages before; nothing is asked and nothing is estimated. The same code makes them
again when a run is verified.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from limbeck.errors import InputError, Problem, StaleError
from limbeck.ledger.canonical import iso
from limbeck.ledger.columns import batches, completion_digest
from limbeck.ledger.merkle.fields import FIELDS, NEWEST, NOT_ASKED, Leaf, Share, Version
from limbeck.ledger.merkle.hashing import EncodedColumns, commit_hashes
from limbeck.ledger.merkle.order import LeafSet, LeavesFact
from limbeck.ledger.merkle.salts import Salts
from limbeck.ledger.merkle.tree import Hash
from limbeck.ledger.origins import Origins, parents_of
from limbeck.ledger.signing import keys
from limbeck.recipe import Recipe
from limbeck.records import Digest
from limbeck.rundir import RunDir, atomic

LEAVES = "leaves.parquet"
_SCHEMA = pa.schema([("fields", pa.string()), ("share", pa.string()), ("leaf", pa.binary(32))])
_ROWS = 4096
_REMEDY = "put back the files as the run wrote them, or run the same recipe again"


class Row(NamedTuple):
    """One row of RUN/leaves.parquet."""

    fields: str
    share: str
    leaf: Hash


def seal(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write RUN/leaves.parquet, one row an example in their order; returns what the ledger needs to take them in.

    Raises:
        StaleError: the records do not belong together.
        InputError: the secret cannot be used.
    """
    from limbeck.ledger.leaf_columns import leaf_columns

    nonce, count = secrets.token_bytes(32), 0
    salts = Salts.of(keys.secret(), nonce)
    with (
        run.progress.line("seal", None, "examples") as line,
        atomic(run / LEAVES) as half,
        pq.ParquetWriter(half, _SCHEMA, compression="zstd") as writer,
    ):
        for told in leaf_columns(recipe, run.root, NEWEST):
            hashes = commit_hashes(salts, count, told, NEWEST)
            writer.write_table(leaves_table(told, hashes))
            count += len(hashes)
            line.advance(len(hashes))
    fact = LeavesFact(version=NEWEST, count=count, nonce=nonce.hex(), salts=salts.id)
    return {"leaves": fact.model_dump(mode="json"), "gate": NOT_ASKED}


def leaves_table(told: EncodedColumns, hashes: Sequence[Hash]) -> pa.Table:
    """Some rows of RUN/leaves.parquet."""
    texts = [pa.array(column, pa.binary()).cast(pa.string()) for column in (told.texts(), told.shares)]
    return pa.table([*texts, pa.array(hashes, pa.binary(32))], schema=_SCHEMA)


def leaf_hashes(run: Path, facts: dict[str, JsonValue]) -> list[Hash]:
    """The hashes that the entry of a stage with these facts brings into the tree."""
    if "leaves" not in facts:
        return []
    return [leaf for part in read_tables(run) for leaf in part.column("leaf").to_pylist()]


def read_rows(run: Path) -> Iterator[Row]:
    """RUN/leaves.parquet, row by row. Raises what readers raise for damaged bytes."""
    for batch in batches(run / LEAVES, _SCHEMA.names, _ROWS):
        yield from map(Row, *(batch.column(name).to_pylist() for name in _SCHEMA.names))


def read_tables(run: Path) -> Iterator[pa.Table]:
    """The same, some thousand rows at a time."""
    for batch in batches(run / LEAVES, _SCHEMA.names, _ROWS):
        yield pa.Table.from_batches([batch])


def read_row(run: Path, row: int) -> Row | None:
    """One row, read with no more than its neighbours; None where there is no such row."""
    with pq.ParquetFile(run / LEAVES, pre_buffer=False) as file:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first <= row < first + rows:
                table = file.read_row_group(group, columns=_SCHEMA.names).slice(row - first, 1)
                return Row(*(table.column(name)[0].as_py() for name in _SCHEMA.names))
            first += rows
    return None


def parse_row(row: Row) -> Leaf:
    """The leaf of a row. Raises `ValueError` for other fields than those of this version."""
    values = json.loads(row.fields)
    if not isinstance(values, dict) or tuple(sorted(values)) != FIELDS:
        raise ValueError(f"fields {sorted(values)}, not {list(FIELDS)}")
    return Leaf(tuple(values[name] for name in FIELDS), Share.model_validate_json(row.share))


def known_salts(found: LeafSet, key: bytes | None = None) -> Salts | None:
    """The salts of a set, if the key that was handed over or the secret on this machine is the right one."""
    secret = keys.find_secret()
    salts = Salts(key) if key else Salts.of(secret, bytes.fromhex(found.fact.nonce)) if secret else None
    return salts if salts and salts.id == found.fact.salts else None


def salts_for(found: LeafSet, key: bytes | None = None) -> Salts:
    """The salts of a set: from the key that was handed over, or from the secret on this machine.

    Raises `InputError` where that is another key or secret than the set was sealed with.
    """
    salts = Salts(key) if key else Salts.of(keys.secret(), bytes.fromhex(found.fact.nonce))
    if salts.id != found.fact.salts:
        where = "the salts' key that was given" if key else str(keys.home() / "secret")
        remedy = (
            "use the secret of the machine that sealed this run (copy it, or set LIMBECK_HOME), or remove "
            f"{LEAVES} and run again: the examples are then sealed anew"
        )
        raise InputError("another secret", [Problem(where, salts.id, found.fact.salts, remedy)])
    return salts


def read_salts_key(path: Path) -> bytes:
    """A salts' key from its file: 64 hexadecimal digits. Raises `InputError`."""
    try:
        text = path.read_text(encoding="ascii").strip()
        if len(text) != 64:
            raise ValueError(f"{len(text)} characters")
        return bytes.fromhex(text)
    except (OSError, ValueError) as error:
        problem = Problem(
            str(path), str(error)[:200], "64 hexadecimal digits", "give what `limbeck ledger salts` wrote"
        )
        raise InputError("no salts' key", [problem]) from None


def refuse_unsealed(run: Path, sets: Sequence[LeafSet]) -> None:
    """Raises `InputError` where a run has no leaves yet."""
    if not sets:
        found = "no entry of the stage seal"
        problem = Problem(str(run / "ledger.db"), found, "sealed examples", "run the recipe as far as annotate")
        raise InputError("nothing is sealed yet", [problem])


class Example(NamedTuple):
    """What a leaf takes over from an example."""

    id: Digest
    completion: Digest
    split: str
    teacher: str
    tokens: int


def leaves(recipe: Recipe, run: Path, version: Version) -> Iterator[Leaf]:
    """The leaves of a run, in the order of its examples. Raises `StaleError` where records do not belong together."""
    origins = Origins(run)
    samplings: dict[tuple[str, int], JsonValue] = {}
    told_writers: dict[tuple[str, str | None], JsonValue] = {}
    shares: dict[tuple[str, str, int], Share] = {}
    answers = answers_of(run)
    for place, example in enumerate(examples_of(run / "examples" / "examples.parquet")):
        completion = None
        for name, answer in answers:
            if name == example.completion:
                completion = answer
                break
        if completion is None:
            raise without_completion(place, example)
        origin = origins.get(completion.prompt_id)
        drawn = completion.teacher, completion.sample
        if (sampling := samplings.get(drawn)) is None:
            sampling = samplings[drawn] = sampling_of(recipe, *drawn, version)
        who = completion.model, origin.writer
        if (told := told_writers.get(who)) is None:
            told = told_writers[who] = writers_of(*who)
        counted = example.teacher, example.split, example.tokens
        if (share := shares.get(counted)) is None:
            share = Share.model_validate(dict(zip(("class", "split", "tokens"), counted, strict=True)))
            if len(shares) < _REMEMBERED:
                shares[counted] = share
        yield Leaf(
            (
                completion_digest(
                    completion.text, completion.reasoning, completion.finish_reason, completion.tool_calls
                ),
                iso_micros(completion.created),
                example.id,
                NOT_ASKED,
                completion.model,
                parents_of(example.completion, origin.parents, version),
                completion.prompt_id,
                completion.provider,
                completion.request_id,
                response_of(completion.response, completion.answer_id, version),
                completion.route,
                sampling,
                completion.teacher,
                completion.terms,
                weights_of(completion.weights, completion.fingerprint, version),
                told,
            ),
            share,
        )


_REMEMBERED = 4096


def without_completion(place: int, example: Example) -> StaleError:
    """That the example in a row has no completion where it has to have one."""
    where, found = f"examples: row {place}: parent", example.completion
    expected = "a completion of completions.parquet, in their order"
    return StaleError("examples without their completions", [Problem(where, found, expected, _REMEDY)])


@lru_cache(maxsize=_REMEMBERED)
def iso_micros(micros: int) -> str:
    """A time from its microseconds since 1970. Answers that were written together have the same."""
    return iso(_BEGINNING + timedelta(microseconds=micros))


_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def sampling_of(recipe: Recipe, teacher: str, sample: int, version: Version) -> JsonValue:
    """What a leaf says of how an answer was drawn. From version 2 on nothing is said that was not asked of the teacher:
    answers of a file were drawn by somebody else, endpoints may refuse keys, and some APIs take no seed.
    """
    told = recipe.collect
    found: dict[str, JsonValue] = {
        "max_tokens": told.max_tokens,
        "seed": recipe.seed,
        "temperature": told.temperature,
        "top_p": told.top_p,
    }
    if version == 1:
        return found | {"sample": sample}
    asked = next((one for one in recipe.teachers if one.name == teacher), None)
    extra: dict[str, JsonValue] = {}
    if asked is None or asked.kind == "file":
        found = dict.fromkeys(found)
    elif asked.kind != "local":
        extra = dict(asked.extra)
        seedless = asked.kind == "anthropic" or asked.api == "responses"
        found |= dict.fromkeys({*asked.omit, *(("seed",) if seedless else ())} & {*found})
    return found | {"extra": extra, "sample": sample}


def response_of(response: Digest, answer_id: str | None, version: Version) -> JsonValue:
    """What a leaf says of the answer as it came; from version 2 on also by which id its provider knows it."""
    return response if version == 1 else {"digest": response, "id": answer_id}


def weights_of(weights: Digest | None, fingerprint: str | None, version: Version) -> JsonValue:
    """What a leaf says of the weights that answered; from version 2 on also what the API says of them."""
    return weights if version == 1 else {"digest": weights, "fingerprint": fingerprint}


def writers_of(model: str, prompt_writer: str | None) -> JsonValue:
    """What a leaf says of who wrote tokens of an example."""
    found: list[JsonValue] = [["answer", model]]
    return found if prompt_writer is None else [*found, ["prompt", prompt_writer]]


class Answer(NamedTuple):
    """What a leaf takes over from a completion: these columns of its table."""

    answer_id: str | None
    created: int
    """Microseconds since 1970."""
    fingerprint: str | None
    finish_reason: str
    model: str
    prompt_id: Digest
    provider: str
    reasoning: str | None
    request_id: Digest
    response: Digest
    route: str
    sample: int
    teacher: str
    terms: str
    text: str
    tool_calls: str | None
    """JSON."""
    weights: Digest | None


def answers_of(run: Path) -> Iterator[tuple[Digest, Answer]]:
    """Completions with their ids, which the verdicts have in the same order."""
    ids = (name for (name,) in _columns(run / "verdicts.parquet", ("completion",)))
    for row, answer in enumerate(map(Answer._make, _columns(run / "completions.parquet", Answer._fields))):
        name = next(ids, None)
        if name is None:
            problem = Problem(f"verdicts.parquet: row {row}", "no verdict", "one for each completion", _REMEDY)
            raise StaleError("completions and verdicts do not belong together", [problem])
        yield name, answer


def _columns(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of some columns, times as microseconds since 1970. Of a table with ten columns more, and of messages in
    JSON, nothing is read.
    """
    for batch in batches(path, names, _ROWS):
        yield from zip(*(_values(batch.column(name)) for name in names), strict=True)


def _values(column: pa.Array) -> list[Any]:
    return (
        column.cast(pa.timestamp("us")).cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
    ).to_pylist()


def examples_of(path: Path) -> Iterator[Example]:
    """The rows of RUN/examples, their supervised tokens counted."""
    import numpy as np

    names = ("id", "completion", "split", "teacher")
    for batch in batches(path, (*names, "mask"), 1024):
        mask = batch.column("mask")
        total = np.concatenate([[0], np.cumsum(mask.values.to_numpy(zero_copy_only=False))])
        ends = mask.offsets.to_numpy()
        tokens = (total[ends[1:]] - total[ends[:-1]]).tolist()
        yield from map(Example, *(batch.column(name).to_pylist() for name in names), tokens)
