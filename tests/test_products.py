"""Weights joined for one product: copied no oftener than they change, and not at all where they lie together."""

from __future__ import annotations

from itertools import product

import torch

from limbeck.models import products


def test_weights_that_lie_one_after_the_other_are_joined_without_a_copy() -> None:
    whole = torch.randn(7, 3)
    one, two, apart = whole[:3], whole[3:], torch.randn(2, 3)
    found = products.joined((one, two), torch.float32)
    assert found.data_ptr() == whole.data_ptr()
    assert torch.equal(found, whole)
    for parts, dtype in product([(two, one), (one, apart), (one, two, apart), (one,)], [torch.float32, torch.float64]):
        found = products.joined(parts, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, torch.cat(parts).to(dtype))


def test_passes_of_a_step_share_what_is_joined_and_see_what_was_learned_since() -> None:
    one, two = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    with products.joined_once():
        found = products.joined((one, two), torch.bfloat16)
        assert products.joined((one, two), torch.bfloat16) is found
        assert products.joined((two, one), torch.bfloat16) is not found
        with torch.no_grad():
            two.add_(1)
        assert torch.equal(products.joined((one, two), torch.bfloat16), torch.cat([one, two]).bfloat16())
    assert products.joined((one, two), torch.bfloat16) is not products.joined((one, two), torch.bfloat16)
