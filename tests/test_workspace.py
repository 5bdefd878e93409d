"""Buffers that are kept from loss to loss change no value and no gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_fused import PAIRS, assert_same, make_signal, make_student, normal

from limbeck.signal import HiddenSignal, TextSignal
from limbeck.train.fused import fused_loss
from limbeck.train.workspace import buffer, kept_buffers

CPU = torch.device("cpu")


def address(rows: int, name: str = "one", dtype: torch.dtype = torch.float32) -> int:
    return buffer(name, (rows, 4), dtype, CPU).data_ptr()


def test_a_name_is_one_memory_while_it_is_large_enough() -> None:
    with kept_buffers():
        first = address(100)
        assert address(100) == first
        assert address(7) == first
        assert buffer("one", (7, 4), torch.float32, CPU).shape == (7, 4)
        assert address(100, "two") != first
        assert address(100, dtype=torch.float64) != first
        held = buffer("one", (101, 4), torch.float32, CPU)
        assert address(101) == held.data_ptr()
        with kept_buffers():
            assert address(101) != held.data_ptr()
        assert address(101) == held.data_ptr()
    assert address(101) != held.data_ptr()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_each_loss_is_what_it_is_without(name: str, kind: str) -> None:
    with kept_buffers():
        for chunk in (3, None, 2):
            assert_same(make_student(bias=True, scale=0.7), make_signal(kind), name, chunk=chunk)


def losses(kept: bool, *, passes: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Gradients of a head in float32 over three steps, each a sum over passes; the teacher's head is converted too."""
    head = torch.nn.Parameter(normal(40, 6, seed=1).float())
    teacher = normal(40, 5, seed=2).to(torch.float16)
    found = []
    with kept_buffers() if kept else nullcontext():
        for step in range(3):
            head.grad = None
            for n in range(passes):
                seed, rows = 10 * step + n, 9 - step
                hidden = normal(rows, 6, seed=seed).to(dtype)
                signal = HiddenSignal(normal(rows, 5, seed=seed + 1).to(dtype), teacher, 40)
                with torch.autocast("cpu", torch.bfloat16):
                    fused_loss(hidden, head, signal, loss="forward_kl").backward()
            assert head.grad is not None
            found.append(head.grad.clone())
            with torch.no_grad():
                head -= 0.1 * head.grad
    return found


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_learns_the_same_over_steps_and_passes(passes: int, dtype: torch.dtype) -> None:
    for ours, plain in zip(
        losses(True, passes=passes, dtype=dtype), losses(False, passes=passes, dtype=dtype), strict=True
    ):
        assert torch.equal(ours, plain)


def test_the_gradient_of_a_step_lies_where_that_of_the_last_lay() -> None:
    head = torch.nn.Parameter(normal(40, 6, seed=1).float())
    places = set()
    with kept_buffers():
        for step in range(3):
            head.grad = None
            tokens = torch.randint(0, 40, (9,), generator=torch.Generator().manual_seed(step))
            fused_loss(normal(9, 6, seed=step).float(), head, TextSignal(tokens, 40), loss="cross_entropy").backward()
            assert head.grad is not None
            places.add(head.grad.data_ptr())
    assert len(places) == 1
