"""The sampling loop against a model that is called on one row at a time, without a cache."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import tiny
import torch
from sampling_oracle import STOPS, VOCABULARY, ragged, shaped, shapes_read, slow

from limbeck.errors import InputError
from limbeck.generate import Sampling, sample_batch


@pytest.fixture(scope="module")
def model():
    """Float64, so that a row's neighbours cannot move a draw across an edge by rounding."""
    return tiny.llama(VOCABULARY).double()


@pytest.mark.parametrize(
    "sampling", [Sampling(1), Sampling(1, temperature=0.7, top_k=12), Sampling(1, top_p=0.8)], ids=repr
)
def test_first_tokens_over_many_seeds_have_the_model_distribution(model, sampling):
    """Chi-square over cells of at least 20 expected, below its 1e-4 quantile (Wilson and Hilferty 1931)."""
    count, prompt = 6000, [5, 6, 7]
    answers = sample_batch(model, [prompt] * count, sampling, stop_ids=(), seeds=range(count))
    drawn = np.bincount([answer.tokens[0] for answer in answers], minlength=VOCABULARY)
    with torch.no_grad():
        expected = count * np.array(shaped(model(torch.tensor([prompt])).logits[0, -1], sampling))
    assert not drawn[expected == 0].any()
    large = expected >= 20
    cells = [(drawn[token], expected[token]) for token in np.flatnonzero(large)]
    rest = expected[~large].sum()
    if rest > 0:
        cells.append((drawn[~large].sum(), rest))
    freedom = len(cells) - 1
    statistic = sum((seen - hoped) ** 2 / hoped for seen, hoped in cells)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 5
    assert statistic < bound


LOOPS = [
    Sampling(14),
    Sampling(14, temperature=0.7, top_p=0.9),
    Sampling(14, temperature=0),
    Sampling(14, top_k=5),
]


@pytest.mark.parametrize("sampling", LOOPS, ids=repr)
@pytest.mark.parametrize("prefix", [0, 10])
def test_every_row_is_what_the_slow_loop_gives(model, sampling, prefix):
    prompts = ragged(17, prefix=prefix)
    prompts += [prompts[3], prompts[3], prompts[8]]
    seeds = range(100, 120)
    expected = [slow(model, prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    for rows in (None, 1, 3, 8):
        assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=seeds, rows=rows) == expected


def test_float32_rows_do_not_depend_on_their_neighbours():
    model = tiny.llama(VOCABULARY)
    prompts, sampling = ragged(12), Sampling(12)
    alone = [
        sample_batch(model, [prompt], sampling, stop_ids=STOPS, seeds=[seed])[0] for seed, prompt in enumerate(prompts)
    ]
    together = sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(12))
    order = random.Random(1).sample(range(12), 12)
    mixed = sample_batch(model, [prompts[place] for place in order], sampling, stop_ids=STOPS, seeds=order, rows=5)
    assert together == alone
    assert mixed == [alone[place] for place in order]
    assert together == [slow(model, prompt, sampling, seed) for seed, prompt in enumerate(prompts)]


def test_finished_rows_leave_the_batch_and_waiting_prompts_take_their_places(model):
    prompts = ragged(40)
    with shapes_read(model) as shapes:
        sample_batch(model, prompts, Sampling(30), stop_ids=STOPS, seeds=range(40))
    steps = [rows for rows, tokens in shapes[1:]]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] == 40
    assert steps[-1] <= 2
    with shapes_read(model) as shapes:
        sample_batch(model, prompts, Sampling(30), stop_ids=STOPS, seeds=range(40), rows=8)
    assert max(rows for rows, _ in shapes) == 8
    reads = [place for place, (rows, tokens) in enumerate(shapes) if tokens > 1 or rows < 8]
    assert any(shapes[place - 1] == (8, 1) and shapes[place + 1] == (8, 1) for place in reads[1:-1])


def test_what_prompts_share_is_read_once(model):
    prompts = ragged(6, prefix=20)
    longest = max(map(len, prompts))
    with shapes_read(model) as shapes:
        sample_batch(model, prompts, Sampling(2), stop_ids=(), seeds=range(6))
    assert shapes == [(1, 20), (6, longest - 20), (6, 1)]
    with shapes_read(model) as shapes:
        sample_batch(model, [prompts[0]] * 50, Sampling(2), stop_ids=(), seeds=range(50))
    assert shapes == [(1, len(prompts[0])), (50, 1)]


