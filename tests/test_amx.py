"""The matrix unit's product for weights' gradients: exact where numbers allow it, and float32 all the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck import doctor, models
from limbeck.models import amx
from limbeck.models.amx.linear import float32_gradients
from limbeck.models.cache import cache_root
from limbeck.models.compiling import SWITCH
from limbeck.signal.types import TextSignal
from limbeck.train.fused import fused_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled once for this file, whatever the other tests are told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        amx._library.cache_clear()
        with amx.for_training(0):
            yield
    amx._library.cache_clear()


@pytest.fixture
def unit() -> None:
    if why := amx.lacking():
        pytest.skip(why)
    assert amx.usable(CPU), "the unit and a compiler are here"


def whole_numbers(rows: int, columns: int, seed: int) -> Tensor:
    """Numbers from -8 to 8 in bfloat16. A sum of 2,000 products of them is below 2^24: float32 holds it exactly, in
    whatever order it is added up.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, columns), generator=generator).to(torch.bfloat16)


@pytest.mark.usefixtures("unit")
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 1200),
    o=st.integers(1, 150),
    i=st.integers(1, 900),
    wide=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
    turned=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_product_of_whole_numbers_is_exact_and_touches_nothing_else(
    n: int, o: int, i: int, wide: tuple[int, int, int], turned: bool, add: bool, seed: int
) -> None:
    # Every operand is part of a wider matrix, or a transposed one.
    dy = whole_numbers(n, o + wide[0], seed)[:, wide[0] :]
    x = whole_numbers(i, n, seed + 1).t() if turned else whole_numbers(n, i + wide[1], seed + 1)[:, :i]
    around = torch.full((o + 2, i + wide[2]), 7.0)
    out = around[1:-1, :i]
    expected = dy.long().t() @ x.long() + (7 if add else 0)
    assert amx.weight_gradient(dy, x, out, add=add) is out
    assert torch.equal(out.long(), expected)
    assert (around[[0, -1]] == 7).all()
    assert (around[:, i:] == 7).all()


@pytest.mark.usefixtures("unit")
def test_many_columns_and_a_long_sum_are_exact() -> None:
    # More columns than are taken at a time, and a vocabulary's worth of rows.
    for n, o, i in ((1888, 288, 1600), (700, 3000, 70)):
        dy, x = whole_numbers(n, o, 1), whole_numbers(n, i, 2)
        assert torch.equal(amx.weight_gradient(dy, x).long(), dy.long().t() @ x.long())


@pytest.mark.usefixtures("unit")
def test_a_sum_of_any_numbers_is_as_exact_as_float32_lets_it_be() -> None:
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(1000, width, generator=generator).bfloat16() for width in (96, 160))
    exact = dy.double().t() @ x.double()
    error = (amx.weight_gradient(dy, x).double() - exact).abs()
    # Higham, Accuracy and Stability of Numerical Algorithms, 3.5: n u / (1 - n u) times the product of magnitudes.
    n_u = 1000 * 2.0**-24
    assert (error <= n_u / (1 - n_u) * (dy.double().abs().t() @ x.double().abs())).all()
    # torch's product of the same is rounded to bfloat16.
    assert float(error.mean()) < float(((dy.t() @ x).double() - exact).abs().mean()) / 100


