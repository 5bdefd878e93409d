"""Laws of the signals: sampling is unbiased, storage is unbiased, moving positions changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.errors import InputError
from limbeck.signal import (
    DenseSignal,
    HiddenSignal,
    SampledSignal,
    TextSignal,
    TopKSignal,
    concat,
    from_logits,
    threshold_sample,
    topk_signal,
)
from limbeck.signal.encoding import SampledArrays, decode_sampled, encode_sampled
from limbeck.signal.sampling import _touched
from limbeck.signal.types import SampledLayout


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(rows: int, vocab: int, sharpness: float, seed: int = 0) -> Tensor:
    """Softmax of normal logits in float64: nearly uniform at sharpness 0.1, one dominant token at 8."""
    logits = torch.randn(rows, vocab, generator=seeded(seed), dtype=torch.float64)
    return torch.softmax(logits * sharpness, dim=1)


def many(probs_V: Tensor, tau: float, draws: int, seed: int = 1) -> SampledSignal:
    return threshold_sample(probs_V.expand(draws, -1), tau, generator=seeded(seed))


@pytest.mark.parametrize("sharpness", [0.1, 2.0, 4.0, 8.0])
@pytest.mark.parametrize(("vocab", "tau"), [(150, 0.02), (150, 0.3), (7, 0.05)])
def test_expectation_is_the_distribution_token_by_token(vocab: int, tau: float, sharpness: float) -> None:
    draws = 6000
    p = distributions(1, vocab, sharpness)[0]
    dense = many(p, tau, draws).to_dense().double()
    tail = p < tau
    # A tail weight is tau or 0: its variance is p(tau - p). A head weight has none.
    error = (p * (tau - p) / draws).sqrt()[tail]
    # float32 holds tau to 1e-7 only; rare tokens are let off a normal approximation that does not fit them.
    assert ((dense.mean(0) - p)[tail].abs() <= 5 * error + 2 * tau / draws).all()
    torch.testing.assert_close(dense[:, ~tail], p[~tail].expand(draws, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sharpness", [0.1, 2.0, 4.0, 8.0])
def test_expectation_of_the_mass_is_one_and_every_draw_is_within_tau(sharpness: float) -> None:
    draws, tau = 4000, 0.05
    p = distributions(1, 150, sharpness)[0]
    mass = many(p, tau, draws).to_dense().double().sum(1)
    assert (mass - 1).abs().max() < tau * (1 + 1e-5)
    part = float(p[p < tau].sum()) / tau % 1
    error = tau * math.sqrt(part * (1 - part) / draws)
    assert abs(float(mass.mean()) - 1) < 5 * error + 1e-6


def test_variance_is_the_least_for_its_expected_size() -> None:
    # Duffield, Lund and Thorup: the sum of variances is sum p(tau - p) over the tail.
    draws, tau = 4000, 0.03
    p = distributions(1, 100, 2.0)[0]
    squared = (many(p, tau, draws).to_dense().double() - p).square().sum(1)
    expected = float((p * (tau - p))[p < tau].sum())
    assert abs(float(squared.mean()) - expected) < 5 * float(squared.std()) / math.sqrt(draws)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 200),
    rows=st.integers(0, 9),
    sharpness=st.floats(0, 30),
    tau=st.floats(0.005, 1),
    seed=st.integers(0, 2**31),
    double=st.booleans(),
)
def test_laws_of_one_draw(vocab: int, rows: int, sharpness: float, tau: float, seed: int, double: bool) -> None:
    p = distributions(rows, vocab, sharpness, seed)
    p = p if double else p.float()
    signal = threshold_sample(p, tau, generator=seeded(seed))
    head = p >= tau
    assert torch.equal(signal.n_head_N, head.sum(1).int())
    exact = torch.where(head, 0, p).double().sum(1) / tau
    assert ((signal.n_tail_N - exact).abs() < 1 + 1e-5).all()
    rows_E, ids_E, weights_E, starts = signal.entries()
    assert starts == [0, *(signal.n_head_N + signal.n_tail_N).cumsum(0).tolist()]
    assert len(set(zip(rows_E.tolist(), ids_E.tolist(), strict=True))) == len(ids_E)
    assert (p[rows_E, ids_E] > 0).all()
    is_head_E = head[rows_E, ids_E]
    torch.testing.assert_close(weights_E[is_head_E], p[rows_E, ids_E][is_head_E].float(), rtol=0, atol=0)
    assert torch.equal(weights_E[~is_head_E], torch.full((int((~is_head_E).sum()),), tau))
    entropy = torch.special.entr(p.double()).sum(1)
    torch.testing.assert_close(signal.entropy_N.double(), entropy, rtol=1e-5, atol=1e-5)


def test_tokens_of_no_probability_are_never_drawn_and_a_certain_token_is_always_kept() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0]]).repeat(500, 1)
    signal = threshold_sample(p, 0.5, generator=seeded(0))
    assert torch.equal(signal.to_dense(), p)
    assert torch.equal(signal.entropy_N, torch.zeros(500))


def test_positions_are_drawn_independently_of_each_other() -> None:
    p = distributions(1, 64, 0.5)[0]
    dense = many(p, 0.2, 4001).to_dense().double()
    drawn = (dense > 0).double() - (dense > 0).double().mean(0)
    neighbours = (drawn[1:] * drawn[:-1]).sum() / drawn.square().sum()
    assert abs(float(neighbours)) < 5 / math.sqrt(4000)


def test_draws_are_those_of_a_slow_exact_version_in_a_vocabulary_of_a_quarter_million() -> None:
    # Line positions summed in float32 would be off by whole tokens towards the end.
    vocab, tau, rows = 262_144, 0.0005, 3
    p = torch.softmax(torch.randn(rows, vocab, generator=seeded(0)), dim=1)
    signal = threshold_sample(p, tau, generator=seeded(1))
    offsets = torch.rand(rows, generator=seeded(1), dtype=torch.float64).numpy()
    found, missed = signal.to_dense().numpy() > 0, 0
    for row, offset in enumerate(offsets):
        exact = p[row].numpy().astype(np.float64)
        line = offset + np.cumsum(np.where(exact < tau, exact, 0) / tau)
        drawn = np.floor(line) > np.floor(np.concatenate([[offset], line[:-1]]))
        missed += int((found[row] != (drawn | (exact >= tau))).sum())
    # Tokens lie 0.008 apart on the line; group sums are off by about 1e-5.
    assert len(signal.ids_E) > 5000
    assert missed < 50


def test_a_group_gets_as_many_draws_as_its_ends_on_the_line_say() -> None:
    values = torch.rand(20_000, 8, generator=seeded(0), dtype=torch.float64) * (torch.arange(8) < 6)
    begins = torch.rand(20_000, generator=seeded(1), dtype=torch.float64)
    ends = torch.full((20_000,), 1.0, dtype=torch.float64)
    drawn = _touched(values * ((ends - begins) / values.sum(1))[:, None], begins, ends)
    assert (drawn.sum(1) == 1).all()
    assert not drawn[:, 6:].any()


def test_same_generator_same_sample_and_the_sample_does_not_depend_on_blocks() -> None:
    p = distributions(5, 300, 2.0)
    one = threshold_sample(p, 0.02, generator=seeded(3))
    again = threshold_sample(p, 0.02, generator=seeded(3))
    other = threshold_sample(p, 0.02, generator=seeded(4))
    assert torch.equal(one.to_dense(), again.to_dense())
    assert not torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_from_logits_samples_the_softened_softmax_over_the_shared_range(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 90, generator=seeded(0)) * 4).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    p = torch.softmax(logits[:, :80].to(wide) / 1.7, dim=1)
    expected = threshold_sample(p, 0.05, generator=seeded(5))
    found = from_logits(logits, 0.05, 1.7, generator=seeded(5), vocab_size=80)
    assert (found.vocab_size, found.temperature) == (80, 1.7)
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    torch.testing.assert_close(found.entropy_N, expected.entropy_N, rtol=1e-5, atol=1e-5)


def test_a_token_the_teacher_rules_out_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]]).repeat(50, 1)
    signal = from_logits(logits, 0.9, generator=seeded(0))
    assert set(signal.ids_E.tolist()) <= {0, 2}
    p = 1 / (1 + math.e)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    torch.testing.assert_close(signal.entropy_N, torch.full((50,), entropy))


def test_top_k_lists_the_likeliest_and_the_exact_rest() -> None:
    logits = torch.randn(6, 50, generator=seeded(0), dtype=torch.float64) * 5
    p = torch.softmax(logits / 2, dim=1)
    signal = topk_signal(logits, 7, 2.0)
    ordered = p.sort(dim=1, descending=True).values
    torch.testing.assert_close(signal.log_probs_NK.double().exp(), ordered[:, :7], rtol=1e-5, atol=0)
    torch.testing.assert_close(signal.tail_mass_N.double(), ordered[:, 7:].sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab", [300, 70_000])
def test_encoded_and_decoded_again_only_the_numbers_are_rounded(vocab: int) -> None:
    p = distributions(40, vocab, 4.0).float()
    signal = threshold_sample(p, 0.03, generator=seeded(0))
    arrays = encode_sampled(signal, seeded(1))
    found = decode_sampled(arrays, tau=0.03, vocab_size=vocab)
    for name in ("n_head_N", "n_tail_N", "ids_E"):
        assert torch.equal(getattr(found, name), getattr(signal, name))
    # Levels of 3x^2 - 2x^3 are at most 1.5 / 255 apart; entropy steps are ln(V) / 65535.
    assert (found.head_probs_H - signal.head_probs_H).abs().max() <= 1.5 / 255
    assert (found.entropy_N - signal.entropy_N).abs().max() <= math.log(vocab) / 65535 + 1e-6
    assert found.head_probs_H.min() >= 0.03 - 1e-9
    assert found.head_probs_H.max() <= 1
    head_codes = encode_sampled(found, seeded(2)).head
    assert np.array_equal(head_codes, arrays.head)


@pytest.mark.parametrize("value", [0.03, 0.0301, 0.2, 0.51234, 0.97, 0.9999, 1.0])
def test_rounding_of_head_probabilities_is_unbiased(value: float) -> None:
    n = 20_000
    counts = torch.ones(n, dtype=torch.int32)
    ids, entropy = torch.zeros(n, dtype=torch.int32), torch.full((n,), 1.2345)
    signal = SampledSignal(counts, counts * 0, ids, torch.full((n,), value), entropy, 0.03, 10)
    found = decode_sampled(encode_sampled(signal, seeded(0)), tau=0.03, vocab_size=10)
    for stored, true in ((found.head_probs_H, signal.head_probs_H), (found.entropy_N, entropy)):
        off = stored.double() - true.double()
        assert abs(float(off.mean())) <= 5 * float(off.std()) / math.sqrt(n) + 1e-7


def test_numbers_are_as_wide_as_tau_and_the_vocabulary_ask_for() -> None:
    assert SampledLayout.of(0.02, 49_152) == (1, 2, 1, 2)
    assert SampledLayout.of(0.001, 49_152) == (2, 2, 1, 2)
    assert SampledLayout.of(0.001, 200) == (1, 2, 1, 2)
    assert SampledLayout.of(0.02, 65_537).id_bytes == 3
    assert SampledLayout.of(0.02, 1 << 24).id_bytes == 3


def test_three_byte_ids_come_back() -> None:
    ids = torch.tensor([0, 1, 255, 256, 65_535, 65_536, 262_143], dtype=torch.int32)
    n = torch.ones(7, dtype=torch.int32)
    signal = SampledSignal(n, n * 0, ids, torch.ones(7), torch.zeros(7), 0.5, 262_144)
    arrays = encode_sampled(signal, seeded(0))
    assert (arrays.ids.shape, arrays.ids.dtype) == ((7, 3), np.uint8)
    assert torch.equal(decode_sampled(arrays, tau=0.5, vocab_size=262_144).ids_E, ids)


def signals() -> list[TextSignal | SampledSignal | TopKSignal | HiddenSignal | DenseSignal]:
    logits = torch.randn(9, 40, generator=seeded(0)) * 3
    head = torch.randn(40, 5, generator=seeded(1))
    return [
        TextSignal(torch.arange(9), 40),
        from_logits(logits, 0.05, generator=seeded(2)),
        topk_signal(logits, 4),
        HiddenSignal(torch.randn(9, 5, generator=seeded(3)), head, 40),
        DenseSignal(logits),
    ]


def rows_of(signal: TextSignal | SampledSignal | TopKSignal | HiddenSignal | DenseSignal) -> Tensor:
    """What each position holds, as a matrix."""
    if isinstance(signal, SampledSignal):
        return torch.cat([signal.to_dense(), signal.entropy_N[:, None]], dim=1)
    if isinstance(signal, TopKSignal):
        return torch.cat([signal.ids_NK, signal.log_probs_NK, signal.tail_mass_N[:, None]], dim=1)
    if isinstance(signal, HiddenSignal):
        return signal.hidden_ND
    return signal.ids_N[:, None] if isinstance(signal, TextSignal) else signal.logits_NV


@pytest.mark.parametrize("number", range(5))
def test_moving_positions_changes_nothing_else(number: int) -> None:
    signal = signals()[number]
    rows = rows_of(signal)
    picked = torch.tensor([8, 0, 3, 3])
    assert torch.equal(rows_of(signal.index_select(picked)), rows[picked])
    for start, stop in ((0, 9), (2, 5), (4, 4), (5, 2), (-3, 100)):
        assert torch.equal(rows_of(signal.slice(start, stop)), rows[start:stop])
    parts = [signal.slice(0, 4), signal.slice(4, 4), signal.slice(4, 9)]
    assert torch.equal(rows_of(concat(parts)), rows)
    assert len(signal.to("cpu")) == len(signal) == 9


def refused(make, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.0001, math.nan])
def test_a_tau_that_is_no_probability_is_refused(tau: float) -> None:
    refused(lambda: threshold_sample(torch.tensor([[1.0]]), tau, generator=seeded(0)), "tau", str(tau))


def test_a_tau_that_counts_cannot_hold_is_refused() -> None:
    p = torch.full((1, 100_000), 1e-5)
    refused(lambda: threshold_sample(p, 1e-5, generator=seeded(0)), "tau", "65,535")
    assert len(threshold_sample(p, 2e-5, generator=seeded(0)).ids_E) in (49_999, 50_000, 50_001)


def test_rows_that_are_no_distributions_are_all_named_with_their_sums() -> None:
    p = torch.full((5, 4), 0.25)
    p[1] *= 0.9
    p[3, 0] = math.nan
    p[4] = torch.tensor([0.6, 0.6, -0.2, 0.0])
    refused(
        lambda: threshold_sample(p, 0.1, generator=seeded(0)),
        "3 of 5", "probs[1]", "0.9", "probs[3]", "nan", "probs[4]", "-0.2",
    )  # fmt: skip


def test_half_precision_probabilities_are_refused() -> None:
    p = torch.full((1, 4), 0.25, dtype=torch.bfloat16)
    refused(lambda: threshold_sample(p, 0.1, generator=seeded(0)), "bfloat16", "float32")


def test_signals_that_do_not_hold_together_are_refused() -> None:
    n = torch.ones(2, dtype=torch.int32)
    refused(
        lambda: SampledSignal(n, n, torch.zeros(3), torch.ones(1), torch.ones(3), 0.1, 5),
        "ids_E", "head_probs_H", "entropy_N",
    )  # fmt: skip
    refused(lambda: TextSignal(torch.tensor([3, -100]), 5), "ids from -100 to 3", "0 to 4")
    refused(lambda: TopKSignal(torch.tensor([[1, 1]]), torch.zeros(1, 2), torch.zeros(1), 5), "twice")
    refused(lambda: HiddenSignal(torch.zeros(2, 3), torch.zeros(5, 4), 6), "hidden_ND", "vocab_size")
    refused(lambda: concat([]), "empty")
    one, other = signals()[1], from_logits(torch.zeros(1, 41), 0.1, generator=seeded(0))
    refused(lambda: concat([one, other]), "tau", "vocab_size", "0.1")
    refused(lambda: concat([one, signals()[0]]), "TextSignal", "SampledSignal")
    refused(lambda: concat([signals()[3], signals()[3]]), "head_weight_VD")


def test_stored_arrays_of_other_settings_are_refused() -> None:
    signal = from_logits(torch.randn(4, 300, generator=seeded(0)), 0.02, generator=seeded(1))
    arrays = encode_sampled(signal, seeded(2))
    refused(lambda: decode_sampled(arrays, tau=0.001, vocab_size=70_000), "n_head", "uint16", "ids", "uint8")
    refused(lambda: decode_sampled(arrays, tau=0.02, vocab_size=100), "ids from")
    short = SampledArrays(*arrays[:2], arrays.ids[:-1], *arrays[3:])
    refused(lambda: decode_sampled(short, tau=0.02, vocab_size=300), "ids_E")
