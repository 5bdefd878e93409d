"""The store: what goes in comes out, a kill costs nothing that was finished, and nothing stale or damaged
is read."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import InputError, StaleError
from limbeck.ledger.canonical import digest_bytes, digest_file, manifest
from limbeck.records import Split
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.signal import store as store_module
from limbeck.signal.encoding import SampledArrays, decode_sampled, encode_sampled
from limbeck.signal.manifest import ServerIdentity
from limbeck.signal.sampling import threshold_sample
from limbeck.signal.store import Planned, SignalKey, SignalStore, SignalWriter, write_manifest_only
from limbeck.signal.types import SampledSignal, TextSignal, concat

D = digest_bytes(b"something")
OTHER = digest_bytes(b"something else")
KEY = SignalKey(
    kind="sampled", tokenizer=D, templates={"a": D}, teachers={"a": D}, examples=D, vocab_size=50, seed=7,
    tau=0.05, temperature=1.0, precision="float32",
)  # fmt: skip
OTHERS = {
    "tokenizer": OTHER, "templates": {"a": OTHER}, "teachers": {"a": OTHER}, "examples": OTHER,
    "vocab_size": 51, "seed": 8, "tau": 0.02, "temperature": 2.0, "precision": "bfloat16", "k": 5,
    "source": "answers", "unmatched": "text", "answers": OTHER,
    "server": ServerIdentity(base_url="http://127.0.0.1:8000/v1", model="m", ask="echo"),
}  # fmt: skip
"""Another value for each field."""


def arrays(n: int, seed: int, key: SignalKey = KEY) -> SampledArrays:
    """The encoded signal of `n` positions of a random teacher."""
    stream = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, key.vocab_size, generator=stream, dtype=torch.float64)
    assert key.tau
    return encode_sampled(threshold_sample(logits.softmax(1), key.tau, generator=stream), stream)


def plan_of(sizes: list[list[int]]) -> list[list[Planned]]:
    number = itertools.count()
    return [[Planned(f"example-{next(number)}", n) for n in shard] for shard in sizes]


def write(directory: Path, sizes: list[list[int]], key: SignalKey = KEY) -> dict[str, SampledArrays]:
    """Write a store; returns what went in, by example. The signal of example i has seed i."""
    plan = plan_of(sizes)
    inside = {p.id: arrays(p.positions, i, key) for i, p in enumerate(itertools.chain(*plan))}
    writer = SignalWriter(directory, key, plan)
    for number in writer.unwritten():
        writer.write(number, [inside[p.id] for p in plan[number]])
    writer.finish()
    return inside


def sampled(taken: SampledSignal | TextSignal) -> SampledSignal:
    assert isinstance(taken, SampledSignal)
    return taken


def same(a: SampledSignal, b: SampledSignal) -> bool:
    names = ("n_head_N", "n_tail_N", "ids_E", "head_probs_H", "entropy_N")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and (a.tau, a.vocab_size) == (
        b.tau,
        b.vocab_size,
    )


sizes_of_shards = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(sizes_of_shards, st.data())
@pytest.mark.parametrize(("vocab_size", "tau"), [(50, 0.05), (300, 0.002), (70_000, 0.02)])
def test_take_gives_back_what_went_in_in_the_order_asked(vocab_size, tau, sizes, data):
    """Counts of one byte and of two, ids of two bytes and of three; any examples, in any order, more than
    once."""
    key = KEY.model_copy(update={"vocab_size": vocab_size, "tau": tau, "temperature": 1.5})
    with tempfile.TemporaryDirectory() as home:
        inside = write(Path(home) / "signals", sizes, key)
        store = SignalStore.open(Path(home) / "signals", expect=key)
        asked = data.draw(st.lists(st.sampled_from(sorted(inside)), max_size=6))
        whole = (
            SampledArrays(*(np.concatenate([getattr(inside[i], n) for i in asked]) for n in SampledArrays._fields))
            if asked
            else None
        )
        taken = sampled(store.take(asked))
        assert len(taken) == sum(store.positions(i) for i in asked) == sum(len(inside[i].n_head) for i in asked)
        assert taken.temperature == 1.5
        if whole:
            assert same(taken, decode_sampled(whole, tau=tau, vocab_size=vocab_size))


def test_the_manifest_counts_everything(tmp_path):
    inside = write(tmp_path / "signals", [[3, 4], [5]])
    store = SignalStore.open(tmp_path / "signals")
    counts = store.manifest.counts
    assert (counts.examples, counts.positions) == (3, 12)
    assert counts.entries == sum(len(a.ids) for a in inside.values())
    assert store.bytes_on_disk == sum(p.stat().st_size for p in (tmp_path / "signals").iterdir())
    shards = [sampled(s) for s in store.shards()]
    assert [len(s) for s in shards] == [7, 5]
    assert same(concat(shards), sampled(store.take(list(inside))))


def test_an_unknown_example_is_named(tmp_path):
    write(tmp_path / "signals", [[3]])
    with pytest.raises(InputError, match="nothing for example-9"):
        SignalStore.open(tmp_path / "signals").take(["example-0", "example-9"])


def test_a_shard_takes_only_what_was_planned(tmp_path):
    writer = SignalWriter(tmp_path / "signals", KEY, plan_of([[3, 4]]))
    with pytest.raises(InputError, match=r"\[4, 3\]"):
        writer.write(0, [arrays(4, 0), arrays(3, 1)])
    assert writer.unwritten() == [0]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
import test_store
from pathlib import Path
slow = test_store.SignalWriter.write
def write(self, number, arrays):
    slow(self, number, arrays)
    time.sleep(0.03)
test_store.SignalWriter.write = write
print("ready", flush=True)
test_store.write(Path({to!r}), test_store.MANY)
"""
MANY = [[4, 1, 7]] * 24


