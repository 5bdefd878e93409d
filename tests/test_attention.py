"""Attention by plain products is softmax attention, in value and gradient, masked, packed and in a whole model."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from limbeck.models import attention as attention_module
from limbeck.models.attention import fast_attention, grouped_attention


def draw(heads: int, key_heads: int, queries: int, keys: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, queries, 8, generator=generator, dtype=dtype)
    key, value = torch.randn(2, 2, key_heads, keys, 8, generator=generator, dtype=dtype)
    return tuple(t.requires_grad_() for t in (query, key.clone(), value.clone()))


def additive(seen: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (4, 1)])
def test_one_query_a_row_by_a_loop(masked, heads, key_heads):
    query, key, value = draw(heads, key_heads, 1, 13)
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 1, 13, generator=generator) < 0.7 if masked else torch.ones(2, 1, 1, 13, dtype=torch.bool)
    seen[..., -1] = True
    mask = additive(seen) if masked else None
    output, weights = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert weights is None
    for row in range(2):
        for head in range(heads):
            keys, values = key[row, head * key_heads // heads], value[row, head * key_heads // heads]
            places = seen[row, 0, 0].nonzero()[:, 0]
            expected = (0.3 * keys[places] @ query[row, head, 0]).softmax(0) @ values[places]
            torch.testing.assert_close(output[row, 0, head], expected)


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("at_a_time", [1, 1 << 21])
def test_value_and_gradient_are_those_of_torch(heads, key_heads, rows, at_a_time, monkeypatch):
    """With one mask for all sequences and one for each; sequence by sequence, and together."""
    monkeypatch.setattr(attention_module, "_AT_A_TIME", at_a_time)
    seen = torch.ones(rows, 1, 11, 11).tril().bool()
    seen[-1, :, 6:, :3] = False
    ours, theirs = draw(heads, key_heads, 11, 11), draw(heads, key_heads, 11, 11)
    output, _ = grouped_attention(torch.nn.Module(), *ours, additive(seen))
    expected = scaled_dot_product_attention(*theirs, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * noise).sum().backward()
    (expected.transpose(1, 2) * noise).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_values_may_be_of_another_width_than_queries():
    mask = additive(torch.ones(1, 1, 6, 6).tril().bool())
    ours, theirs = draw(4, 2, 6, 6), draw(4, 2, 6, 6)
    output, _ = grouped_attention(torch.nn.Module(), ours[0], ours[1], ours[2][..., :5], mask)
    expected = scaled_dot_product_attention(*theirs[:2], theirs[2][..., :5], is_causal=True, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    (output.square().sum() + expected.square().sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_gradient_is_that_of_finite_differences():
    mask = additive(torch.ones(1, 1, 4, 4).tril().bool())
    inputs = draw(4, 2, 4, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: grouped_attention(torch.nn.Module(), q, k, v, mask)[0], inputs)


def test_a_mask_in_float32_stays_finite_in_bfloat16():
    """Minus the largest float32 is minus infinity in bfloat16, and the softmax of a row of it is not a number."""
    seen = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    query, key, value = draw(4, 2, 5, 5, torch.bfloat16)
    output, _ = grouped_attention(torch.nn.Module(), query, key, value, additive(seen, torch.float32))
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("most", [0, 1 << 24])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_packed_examples_do_not_see_each_other(most, lengths):
    """A whole model, by our attention and by torch's (which takes over where too much would be held)."""
    model = tiny.llama(50).double()
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 50, (1, n), generator=generator) for n in lengths]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), fast_attention(model):
        patch.setattr(attention_module, "_MOST", most)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = model.model(input_ids=torch.cat(parts, 1), position_ids=positions, use_cache=False).last_hidden_state
    apart = torch.cat([model.model(input_ids=part, use_cache=False).last_hidden_state for part in parts], 1)
    torch.testing.assert_close(packed, apart)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_learns_the_same_by_either_attention():
    tokens = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for fast in (False, True):
        model = tiny.llama(50).double()
        model.train()
        with fast_attention(model) if fast else torch.enable_grad():
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name])
