"""The draw of one token against a sorted oracle, and the stream of uniforms against its publication."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import inverse, shaped

from limbeck.errors import InputError, ModelError
from limbeck.generate import Sampling, next_tokens, uniforms

# --- the stream of uniforms


def philox(key: int, counter: int) -> list[int]:
    """Philox-4x64-10 as published (Salmon et al. 2011, section 3.3)."""
    mask = 2**64 - 1
    words = [(counter >> (64 * place)) & mask for place in range(4)]
    keys = [key & mask, key >> 64]
    for turn in range(10):
        if turn:
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (second >> 64) ^ words[1] ^ keys[0],
            second & mask,
            (first >> 64) ^ words[3] ^ keys[1],
            first & mask,
        ]
    return words


@given(seed=st.integers(0, 2**128 - 1), count=st.integers(1, 19))
def test_uniforms_are_the_published_philox_stream(seed, count):
    raw = [word for block in range(1, 6) for word in philox(seed, block)]
    assert uniforms(seed, count).tolist() == [(word >> 11) / 2**53 for word in raw[:count]]


# --- the draw

SHAPES = [
    Sampling(1),
    Sampling(1, temperature=0.6),
    Sampling(1, temperature=1.7),
    Sampling(1, top_p=0.95),
    Sampling(1, top_p=0.5),
    Sampling(1, top_p=0.999),
    Sampling(1, top_p=1e-9),
    Sampling(1, top_k=1),
    Sampling(1, top_k=50),
    Sampling(1, top_k=64),
    Sampling(1, top_k=2000),
    Sampling(1, top_k=10**9, top_p=0.7),
    Sampling(1, temperature=0.8, top_k=40, top_p=0.9),
]


@pytest.mark.parametrize("sampling", SHAPES, ids=repr)
@pytest.mark.parametrize("vocabulary", [5, 300, 4096])
def test_draw_is_the_inverse_of_the_sorted_oracle(sampling, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    for spread in (0.0, 0.1, 2.0, 9.0):
        logits = spread * torch.randn(6, vocabulary, generator=generator, dtype=torch.float64)
        draws = torch.rand(6, generator=generator, dtype=torch.float64)
        tokens = next_tokens(logits, draws, sampling).tolist()
        for row, token in enumerate(tokens):
            probs = shaped(logits[row], sampling)
            below = math.fsum(probs[:token])
            assert probs[token] > 0
            assert below - 1e-9 <= draws[row] <= below + probs[token] + 1e-9


@pytest.mark.parametrize(
    "sampling", [Sampling(1, top_k=7), Sampling(1, top_p=0.4), Sampling(1, top_k=300, top_p=0.6)], ids=repr
)
def test_equals_of_the_last_token_kept_are_kept(sampling):
    """Coarse logits have many ties, more of them than the narrow look at the most likely tokens can hold."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 3, (4, 1280), generator=generator).to(torch.bfloat16)
    draws = torch.linspace(0, 1, 400, dtype=torch.float64)[:-1]
    for row in logits:
        kept = {token for token, prob in enumerate(shaped(row, sampling)) if prob > 0}
        drawn = set(next_tokens(row.expand(len(draws), -1), draws, sampling).tolist())
        assert drawn <= kept
        assert {float(row[token]) for token in drawn} == {float(row[token]) for token in kept}
        assert len(drawn) > 0.9 * min(len(kept), len(draws))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_impossible_tokens_are_never_drawn(data):
    vocabulary = data.draw(st.sampled_from([1, 2, 255, 257, 4096]))
    possible = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1, max_size=4))
    sampling = data.draw(st.sampled_from(SHAPES))
    logits = torch.full((5, vocabulary), -math.inf)
    logits[:, sorted(possible)] = torch.randn(5, len(possible), generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([0.0, 5e-324, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    tokens = next_tokens(logits, draws, sampling).tolist()
    assert set(tokens) <= possible
    if sampling == Sampling(1):
        assert (tokens[0], tokens[-1]) == (min(possible), max(possible))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_drawn_in_float32_at_least(dtype):
    logits = torch.randn(64, 2000, generator=torch.Generator().manual_seed(2)).to(dtype)
    draws = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = [
        inverse(row.double().softmax(-1).tolist(), float(draw)) for row, draw in zip(logits, draws, strict=True)
    ]
    assert next_tokens(logits, draws, Sampling(1)).tolist() == expected


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert next_tokens(logits, torch.zeros(2, dtype=torch.float64), Sampling(1, temperature=0)).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=0), Sampling(1, top_p=0.9)], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_distribution_are_refused(sampling, bad):
    logits = torch.zeros(3, 40)
    logits[1, 20] = bad
    with pytest.raises(ModelError, match=r"rows \[1\]"):
        next_tokens(logits, torch.zeros(3, dtype=torch.float64), sampling)
    logits[1] = -math.inf
    with pytest.raises(ModelError, match=r"rows \[1\]"):
        next_tokens(logits, torch.zeros(3, dtype=torch.float64), sampling)


def test_every_bad_setting_is_named():
    with pytest.raises(InputError) as caught:
        Sampling(max_tokens=0, temperature=-1, top_p=0, top_k=-1)
    assert len(caught.value.problems) == 4
    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match="temperature"):
            Sampling(5, temperature=wrong)
        with pytest.raises(InputError, match="top_p"):
            Sampling(5, top_p=wrong)
