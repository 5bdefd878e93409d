"""RUN/signals: the teacher's signal on every supervised position of the training examples.

    manifest.json            what the signals were made from, what there is, the digest of every other file
    index.parquet            one row an example, in the order of the shards: id, block, positions, entries, heads
    00000.safetensors ...    shards of a whole number of blocks: `planes`, and `blocks`, a row of the table for each

A block is a few neighbouring examples, packed together: taking an example reads and unpacks its block, and
nothing else of the shard. Where an example lies follows from the counts of those before it. Signals are a
cache: they can be made again from the examples and the teacher, and are refused when they belong to others. A
text signal needs no arrays, for the examples hold the text: its store is a manifest alone.

While a store is being written it lies in `.signals.part`, which survives a kill. A shard is written under a
temporary name, synced and renamed, so it is there whole or not at all, and the next attempt goes on after it.
The plan of the shards is settled before the first is written, so the result does not depend on where an
attempt ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from limbeck.errors import InputError, Problem, StaleError
from limbeck.ledger.canonical import digest_file, digest_json
from limbeck.records import Example
from limbeck.render.examples import read_examples
from limbeck.rundir import atomic
from limbeck.signal.codec import Codec, Span
from limbeck.signal.manifest import (
    MANIFEST,
    VERSION,
    Counts,
    Shard,
    SignalKey,
    SignalManifest,
    read_manifest,
    refuse_stale,
    remedy,
)
from limbeck.signal.packing import group
from limbeck.signal.planes import Packed
from limbeck.signal.stored import CODECS, StoredArrays, StoredSignal, codec_of
from limbeck.signal.types import TextSignal

_INDEX, _KEY = "index.parquet", "key.json"
_INDEX_SCHEMA = pa.schema([("id", pa.string()), *((n, pa.int32()) for n in ("block", "positions", "entries", "heads"))])
_TYPES = {"U8": "<u1", "U32": "<u4"}
_OPEN = 32
"""Shards kept mapped at a time; a map costs a file handle, and no memory that cannot be taken back."""


class Planned(NamedTuple):
    """An example of a shard to be written, and its number of supervised positions."""

    id: str
    positions: int


class SignalWriter:
    """Writes a store of signals shard by shard. What an earlier attempt finished for the same key
    and plan is kept; what it left for another is removed.
    """

    def __init__(self, directory: str | os.PathLike[str], key: SignalKey, plan: Sequence[Sequence[Planned]]):
        self._final = Path(directory)
        self._part = self._final.with_name(f".{self._final.name}.part")
        self._store = self._part / "store"
        self._key, self._plan, self._codec = key, plan, codec_of(key)
        plan_digest = digest_json([[list(p) for p in shard] for shard in plan])
        wanted = json.dumps([VERSION, key.model_dump(mode="json"), plan_digest])
        found = self._part / _KEY
        if not found.is_file() or found.read_text(encoding="utf-8") != wanted:
            if self._part.exists():
                shutil.rmtree(self._part)
            with atomic(found) as half:
                half.write_text(wanted, encoding="utf-8")
        self._store.mkdir(exist_ok=True)

    def unwritten(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        return [n for n in range(len(self._plan)) if not (self._store / _name(n)).is_file()]

    def write(self, number: int, arrays: Sequence[StoredArrays]) -> None:
        """Write shard `number`: the arrays of each of its planned examples, in order.

        Raises:
            InputError: arrays of other numbers of positions than planned.

        """
        wanted, found = [p.positions for p in self._plan[number]], [self._codec.positions(a) for a in arrays]
        if wanted != found:
            problem = Problem(f"shard {number}: positions of each example", str(found), str(wanted))
            raise InputError("these signals are not those of the plan", [problem])
        blocks = [self._codec.pack(arrays[own.start : own.stop]) for own in group(wanted)]
        table = np.array([block.row for block in blocks], "<u4").reshape(len(blocks), self._codec.columns)
        planes = np.frombuffer(b"".join(block.planes for block in blocks), np.uint8)
        with atomic(self._store / _name(number)) as half:
            # save_file would write through a temporary file of its own, which a kill leaves behind.
            half.write_bytes(save({"blocks": table, "planes": planes}))

    def finish(self) -> SignalManifest:
        """Put index and manifest beside the shards and give the store its name, replacing what had it."""
        shards: list[Shard] = []
        rows: list[tuple[str, int, int, int, int]] = []
        for number, planned in enumerate(self._plan):
            path = self._store / _name(number)
            shard = _Mapped.of(path)
            rows += _index_rows(shard, planned, self._codec)
            shards.append(_describe(path, shard, len(planned)))
        with atomic(self._store / _INDEX) as half:
            fields = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(_INDEX_SCHEMA)]
            pq.write_table(pa.table(fields, schema=_INDEX_SCHEMA), half, compression="zstd")
        counts = Counts(
            examples=sum(s.examples for s in shards),
            positions=sum(s.positions for s in shards),
            entries=sum(s.entries for s in shards),
            bytes=sum(s.bytes for s in shards) + (self._store / _INDEX).stat().st_size,
        )
        manifest = SignalManifest(
            key=self._key, counts=counts, index=digest_file(self._store / _INDEX), shards=tuple(shards)
        )
        _write_manifest(self._store, manifest)
        if self._final.exists():
            shutil.rmtree(self._final)
        # Everything in the store is synced by now; renamed before its key is removed, it is never without a
        # name.
        os.replace(self._store, self._final)
        shutil.rmtree(self._part)
        return manifest


def write_manifest_only(
    directory: str | os.PathLike[str], key: SignalKey, examples: Sequence[Example]
) -> SignalManifest:
    """Write the store of a signal that is read off elsewhere: the examples' text, or a live teacher."""
    positions = sum(e.supervised for e in examples)
    entries = positions if key.kind == "text" else 0
    counts = Counts(examples=len(examples), positions=positions, entries=entries, bytes=0)
    manifest = SignalManifest(key=key, counts=counts)
    with atomic(directory) as half:
        half.mkdir()
        _write_manifest(half, manifest)
    return manifest


