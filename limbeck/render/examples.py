"""RUN/examples: the examples of a run, and what they were made with.

    examples.parquet    one row an example: id, tokens, mask, and its parents
    manifest.json       version, tokenizer, chat templates, longest length, counts

Examples are a cache: they can be derived again from the completions. The manifest holds the digests of all
that changes them, so that what was made from them (signals, a student) can be refused when it no longer fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.errors import Problem, StaleError
from limbeck.ledger.canonical import digest_bytes, digest_json
from limbeck.records import Digest, Example, Split
from limbeck.rundir import atomic

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("prompt_id", pa.string()),
        ("completion", pa.string()),
        ("teacher", pa.string()),
        ("split", pa.string()),
    ]
)
_ROWS = 4096
"""Rows of a row group."""
_TABLE, _MANIFEST = "examples.parquet", "manifest.json"


class SplitCounts(BaseModel):
    """How much there is of one split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    tokens: int
    supervised: int
    """Tokens under the mask."""


class ExampleManifest(BaseModel):
    """What the examples were made with, and how many there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    tokenizer: Digest
    """Of the tokenizer that all teachers share."""
    templates: dict[str, Digest]
    """Of the chat template of each teacher, by its name."""
    max_length: int
    """Longest example allowed, in tokens."""
    counts: dict[Split, SplitCounts]

    @property
    def template(self) -> Digest:
        """The template all teachers share, or the digest of all of theirs."""
        different = set(self.templates.values())
        return different.pop() if len(different) == 1 else digest_json(self.templates)


@dataclass(frozen=True)
class ExampleSet:
    """All examples of a run, in the order of their completions."""

    examples: list[Example]
    manifest: ExampleManifest

    @cached_property
    def train(self) -> list[Example]:
        """Those to learn from."""
        return [e for e in self.examples if e.split == Split.TRAIN]

    @cached_property
    def held_out(self) -> list[Example]:
        """Those to measure with."""
        return [e for e in self.examples if e.split == Split.HELD_OUT]


def make_example(
    tokens_T: NDArray[np.int32],
    mask_T: NDArray[np.bool_],
    *,
    prompt_id: str,
    completion: str,
    teacher: str,
    split: Split,
) -> Example:
    """An example with its id: the digest of tokens, mask and parent, so no two of a run have the same."""
    content = [completion, digest_bytes(tokens_T.astype("<i4").tobytes()), digest_bytes(mask_T.tobytes())]
    return Example(digest_json(content), tokens_T, mask_T, prompt_id, completion, teacher, split)


def make_set(
    examples: Sequence[Example], *, tokenizer: Digest, templates: dict[str, Digest], max_length: int
) -> ExampleSet:
    """A set with its manifest."""
    counts = {split: _count(e for e in examples if e.split == split) for split in Split}
    manifest = ExampleManifest(tokenizer=tokenizer, templates=templates, max_length=max_length, counts=counts)
    return ExampleSet(list(examples), manifest)


def _count(examples: Iterable[Example]) -> SplitCounts:
    sizes = [(len(e.tokens_T), e.supervised) for e in examples]
    return SplitCounts(examples=len(sizes), tokens=sum(s[0] for s in sizes), supervised=sum(s[1] for s in sizes))


def write_examples(directory: str | os.PathLike[str], examples: ExampleSet) -> None:
    """Write the directory, whole or not at all."""
    with atomic(directory) as half:
        half.mkdir()
        with pq.ParquetWriter(half / _TABLE, _SCHEMA, compression="zstd") as writer:
            for i in range(0, len(examples.examples), _ROWS):
                writer.write_table(_table(examples.examples[i : i + _ROWS]))
        (half / _MANIFEST).write_text(examples.manifest.model_dump_json(indent=1), encoding="utf-8")


def _table(rows: Sequence[Example]) -> pa.Table:
    ends = np.cumsum([0, *(len(e.tokens_T) for e in rows)]).astype(np.int32)
    columns = [
        pa.array([e.id for e in rows]),
        pa.ListArray.from_arrays(ends, np.concatenate([e.tokens_T for e in rows])),
        pa.ListArray.from_arrays(ends, np.concatenate([e.mask_T for e in rows])),
        pa.array([e.prompt_id for e in rows]),
        pa.array([e.completion for e in rows]),
        pa.array([e.teacher for e in rows]),
        pa.array([e.split.value for e in rows]),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def read_examples(directory: str | os.PathLike[str]) -> ExampleSet:
    """Read the directory back.

    Raises:
        StaleError: it is not there, another version of limbeck wrote it, or its two files do not belong
        together.

    """
    root = Path(directory)
    remedy = f"remove {root} and run again: examples are derived from the completions"
    try:
        manifest = ExampleManifest.model_validate_json((root / _MANIFEST).read_bytes())
        examples = _read_table(root / _TABLE)
    except FileNotFoundError as error:
        problem = Problem(str(error.filename), "no such file", "examples that the render stage wrote", remedy)
        raise StaleError("there are no examples", [problem]) from None
    except ValidationError as error:
        problems = [
            Problem(f"{root / _MANIFEST}: {'.'.join(map(str, e['loc']))}", repr(e["input"])[:80], e["msg"], remedy)
            for e in error.errors()
        ]
        raise StaleError("the examples are of another format", problems) from None
    found = {split: _count(e for e in examples if e.split == split) for split in Split}
    if found != manifest.counts:
        raise StaleError(
            "the examples are not those of their manifest",
            [
                Problem(
                    f"{root / _TABLE}: split {split}",
                    str(found[split]),
                    str(manifest.counts.get(split)),
                    remedy,
                )
                for split in Split
                if found[split] != manifest.counts.get(split)
            ],
        )
    return ExampleSet(examples, manifest)


def _read_table(path: Path) -> list[Example]:
    examples: list[Example] = []
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS):
            columns = {name: batch.column(name) for name in _SCHEMA.names}
            tokens, masks = _arrays(columns["tokens"]), _arrays(columns["mask"])
            rest = (columns[name].to_pylist() for name in ("id", "prompt_id", "completion", "teacher", "split"))
            for (name, prompt, completion, teacher, split), tokens_T, mask_T in zip(
                zip(*rest, strict=True), tokens, masks, strict=True
            ):
                examples.append(Example(name, tokens_T, mask_T, prompt, completion, teacher, Split(split)))
    return examples


def _arrays(column: pa.ListArray) -> list[NDArray]:
    ends = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(ends)]