def test_a_kill_loses_no_finished_shard_and_doubles_none(tmp_path):
    """Killed again and again, until it finishes: the store equals, byte for byte, one written in one go."""
    write(tmp_path / "whole", MANY)
    code = KILLED.format(tests=str(Path(__file__).parent), to=str(tmp_path / "signals"))
    part = tmp_path / ".signals.part" / "store"
    kills, shards = 0, {}
    for wait in (0.0, 0.15):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = len(shards)
        while len(list(part.glob("0*"))) <= before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(wait)
        kills += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for name, was in shards.items():
            assert (part / name).stat().st_mtime_ns == was, "a finished shard was written again"
        shards = {p.name: p.stat().st_mtime_ns for p in part.glob("0*")}
        assert len(shards) > before
    assert kills == 2
    assert len(shards) < len(MANY)
    write(tmp_path / "signals", MANY)
    assert manifest(tmp_path / "signals") == manifest(tmp_path / "whole")
    assert not (tmp_path / ".signals.part").exists()


def test_a_half_written_shard_is_written_again(tmp_path):
    write(tmp_path / "whole", MANY)
    writer = SignalWriter(tmp_path / "signals", KEY, plan_of(MANY))
    writer.write(3, [arrays(4, 9), arrays(1, 10), arrays(7, 11)])
    inside = sorted(p.name for p in (tmp_path / ".signals.part" / "store").iterdir())
    assert inside == ["00003.safetensors"], "no other temporary files than those that are written again"
    (tmp_path / ".signals.part" / "store" / ".00004.safetensors.half").write_bytes(b"cut short")
    assert SignalWriter(tmp_path / "signals", KEY, plan_of(MANY)).unwritten() == [n for n in range(len(MANY)) if n != 3]
    write(tmp_path / "signals", MANY)
    assert manifest(tmp_path / "signals") == manifest(tmp_path / "whole")