@pytest.mark.usefixtures("unit")
def test_no_bit_depends_on_the_number_of_threads() -> None:
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    dy, x = (torch.randn(700, width, generator=generator).bfloat16() for width in (200, 90))
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(amx.weight_gradient(dy, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("unit")
def test_no_rows_are_a_sum_of_nothing() -> None:
    none = torch.zeros(0, 70).bfloat16()
    assert (amx.weight_gradient(none, none) == 0).all()
    assert (amx.weight_gradient(none, none, torch.ones(70, 70), add=True) == 1).all()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_autocast_computes_with_a_gradient_that_is_not_rounded(bias: bool) -> None:
    torch.manual_seed(0)
    module, x_BTI = nn.Sequential(nn.Linear(96, 160, bias=bias)), torch.randn(3, 50, 96, requires_grad=True)
    aside_BTO = torch.randn(3, 50, 160)

    def step() -> list[Tensor]:
        x_BTI.grad = None
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y_BTO = module(x_BTI)
        (y_BTO.float() * aside_BTO).sum().backward()
        grads = [t.grad for t in (x_BTI, *module.parameters())]
        assert all(g is not None for g in grads)
        return [y_BTO.detach(), *(g.clone() for g in grads if g is not None)]

    plain = step()
    module.device = CPU  # type: ignore[assignment]  # as a model of transformers has one
    with float32_gradients(module):  # type: ignore[arg-type]
        assert "forward" in vars(module[0])
        ours = step()
        with torch.no_grad():
            assert module(x_BTI).dtype == torch.float32, "without autocast the layer is as it was"
    assert "forward" not in vars(module[0])
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    exact = aside_BTO.bfloat16().double().flatten(0, 1).t() @ x_BTI.detach().bfloat16().double().flatten(0, 1)
    assert float((ours[2] - exact).abs().mean()) < float((plain[2] - exact).abs().mean()) / 100
    for one, other in zip(ours[2:], plain[2:], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-3)


@pytest.mark.usefixtures("unit")
def test_a_layer_that_does_not_learn_or_is_small_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 8), nn.Linear(96, 96, dtype=torch.bfloat16))
    module[0].requires_grad_(False)
    module.device = CPU  # type: ignore[assignment]
    with float32_gradients(module):  # type: ignore[arg-type]
        assert not any("forward" in vars(layer) for layer in module)


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize("chunk", [None, 100])
def test_the_heads_gradient_is_that_of_torchs_product(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    torch.manual_seed(0)
    hidden_ND, head_VD = torch.randn(300, 64).bfloat16(), torch.randn(500, 64, requires_grad=True)
    signal = TextSignal(torch.randint(0, 500, (300,)), 500)
    found = []
    for wanted in (True, False):
        monkeypatch.setattr(amx, "_wanted", wanted)
        head_VD.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            fused_loss(hidden_ND, head_VD, signal, loss="cross_entropy", chunk=chunk).backward()
        assert head_VD.grad is not None
        found.append(head_VD.grad.clone())
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[1], rtol=2**-6, atol=2**-6)


def test_only_a_training_that_is_long_enough_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "")
    with amx.for_training(amx.WORTH - 1):
        assert not amx.usable(CPU)
    with amx.for_training(amx.WORTH):
        assert amx._wanted
        assert not amx.usable(torch.device("cuda"))
    assert amx._wanted, "as it was before"


def test_switched_off_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert amx.lacking()
    amx._library.cache_clear()
    assert not amx.usable(CPU)
    amx._library.cache_clear()


@pytest.mark.usefixtures("unit")
@pytest.mark.parametrize(
    ("does", "told"),
    [("exit 1", "no such header"), ("exec sleep 60", "timed out after"), ("exec cat /dev/null", "kernels.so")],
    ids=["fails", "hangs", "writes nothing"],
)
def test_a_compiler_that_does_not_compile_costs_one_warning(
    monkeypatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, does: str, told: str
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(f"#!/bin/sh\necho no such header >&2\n{does}\n", encoding="ascii")
    os.chmod(broken, 0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(amx, "_PATIENCE", 0.5)
    warned_once(caplog, told)
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.usefixtures("unit")
def test_a_cache_that_cannot_be_written_costs_one_warning(monkeypatch, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "file" / "cache"))
    warned_once(caplog, "the model cache cannot be written")


def warned_once(caplog: pytest.LogCaptureFixture, told: str) -> None:
    amx._library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not amx.usable(CPU)
            assert not amx.usable(CPU)
    finally:
        amx._library.cache_clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the matrix unit is done without ({SWITCH}=0 does not try): ")
    assert told in said


@pytest.mark.usefixtures("unit")
def test_it_is_compiled_once_and_kept() -> None:
    kept = sorted((cache_root() / "kernels").glob("*/kernels.so"))
    assert len(kept) == 1
    before = kept[0].stat()
    amx._library.cache_clear()
    assert amx.usable(CPU)
    assert kept[0].stat().st_mtime_ns == before.st_mtime_ns


def test_the_doctor_says_by_what_weights_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    if models.processor().device != "cpu":
        pytest.skip("a GPU trains here")

    def said() -> str:
        return {finding.name: finding.value for finding in doctor.examine()}["attention, weights' gradients"]

    monkeypatch.setattr(amx, "instructions", lambda: set(amx._NEEDED))
    assert said().startswith("by the matrix unit (AMX)") or "compiler" in said()
    monkeypatch.setattr(amx, "instructions", set)
    assert said() == "torch's own products: no matrix unit (AMX)"