def test_a_prompt_that_begins_another_is_continued_too(model):
    prompts = [ragged(1, prefix=30)[0], *[ragged(1, prefix=30)[0][:length] for length in (9, 12, 30)]]
    sampling = Sampling(5)
    expected = [slow(model, prompt, sampling, seed) for seed, prompt in enumerate(prompts)]
    assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(4)) == expected


def test_only_the_logits_of_the_last_position_are_computed(model):
    widths = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    sample_batch(model, ragged(5), Sampling(3), stop_ids=(), seeds=range(5))
    hook.remove()
    assert set(widths) == {1}


def test_greedy_is_what_the_library_generates(model):
    prompts = ragged(7)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=sorted(STOPS),
        pad_token_id=0,
    )[:, width:].tolist()
    answers = sample_batch(model, prompts, Sampling(20, temperature=0), stop_ids=STOPS, seeds=[0] * 7)
    for answer, tokens in zip(answers, generated, strict=True):
        ended = next((place for place, token in enumerate(tokens) if token in STOPS), len(tokens))
        assert list(answer.tokens) == tokens[:ended]
        assert answer.stop_token == (tokens[ended] if ended < len(tokens) else None)


def test_fewer_tokens_are_the_beginning_of_more(model):
    prompts = ragged(6)
    longer = sample_batch(model, prompts, Sampling(20), stop_ids=STOPS, seeds=range(6))
    for count in (1, 2, 7):
        for short, long in zip(
            sample_batch(model, prompts, Sampling(count), stop_ids=STOPS, seeds=range(6)), longer, strict=True
        ):
            assert short.tokens == long.tokens[:count]
            assert (short.finish_reason == "stop") == (long.finish_reason == "stop" and len(long.tokens) < count)


def test_answers_are_told_once_as_they_finish(model):
    prompts, told = ragged(9), []
    with shapes_read(model) as shapes:
        answers = sample_batch(
            model,
            prompts,
            Sampling(20),
            stop_ids=STOPS,
            seeds=range(9),
            rows=4,
            on_done=lambda index, answer: told.append((index, answer, len(shapes))),
        )
    assert sorted((index, answer) for index, answer, _ in told) == list(enumerate(answers))
    assert told[0][2] < len(shapes)


@pytest.mark.parametrize("rows", [None, 4])
def test_tokens_are_told_of_as_they_are_drawn(model, rows):
    """All of them, those that end answers too; and long before the batch is over."""
    prompts, told = ragged(9), []
    answers = sample_batch(
        model, prompts, Sampling(12), stop_ids=STOPS, seeds=range(9), rows=rows, on_tokens=told.append
    )
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert sum(told) == sum(len(answer.tokens) + (answer.stop_token is not None) for answer in answers)
    assert len(told) >= 12
    assert max(told) <= (rows or 9)


def test_long_prompts_are_read_in_parts_that_fit(model, monkeypatch):
    prompts, sampling = ragged(11), Sampling(4)
    expected = sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(11))
    monkeypatch.setattr("limbeck.generate.cache.Slots.read_tokens", 24)
    with shapes_read(model) as shapes:
        assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(11)) == expected
    assert all(rows * tokens <= 24 for rows, tokens in shapes if tokens > 1)
    assert sample_batch(model, prompts, sampling, stop_ids=STOPS, seeds=range(11)) == expected


def test_no_prompts_no_answers(model):
    assert sample_batch(model, [], Sampling(5), stop_ids=STOPS, seeds=[]) == []


def test_every_bad_prompt_and_seed_is_named(model):
    with pytest.raises(InputError) as caught:
        sample_batch(
            model,
            [[1], [], [VOCABULARY], [-1], [1] * 510],
            Sampling(5),
            stop_ids=(),
            seeds=[0, -1, 2**128, 3],
            rows=0,
        )
    assert [problem.where for problem in caught.value.problems] == [
        "rows",
        "seeds",
        "seeds[1]",
        "seeds[2]",
        "prompts[1]",
        "prompts[2]",
        "prompts[3]",
        "prompts[4]",
    ]
    assert model.config._attn_implementation == "sdpa"
