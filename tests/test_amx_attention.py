"""Causal attention by the matrix unit: nearer to float64 than plain products of bfloat16, whatever the shape and order,
and nothing of what comes later in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.models import amx
from limbeck.models.amx import attention as unit
from limbeck.models.attention import grouped_attention
from limbeck.models.compiling import SWITCH


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "")
        if why := amx.lacking():
            pytest.skip(why)
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        amx._library.cache_clear()
        with amx.for_training(amx.WORTH):
            yield
    amx._library.cache_clear()


def draw(batch: int, heads: int, key_heads: int, length: int, width: int, *, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and a gradient [B, T, heads, d]; scores of a few nats."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, length, width) for h in (heads, key_heads, key_heads)] + [(batch, length, heads, width)]
    query, key, value, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return [query * 2, key, value, grad]


def learned(attend: Any, tensors: list[Tensor]) -> list[Tensor]:
    """What is attended to, and the gradients of queries, keys and values."""
    *inputs, grad = (t.detach().clone() for t in tensors)
    inputs = [t.requires_grad_() for t in inputs]
    mixed = attend(*inputs, inputs[0].shape[-1] ** -0.5)
    mixed.backward(grad)
    return [mixed.detach(), *(t.grad for t in inputs)]


def plainly(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The definition, an operation at a time."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scale
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
    return (p @ value.repeat_interleave(group, dim=1)).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(2, 140),
    width=st.sampled_from([32, 64, 96, 128]),
    seed=st.integers(0, 1000),
)
@example(batch=1, key_heads=1, group=1, length=32, width=32, seed=0)
@example(batch=1, key_heads=1, group=1, length=33, width=32, seed=0)
@example(batch=1, key_heads=1, group=3, length=unit.LONGEST, width=64, seed=0)
@settings(max_examples=40, deadline=None)
def test_it_is_nearer_to_float64_than_plain_products(batch, key_heads, group, length, width, seed):
    tensors = draw(batch, key_heads * group, key_heads, length, width, seed=seed)
    exact = learned(plainly, [t.double() for t in tensors])
    ours, plain = learned(unit.attend, tensors), learned(plainly, tensors)
    for found, theirs, true in zip(ours, plain, exact, strict=True):
        assert found.dtype == torch.bfloat16
        error, limit = ((t.double() - true).norm() for t in (found, theirs))
        assert error <= 1.05 * limit + 1e-3
        assert error <= 0.01 * true.norm() or length < 8


def test_the_order_of_the_axes_in_memory_does_not_matter():
    """Heads beside each other in a row, as one product of all of them leaves them, and heads one after the other."""
    query, key, value, grad = draw(2, 4, 2, 37, 64)
    expected = learned(unit.attend, [query, key, value, grad])
    beside = torch.cat([t.transpose(1, 2) for t in (query, key, value)], dim=2)
    parts = [t.transpose(1, 2) for t in beside.split([4, 2, 2], dim=2)]
    inputs = [t.detach().requires_grad_() for t in parts]
    assert unit.usable(*inputs)
    mixed = unit.attend(*inputs, 64**-0.5)
    mixed.backward(grad.transpose(1, 2).contiguous().transpose(1, 2))
    for found, true in zip([mixed, *(t.grad for t in inputs)], expected, strict=True):
        assert torch.equal(found, true)


@pytest.mark.parametrize("length", [31, 32, 70])
def test_nothing_of_what_comes_later_is_seen(length):
    """To the bit: with other tokens after it, a token's values stay, and so do its gradients if those get none."""
    tensors, others = draw(1, 3, 1, length, 32), draw(1, 3, 1, length, 32, seed=1)
    until = length // 2
    changed = [t.clone() for t in tensors]
    for t, other in zip(changed[:3], others[:3], strict=True):
        t[:, :, until:] = other[:, :, until:]
    for t in (tensors, changed):
        t[3][:, until:] = 0
    for one, two in zip(learned(unit.attend, tensors), learned(unit.attend, changed), strict=True):
        axis = 1 if one.shape[1] == length else 2
        assert torch.equal(one.narrow(axis, 0, until), two.narrow(axis, 0, until))


def test_what_can_be_known_exactly_is_exact():
    query, key, value, grad = draw(2, 2, 1, 50, 32)
    # A first token attends to itself alone; equal values are their own mean; and a score above all others is certain.
    mixed = unit.attend(query, key, value, 0.5)
    assert torch.equal(mixed[:, 0], value[:, 0, 0][:, None].expand(2, 2, 32))
    same = value[:, :, :1].expand_as(value).contiguous()
    assert torch.allclose(unit.attend(query, key, same, 0.5).float(), same[:, 0, :, None].float(), rtol=2**-7)
    key[:, :, :25], query[:] = 0, 100
    key[:, :, 7] = 100
    certain = unit.attend(query, key.clamp_max_(100), value, 1.0)
    assert torch.equal(certain[:, 7:25], value[:, 0, 7][:, None, None].expand(2, 18, 2, 32))
    assert all(torch.isfinite(t.float()).all() for t in learned(unit.attend, [query, key, value, grad]))


def test_threads_do_not_change_a_bit():
    tensors, before, found = draw(3, 4, 2, 65, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(learned(unit.attend, tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_it_cannot_do_goes_another_way():
    query, key, value, _ = draw(1, 2, 1, 20, 64)
    assert unit.usable(query, key, value)
    for others in (
        (query.float(), key.float(), value.float()),
        (query[..., :40], key[..., :40], value[..., :40]),
        (query, key, value[..., :32]),
        (query[:, :, -1:], key, value),
        (query[:, :, -5:], key, value),
        (query.transpose(2, 3), key.transpose(2, 3), value.transpose(2, 3)),
        tuple(t.repeat(1, 1, 52, 1) for t in (query, key, value)),
    ):
        assert not unit.usable(*others)
    with amx.for_training(0):
        assert not unit.usable(query, key, value)


def test_a_models_attention_uses_it_where_there_is_no_mask(monkeypatch):
    query, key, value, _ = draw(2, 4, 2, 20, 32)
    module, asked = torch.nn.Module(), []
    module.num_key_value_groups = 2
    attend = unit.attend
    monkeypatch.setattr(unit, "attend", lambda *args: asked.append(1) or attend(*args))
    mixed, _ = grouped_attention(module, query, key, value, None, scaling=0.2)
    assert asked
    torch.testing.assert_close(
        mixed.float(), plainly(query.float(), key.float(), value.float(), 0.2), atol=2e-2, rtol=0
    )
    mask = torch.zeros(1, 1, 20, 20)  # everything is seen
    seen, _ = grouped_attention(module, query, key, value, mask, scaling=0.2)
    assert len(asked) == 1
    assert not torch.allclose(seen, mixed, atol=0.1)
    grouped_attention(module, query, key, value, None, scaling=0.2, is_causal=False)
    grouped_attention(module, query, key, value, None, scaling=0.2, dropout=0.1)
    assert len(asked) == 1