def _write_manifest(directory: Path, manifest: SignalManifest) -> None:
    with atomic(directory / MANIFEST) as half:
        half.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


class _Mapped(NamedTuple):
    """A shard: its table of blocks, and its planes, mapped: a byte is read from the disk when it is looked at."""

    blocks: NDArray[np.generic]
    planes: NDArray[np.generic]
    ends: NDArray[np.int64]
    """Where the planes of each block end."""

    @classmethod
    def of(cls, path: Path) -> _Mapped:
        """A safetensors file is the size of its header in 8 bytes, the header in JSON, then the arrays. The
        library's own slices copy as much but refuse to be empty.
        """
        raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())

        def array(name: str) -> NDArray[np.generic]:
            first, end = header[name]["data_offsets"]
            flat = raw[start + first : start + end].view(_TYPES[header[name]["dtype"]])
            return flat.reshape(header[name]["shape"])

        blocks = array("blocks")
        return cls(blocks, array("planes"), blocks[:, 3:].sum(axis=1, dtype=np.int64).cumsum())

    def packed(self, number: int) -> Packed:
        """A block."""
        row = self.blocks[number].tolist()
        end = int(self.ends[number])
        return Packed.of(row, self.planes[end - sum(row[3:]) : end].tobytes())


def _index_rows(
    shard: _Mapped, planned: Sequence[Planned], codec: Codec[Any, Any]
) -> Iterator[tuple[str, int, int, int, int]]:
    """The rows of the index for a shard; one block is unpacked at a time."""
    for block, own in enumerate(group([p.positions for p in planned])):
        examples = [planned[i] for i in own]
        counts = codec.counts(codec.unpack(shard.packed(block)), [p.positions for p in examples])
        for example, (entries, heads) in zip(examples, counts, strict=True):
            yield example.id, block, example.positions, entries, heads


def _describe(path: Path, shard: _Mapped, examples: int) -> Shard:
    positions, entries = (int(shard.blocks[:, column].sum(dtype=np.int64)) for column in (0, 1))
    return Shard(
        file=path.name,
        digest=digest_file(path),
        examples=examples,
        positions=positions,
        entries=entries,
        bytes=path.stat().st_size,
    )


class _Row(NamedTuple):
    """Where the signal of an example lies: its shard, its block there, and what it takes of the block's arrays."""

    shard: int
    block: int
    span: Span

    @property
    def size(self) -> int:
        return self.span.positions.stop - self.span.positions.start


