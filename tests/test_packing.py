"""Packing: what is unpacked is what was packed, damage is found, and the bytes told are the bytes written."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import StaleError
from limbeck.ledger.canonical import digest_bytes
from limbeck.signal import packing
from limbeck.signal.encoding import SampledArrays, encode_sampled, pack_ids
from limbeck.signal.packing import columns, group, pack, unpack
from limbeck.signal.planes import Packed
from limbeck.signal.sampling import from_logits
from limbeck.signal.store import Planned, SignalKey, SignalStore, SignalWriter
from limbeck.signal.types import SampledLayout, SampledSignal

D = digest_bytes(b"something")


def same(a: SampledArrays, b: SampledArrays) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=80, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("vocab_size", "tau"), [(50, 0.05), (49_152, 0.02), (70_000, 0.001), (1 << 24, 0.001)])
def test_what_is_unpacked_is_what_was_packed(vocab_size, tau, data):
    """Any counts, ids in any order (a sample's ascend; nothing is lost where they do not), any codes."""
    layout = SampledLayout.of(tau, vocab_size)
    most = min(7, 256**layout.count_bytes - 1)
    counts = st.lists(st.tuples(st.integers(0, most), st.integers(0, most)), max_size=12)
    n_head, n_tail = np.array(data.draw(counts), np.int64).reshape(-1, 2).T
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    heads, entries = int(n_head.sum()), int(n_head.sum() + n_tail.sum())
    arrays = SampledArrays(
        n_head.astype(f"<u{layout.count_bytes}"),
        n_tail.astype(f"<u{layout.count_bytes}"),
        pack_ids(random.integers(0, vocab_size, entries).astype(np.int32), layout.id_bytes),
        random.integers(0, 256, heads).astype(np.uint8),
        random.integers(0, 1 << 16, len(n_head)).astype("<u2"),
    )
    block = pack(arrays, layout)
    assert (block.positions, block.entries, block.heads) == (len(n_head), entries, heads)
    assert len(block.row) == columns(layout)
    assert same(unpack(Packed.of(block.row, block.planes), layout), arrays)
    assert len(block.planes) <= arrays.nbytes, "a plane that would not shrink is stored as it is"


def teachers_word(n: int, tau: float = 0.02, vocab_size: int = 4000, seed: int = 0) -> SampledSignal:
    """A sample of a teacher that likes low ids, as the merges of a tokenizer make common tokens low."""
    stream = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(n, vocab_size, generator=stream) - torch.arange(1, vocab_size + 1).log()
    return from_logits(logits, tau, generator=stream)


def test_every_damaged_plane_is_found_or_is_a_value(tmp_path):
    """A changed count is always found: the sums tell. So is a frame cut short."""
    signal = teachers_word(200)
    layout = SampledLayout.of(signal.tau, signal.vocab_size)
    block = pack(encode_sampled(signal, torch.Generator().manual_seed(0)), layout)
    with pytest.raises(StaleError, match="damaged"):
        unpack(block._replace(planes=block.planes[1:] + b"x"), layout)
    sizes = (block.sizes[0] - 1, *block.sizes[1:])
    with pytest.raises(StaleError, match="damaged"):
        unpack(block._replace(sizes=sizes), layout)
    with pytest.raises(StaleError, match="heads"):
        unpack(
            block._replace(
                heads=block.heads, sizes=(200, *block.sizes[1:]), planes=b"\x01" * 200 + block.planes[block.sizes[0] :]
            ),
            layout,
        )


@given(st.lists(st.integers(0, 3 * packing.BLOCK), max_size=12))
def test_examples_share_a_block_while_there_is_room(positions):
    ranges = list(group(positions))
    assert [i for own in ranges for i in own] == list(range(len(positions)))
    sizes = [sum(positions[i] for i in own) for own in ranges]
    assert all(size <= packing.BLOCK or len(own) == 1 for size, own in zip(sizes, ranges, strict=True))
    for number, own in enumerate(ranges[1:], 1):
        assert sizes[number - 1] + positions[own.start] > packing.BLOCK, "no block is closed too early"


@pytest.mark.parametrize("n", [0, 1, 7, packing.BLOCK, 3 * packing.BLOCK + 5])
def test_the_bytes_told_are_the_bytes_of_the_planes_and_the_table(n, tmp_path):
    """Against a store on disk of the same signal, one block an example: its shard, less the file's own header."""
    signal = teachers_word(n)
    parts = [signal.slice(at, at + packing.BLOCK) for at in range(0, n, packing.BLOCK)]
    key = SignalKey(
        kind="sampled", tokenizer=D, templates={}, teachers={}, examples=D, vocab_size=signal.vocab_size, seed=0,
        tau=signal.tau, temperature=1.0,
    )  # fmt: skip
    stream = torch.Generator().manual_seed(0)
    writer = SignalWriter(tmp_path / "signals", key, [[Planned(f"e{i}", len(p)) for i, p in enumerate(parts)]])
    writer.write(0, [encode_sampled(part, stream) for part in parts])
    writer.finish()
    raw = (tmp_path / "signals" / "00000.safetensors").read_bytes()
    payload = len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert signal.nbytes_per_position * n == pytest.approx(payload)
    store = SignalStore.open(tmp_path / "signals")
    assert store.manifest.counts.entries == len(signal.ids_E)


def test_ids_take_less_than_any_code_for_evenly_spread_ones():
    """A set of k of V ids, all alike likely, needs log2(V choose k) bits; two bytes an id are far more than that.
    A teacher's ids are not evenly spread, and the planes come out below even this bound.
    """
    signal = teachers_word(4 * packing.BLOCK)
    counts = [*signal.n_head_N.tolist(), *signal.n_tail_N.tolist()]
    bound = sum(math.log(math.comb(signal.vocab_size, k), 256) for k in counts)
    layout = SampledLayout.of(signal.tau, signal.vocab_size)
    spent = 0
    for at in range(0, len(signal), packing.BLOCK):
        part = signal.slice(at, at + packing.BLOCK)
        spent += sum(pack(encode_sampled(part, torch.Generator().manual_seed(0)), layout).sizes[2:6])
    assert spent < bound < 2 * len(signal.ids_E)
