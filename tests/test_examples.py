"""Laws of examples on disk and in batches: they read back as written, every one is seen once, next to nothing
is padded, and states, signals and targets line up."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import StaleError
from limbeck.records import Example, Split
from limbeck.render.batches import PADDING, batches, collate, padding_share
from limbeck.render.examples import ExampleSet, make_example, make_set, read_examples, write_examples

DIGEST = "sha256:" + "0" * 64
law = settings(deadline=None, derandomize=True)


def example(tokens: list[int], mask: list[bool], name: str = "c", split: Split = Split.TRAIN) -> Example:
    return make_example(
        np.array(tokens, dtype=np.int32),
        np.array(mask),
        prompt_id=DIGEST,
        completion=name,
        teacher="t",
        split=split,
    )


def same(a: ExampleSet, b: ExampleSet) -> bool:
    rows = zip(a.examples, b.examples, strict=True)
    fields = ("id", "prompt_id", "completion", "teacher", "split")
    return a.manifest == b.manifest and all(
        np.array_equal(x.tokens_T, y.tokens_T)
        and np.array_equal(x.mask_T, y.mask_T)
        and x.tokens_T.dtype == y.tokens_T.dtype
        and all(getattr(x, f) == getattr(y, f) for f in fields)
        for x, y in rows
    )


@settings(law, max_examples=20)
@given(
    st.lists(
        st.tuples(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1), st.sampled_from(Split))
    )
)
def test_examples_read_back_as_they_were_written(tmp_path_factory, rows) -> None:
    made = [example([t for t, _ in r], [m for _, m in r], f"c{i}", s) for i, (r, s) in enumerate(rows)]
    assert len({e.id for e in made}) == len(made)
    examples = make_set(made, tokenizer=DIGEST, templates={"t": DIGEST}, max_length=9)
    directory = tmp_path_factory.mktemp("e") / "examples"
    write_examples(directory, examples)
    back = read_examples(directory)
    assert same(back, examples)
    assert [e.id for e in back.train + back.held_out] == [e.id for s in Split for e in made if e.split == s]
    assert back.manifest.counts[Split.TRAIN].supervised == sum(e.supervised for e in back.train)


def test_examples_of_another_format_or_another_manifest_are_refused(tmp_path) -> None:
    directory = tmp_path / "examples"
    with pytest.raises(StaleError, match=r"manifest\.json"):
        read_examples(directory)
    rows = [example([1, 2], [False, True])]
    write_examples(directory, make_set(rows, tokenizer=DIGEST, templates={"t": DIGEST}, max_length=9))
    path = directory / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"version": 2}))
    with pytest.raises(StaleError, match="version"):
        read_examples(directory)
    whole["counts"]["train"]["supervised"] = 5
    path.write_text(json.dumps(whole))
    with pytest.raises(StaleError, match=r"supervised=1[\s\S]*supervised=5"):
        read_examples(directory)


# -------------------------------------------------------------------------------------------------- batches

sizes = st.lists(st.integers(1, 400), max_size=200)


@law
@given(sizes, st.integers(1, 17), st.integers(0, 2**62), st.integers(0, 5))
def test_every_example_is_in_exactly_one_batch_and_the_order_is_a_function_of_seed_and_epoch(
    lengths, size, seed, epoch
) -> None:
    made = batches(lengths, size, seed=seed, epoch=epoch)
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    assert len(made) == -(-len(lengths) // size)
    assert all(len(b) <= size for b in made)
    assert not made or max(map(len, made)) - min(map(len, made)) <= 1
    assert made == batches(lengths, size, seed=seed, epoch=epoch)
    padded = [max(lengths[i] for i in b) - lengths[j] for b in made for j in b]
    assert padding_share(lengths, made) == pytest.approx(sum(padded) / max(1, sum(padded) + sum(lengths)))


def test_other_seeds_and_epochs_give_other_orders_and_other_neighbours() -> None:
    lengths = np.random.default_rng(0).integers(40, 300, 2000).tolist()
    orders = [batches(lengths, 8, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    groups = [{frozenset(b) for b in order} for order in orders]
    assert all(len(a & b) < 5 for i, a in enumerate(groups) for b in groups[:i])
    widths = [max(lengths[i] for i in b) for b in orders[0]]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.2


@law
@given(sizes, st.integers(1, 17))
def test_padding_is_within_what_sorting_can_promise(lengths, size) -> None:
    # Sorted batches follow each other in length, so all they pad is at most one batch of the full range.
    made = batches(lengths, size, seed=0, epoch=0)
    promise = size * (max(lengths) - min(lengths)) / sum(lengths) if lengths else 0
    assert padding_share(lengths, made) <= max(PADDING, promise)


@pytest.mark.parametrize(("count", "spread"), [(300, 0.3), (1000, 0.3), (1000, 0.6), (1000, 0.9)])
def test_padding_is_next_to_nothing(count, spread) -> None:
    drawn = np.random.default_rng(count).lognormal(np.log(150), spread, count)
    lengths = np.clip(drawn, 10, 600).astype(int).tolist()
    for epoch in range(3):
        assert padding_share(lengths, batches(lengths, 8, seed=1, epoch=epoch)) <= 0.03


def test_states_signals_and_targets_line_up() -> None:
    rows = [
        example([5, 6, 7, 8], [False, False, True, True], "a"),
        example([9, 2], [False, True], "b"),
        example([3, 4, 2, 3, 4, 2], [False, True, True, False, False, True], "c"),
    ]
    batch = collate(rows, pad_id=2)
    assert batch.example_ids == tuple(e.id for e in rows)
    # A state that says which example and position it is, and which token stands there.
    place_BT2 = torch.cartesian_prod(torch.arange(3), torch.arange(6)).view(3, 6, 2)
    assert place_BT2[batch.predict_BT].tolist() == [[0, 1], [0, 2], [1, 0], [2, 0], [2, 1], [2, 4]]
    assert batch.tokens_BT[batch.predict_BT].tolist() == [6, 7, 9, 3, 4, 4]
    assert batch.targets_N.tolist() == [7, 8, 2, 4, 2, 2]
    assert batch.supervised == sum(e.supervised for e in rows)
    assert batch.attention_BT.sum(1).tolist() == [4, 2, 6]
    # The pad token is the end of the turn: as padding it is no target, as the teacher's it is.
    assert not batch.predict_BT[0, 3:].any()
    assert not batch.predict_BT[1, 1:].any()
    with pytest.raises(ValueError, match="first token"):
        collate([example([1, 2], [True, True], "d")], pad_id=0)


def test_a_padded_batch_predicts_what_each_example_alone_predicts() -> None:
    random = np.random.default_rng(0)
    made = []
    for i, size in enumerate((9, 2, 5, 12)):
        mask = [False, *(random.random(size - 1) < 0.5).tolist()]
        made.append(example(random.integers(0, 320, size).tolist(), mask, str(i)))
    model = tiny.llama(320, layers=2).double()
    batch = collate(made, pad_id=2)
    with torch.no_grad():
        together_NV = model(batch.tokens_BT).logits[batch.predict_BT].log_softmax(-1)
        alone = []
        for e in made:
            all_TV = model(torch.from_numpy(e.tokens_T.astype(np.int64))[None]).logits[0].log_softmax(-1)
            alone += [all_TV[t - 1, e.tokens_T[t]] for t in range(len(e.tokens_T)) if e.mask_T[t]]
    found_N = together_NV.gather(1, batch.targets_N[:, None]).squeeze(1)
    torch.testing.assert_close(found_N, torch.stack(alone))