@pytest.mark.parametrize("changed", [KEY.model_copy(update={"seed": 8}), KEY])
def test_what_another_attempt_left_is_not_mixed_in(tmp_path, changed):
    """Shards of another key, or of another plan, are thrown away."""
    writer = SignalWriter(tmp_path / "signals", KEY, plan_of([[3], [3]]))
    writer.write(0, [arrays(3, 0)])
    plan = plan_of([[3], [3]] if changed != KEY else [[3], [2]])
    assert SignalWriter(tmp_path / "signals", changed, plan).unwritten() == [0, 1]


def test_a_finished_store_replaces_the_one_before(tmp_path):
    write(tmp_path / "signals", [[3], [4], [5]])
    write(tmp_path / "signals", [[6]])
    assert SignalStore.open(tmp_path / "signals").positions("example-0") == 6
    assert sorted(p.name for p in (tmp_path / "signals").iterdir()) == [
        "00000.safetensors",
        "index.parquet",
        "manifest.json",
    ]


def test_other_signals_are_refused_field_by_field(tmp_path):
    write(tmp_path / "signals", [[3]])
    assert {*OTHERS} == {*SignalKey.model_fields} - {"kind"}
    for name, value in OTHERS.items():
        with pytest.raises(StaleError) as caught:
            SignalStore.open(tmp_path / "signals", expect=KEY.model_copy(update={name: value}))
        (problem,) = caught.value.problems
        assert f"key.{name}" in problem.where
        found, expected = (v["a"] if isinstance(v, dict) else v for v in (getattr(KEY, name), value))
        if isinstance(expected, ServerIdentity):
            expected = expected.model_dump(mode="json")
        shown = [None if text == "nothing" else yaml.safe_load(text) for text in (problem.found, problem.expected)]
        assert shown == [found, expected]
        assert str(tmp_path / "signals") in problem.remedy
    with pytest.raises(StaleError) as caught:
        SignalStore.open(tmp_path / "signals", expect=KEY.model_copy(update=OTHERS))
    assert len(caught.value.problems) == len(OTHERS)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flip, lambda p: os.truncate(p, p.stat().st_size - 1), Path.unlink])
@pytest.mark.parametrize("name", ["00000.safetensors", "00001.safetensors", "index.parquet"])
def test_a_damaged_file_is_named_with_both_digests(tmp_path, damage, name):
    write(tmp_path / "signals", [[3], [4]])
    path = tmp_path / "signals" / name
    was = digest_file(path)
    damage(path)
    with pytest.raises(StaleError) as caught:
        SignalStore.open(tmp_path / "signals")
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert problem.expected == was
    assert problem.found == (digest_file(path) if path.exists() else "no such file")


def test_all_damaged_files_are_named(tmp_path):
    write(tmp_path / "signals", [[3], [4], [5]])
    for name in ("00000.safetensors", "00002.safetensors"):
        flip(tmp_path / "signals" / name)
    with pytest.raises(StaleError, match="2 of 4 files"):
        SignalStore.open(tmp_path / "signals")


def test_no_store_and_another_format(tmp_path):
    with pytest.raises(StaleError, match="no such file"):
        SignalStore.open(tmp_path / "signals")
    write(tmp_path / "signals", [[3]])
    path = tmp_path / "signals" / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(StaleError, match="version"):
        SignalStore.open(tmp_path / "signals")


def incompressible(n: int, seed: int = 0) -> SampledArrays:
    """One head and two tails a position, with random ids and codes: what packs worst."""
    random = np.random.default_rng(seed)
    ids = np.sort(random.integers(0, 50_000, (n, 3)), axis=1).astype("<u2").reshape(-1)
    ones = np.ones(n, "u1")
    head, entropy = random.integers(0, 256, n).astype("u1"), random.integers(0, 1 << 16, n).astype("<u2")
    return SampledArrays(ones, 2 * ones, ids, head, entropy)