class SignalStore:
    """A store, opened for reading. `take` is what training calls at every step."""

    def __init__(self, root: Path, manifest: SignalManifest, rows: dict[str, _Row], texts: dict[str, Example]):
        self.root, self.manifest = root, manifest
        self._rows, self._texts = rows, texts
        self._shards: OrderedDict[int, _Mapped] = OrderedDict()

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        expect: SignalKey | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Self:
        """Open a store and check every file of it against the manifest. That they hold what the teacher says is another
        question, which `audit.audit` (`limbeck ledger verify --audit`) answers.

        `expect` is what the signals must have been made from. `examples` are the training examples, which a
        text signal reads its tokens from; without them, they are read from the `examples` directory beside
        `directory`.

        Raises:
            StaleError: there is no store; it was made from something else (every field that differs, with
                both values); or files are missing or damaged (each with both digests).

        """
        root = Path(directory)
        manifest = read_manifest(root)
        if expect is not None:
            refuse_stale(root, manifest.key, expect)
        if manifest.kind not in CODECS:
            if examples is None:
                examples = read_examples(root.parent / "examples").train
            refuse_stale(
                root,
                manifest.key,
                manifest.key.model_copy(update={"examples": SignalKey.digest_of(examples)}),
            )
            return cls(root, manifest, {e.id: _text_row(e) for e in examples}, {e.id: e for e in examples})
        _refuse_damaged(root, manifest)
        return cls(root, manifest, _read_index(root, manifest), {})

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all files of the store, the manifest among them."""
        return self.manifest.counts.bytes + (self.root / MANIFEST).stat().st_size

    def shards(self) -> Iterator[StoredSignal | TextSignal]:
        """The signals shard by shard, in the order they are stored; no more than one shard is held."""
        ids = iter(self._rows)
        for shard in self.manifest.shards:
            yield self.take([next(ids) for _ in range(shard.examples)])

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._rows

    def positions(self, example_id: str) -> int:
        """Supervised positions of an example."""
        return self._find([example_id])[0].size

    def take(self, example_ids: Sequence[str]) -> StoredSignal | TextSignal:
        """The signal over the supervised positions of these examples, one after the other, on the CPU.

        Raises:
            InputError: examples that the store does not hold.

        """
        rows, key = self._find(example_ids), self.manifest.key
        if key.kind == "hidden":
            problem = Problem(
                str(self.root), "signals of kind hidden", "stored signals", "ask train.sources.LiveTeacher"
            )
            raise InputError("a live teacher's signal is not stored", [problem])
        if key.kind == "text":
            texts = [self._texts[i] for i in example_ids]
            ids_N = np.concatenate([e.tokens_T[e.mask_T] for e in texts]) if texts else np.zeros(0, np.int32)
            return TextSignal(torch.from_numpy(ids_N.astype(np.int64)), key.vocab_size)
        return codec_of(key).decode(self._gathered(rows))

    def _gathered(self, rows: Sequence[_Row]) -> list[StoredArrays]:
        """The arrays of these examples. Each block is unpacked once, and only one is held."""
        codec, parts = codec_of(self.manifest.key), dict[int, StoredArrays]()
        held, place = None, None
        for number in sorted(range(len(rows)), key=lambda n: rows[n][:2]):
            row = rows[number]
            if held is None or place != row[:2]:
                held, place = codec.unpack(self._shard(row.shard).packed(row.block)), row[:2]
            parts[number] = codec.cut(held, row.span)
        return [parts[number] for number in range(len(rows))]

    def _find(self, example_ids: Sequence[str]) -> list[_Row]:
        if missing := [i for i in example_ids if i not in self._rows]:
            expected, remedy = "a training example of this run", "held-out examples have no stored signal"
            where = str(self.root)
            problems = [Problem(where, f"nothing for {i}", expected, remedy) for i in missing[:10]]
            raise InputError(f"no signal for {len(missing)} of {len(example_ids)} examples", problems)
        return [self._rows[i] for i in example_ids]

    def _shard(self, number: int) -> _Mapped:
        if number in self._shards:
            self._shards.move_to_end(number)
        else:
            self._shards[number] = _Mapped.of(self.root / _name(number))
            if len(self._shards) > _OPEN:
                self._shards.popitem(last=False)
        return self._shards[number]


def _refuse_damaged(root: Path, manifest: SignalManifest) -> None:
    """Compare the digest of every file with the manifest's."""
    expected = {_INDEX: manifest.index} | {s.file: s.digest for s in manifest.shards}
    found = {name: digest_file(root / name) if (root / name).is_file() else "no such file" for name in expected}
    problems = [
        Problem(str(root / name), found[name], str(digest), remedy(root))
        for name, digest in expected.items()
        if found[name] != digest
    ]
    if problems:
        raise StaleError(f"{len(problems)} of {len(expected)} files of the signals are damaged", problems)


def _read_index(root: Path, manifest: SignalManifest) -> dict[str, _Row]:
    columns = pq.read_table(root / _INDEX).to_pydict()
    counts = zip(*(columns[name] for name in _INDEX_SCHEMA.names), strict=True)
    rows: dict[str, _Row] = {}
    for number, shard in enumerate(manifest.shards):
        last, ends = -1, (0, 0, 0)
        for name, block, *sizes in islice(counts, shard.examples):
            starts = ends if block == last else (0, 0, 0)
            last, ends = block, tuple(start + size for start, size in zip(starts, sizes, strict=True))
            rows[name] = _Row(number, block, Span(*(slice(a, b) for a, b in zip(starts, ends, strict=True))))
    return rows


def _text_row(example: Example) -> _Row:
    whole = slice(0, example.supervised)
    return _Row(0, 0, Span(whole, whole, slice(0, 0)))