def test_reading_never_holds_a_shard(tmp_path):
    """Examples from all of 40 shards, at random: less than one shard is held at any time, and reading shard by
    shard holds no more for 40 shards than for 2. tracemalloc is told of all that numpy and Python allocate, and of
    nothing that is mapped.
    """
    key, chat = KEY.model_copy(update={"vocab_size": 50_000}), incompressible(250)
    stores = {}
    for shards in (2, 40):
        plan = plan_of([[250] * 160] * shards)
        writer = SignalWriter(tmp_path / f"{shards}", key, plan)
        writer.write(0, [chat] * 160)
        part = tmp_path / f".{shards}.part" / "store"
        for number in range(1, shards):
            shutil.copy(part / "00000.safetensors", part / f"{number:05d}.safetensors")
        writer.finish()
        stores[shards] = plan, SignalStore.open(tmp_path / f"{shards}")
    plan, store = stores[40]
    shard = (tmp_path / "40" / "00000.safetensors").stat().st_size
    assert shard > 40 * 4000
    asked = [plan[n][(37 * n) % 160].id for n in range(40)]
    random = np.random.default_rng(0)
    held = peak(lambda: [store.take(random.choice(asked, 4).tolist()) and None for _ in range(50)])
    assert held < shard
    few, many = (peak(lambda s=s: [len(part) for part in s.shards()]) for _, s in (stores[2], stores[40]))
    assert many < 1.1 * few
    expected = decode_sampled(chat, tau=0.05, vocab_size=50_000)
    assert all(same(sampled(store.take([i])), expected) for i in asked)


def test_writing_and_finishing_hold_no_more_for_more_shards(tmp_path):
    """A shard is held while it is written; closing the store unpacks a block at a time."""
    key, held = KEY.model_copy(update={"vocab_size": 50_000}), []
    chats = [incompressible(500, seed) for seed in range(20)]
    for shards in (2, 12):
        writer = SignalWriter(tmp_path / f"{shards}", key, plan_of([[500] * 20] * shards))

        def write_all(writer: SignalWriter = writer) -> None:
            for number in writer.unwritten():
                writer.write(number, chats)
            writer.finish()

        held.append(peak(write_all))
    shard = (tmp_path / "12" / "00000.safetensors").stat().st_size
    assert held[1] < held[0] + shard, "ten more shards take less than one: the rows of the index"


def peak(work) -> int:
    """The most bytes that were allocated at a time while `work` ran, over what was there before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_shards_of_another_format_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "VERSION", 1)
    writer = SignalWriter(tmp_path / "signals", KEY, plan_of([[3], [3]]))
    writer.write(0, [arrays(3, 0)])
    monkeypatch.undo()
    assert SignalWriter(tmp_path / "signals", KEY, plan_of([[3], [3]])).unwritten() == [0, 1]


def text_example(i: int, tokens: list[int], mask: list[bool]):
    return make_example(
        np.array(tokens, np.int32),
        np.array(mask),
        prompt_id=D,
        completion=f"c{i}",
        teacher="a",
        split=Split.TRAIN,
    )


def test_a_text_signal_is_read_from_the_examples(tmp_path):
    chats = [
        text_example(0, [5, 6, 7, 8], [False, True, False, True]),
        text_example(1, [9, 4, 3], [False, True, True]),
    ]
    key = KEY.model_copy(update={
        "kind": "text", "examples": SignalKey.digest_of(chats), "tau": None, "temperature": None,
        "precision": None,
    })  # fmt: skip
    write_manifest_only(tmp_path / "signals", key, chats)
    write_examples(tmp_path / "examples", make_set(chats, tokenizer=D, templates={"a": D}, max_length=9))
    assert [p.name for p in (tmp_path / "signals").iterdir()] == ["manifest.json"]
    for store in (
        SignalStore.open(tmp_path / "signals", expect=key),
        SignalStore.open(tmp_path / "signals", examples=chats),
    ):
        assert store.manifest.counts.positions == 4
        assert store.positions(chats[1].id) == 2
        taken = store.take([chats[1].id, chats[0].id])
        assert isinstance(taken, TextSignal)
        assert taken.ids_N.tolist() == [4, 3, 6, 8]
        assert list(store.shards()) == []
    with pytest.raises(StaleError, match=r"key\.examples"):
        SignalStore.open(tmp_path / "signals", examples=chats[:1])
