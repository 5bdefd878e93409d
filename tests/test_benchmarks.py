"""The signal benchmark: peers' formats are what their descriptions say, and its figures are what closed forms say."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_annotate import recipe_for, run_with

from limbeck.signal.annotate import annotate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of benchmarks/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import signals
    import stored_forms

    return signals, stored_forms


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_distribution(vocab: int = 60, sharpness: float = 2.0) -> torch.Tensor:
    return torch.softmax(sharpness * torch.randn(1, vocab, generator=stream(3)), dim=1)


def mean_and_error(form, p_1V: torch.Tensor, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    entries = form.draw(p_1V.expand(draws, -1), stream()).entries
    dense_NV = torch.zeros(draws, p_1V.shape[1], dtype=torch.float64)
    dense_NV[entries.positions(), entries.ids_E.long()] = entries.weights_E.double()
    return dense_NV.mean(0), dense_NV.std(0) / math.sqrt(draws)


def test_unbiased_forms_have_the_teachers_distribution_as_their_mean(benchmarks):
    _, forms = benchmarks
    p_1V, draws = one_distribution(), 8000
    for form in (forms.threshold(0.03), forms.random_sampling(20), forms.random_sampling(20, power=0.8)):
        mean_V, error_V = mean_and_error(form, p_1V, draws)
        assert ((mean_V - p_1V[0]).abs() <= 5 * error_V + 3 * 0.05 / draws).all(), form.name


def test_variances_are_those_of_the_closed_forms(benchmarks):
    """Threshold sampling: the sum of p(tau - p) over the tail. R draws with replacement: (1 - sum p^2) / R."""
    signals, forms = benchmarks
    p_NV = one_distribution(200, 1.5).expand(1500, -1).contiguous()
    p_V, tau, draws = p_NV[0].double(), 0.03, 25
    tail_V = p_V[p_V < tau]
    expected = {
        forms.threshold(tau): float((tail_V * (tau - tail_V)).sum()),
        forms.random_sampling(draws): float((1 - p_V.square().sum()) / draws),
    }
    for form, variance in expected.items():
        found = signals.fidelity(form, p_NV, 2, stream())
        n = found.positions
        assert n == 1500
        # The rounding of head probabilities adds a little to the first.
        assert found.variance / n == pytest.approx(variance, rel=0.1)
        assert found.error == pytest.approx(found.bias + found.variance)
        assert abs(found.bias / n) < 0.1 * variance
    top = signals.fidelity(forms.top_k(200), p_NV, 2, stream())
    assert (top.entries / 1500, top.variance) == (200, 0)
    assert top.error / 1500 < 1e-12


def test_a_form_that_loses_the_tail_is_all_bias(benchmarks):
    signals, forms = benchmarks
    p_NV = torch.tensor([[0.5, 0.3, 0.2]])
    found = signals.fidelity(forms.top_k(2), p_NV, 4, stream())
    closed = (0.625 - 0.5) ** 2 + (0.375 - 0.3) ** 2 + 0.2**2
    assert (found.error, found.bias, found.variance) == pytest.approx((closed, closed, 0))


def test_the_draws_that_match_a_number_of_entries_give_it(benchmarks):
    _, forms = benchmarks
    chunks = [one_distribution(300, s).expand(2000, -1) for s in (0.5, 2.0)]
    draws = forms.draws_for(12.0, chunks)
    form = forms.random_sampling(draws)
    unique = sum(len(form.draw(p, stream()).entries.ids_E) for p in chunks) / 4000
    assert unique == pytest.approx(12.0, abs=0.5)
    assert form.draw(chunks[0], stream()).nbytes == 3 * len(form.draw(chunks[0], stream()).entries.ids_E)


@pytest.mark.parametrize(
    ("k", "exact", "powers", "nbytes"), [(50, 1, (0, 1, 0.5), 114), (128, 16, (0, 1, 2, 3, 4, 0.5), 312)]
)
def test_distillkits_formats_take_the_bytes_its_readme_says_and_fit_what_its_terms_can(
    benchmarks, k, exact, powers, nbytes
):
    """Log-probabilities that are such a curve of the rank come back, but for the rounding of bfloat16."""
    _, forms = benchmarks
    fitted_T = -4.5 - 0.4 * torch.arange(k - exact, dtype=torch.float64).sqrt()
    curve_K = torch.cat([torch.linspace(-3, -4, exact, dtype=torch.float64), fitted_T])
    mass = float(curve_K.exp().sum())
    vocab = 40_000
    rest = torch.full((vocab - k,), (1 - mass) / (vocab - k), dtype=torch.float64)
    p_1V = torch.cat([curve_K.exp(), rest]).float()[None]
    assert mass < 0.99
    drawn = forms.distillkit(k, exact, powers, vocab).draw(p_1V, stream())
    assert drawn.nbytes == nbytes
    assert sorted(drawn.entries.ids_E.tolist()) == list(range(k))
    dense_V = torch.zeros(vocab).index_put((drawn.entries.ids_E.long(),), drawn.entries.weights_E)
    torch.testing.assert_close(dense_V[:k], (curve_K.exp() / mass).float(), rtol=0.012, atol=0)


def test_the_benchmark_runs_from_a_finished_run(benchmarks, tmp_path, monkeypatch, capsys):
    """A student of each form, and one table: on a teacher of a few thousand parameters."""
    signals, _ = benchmarks
    teacher = tiny.save(tmp_path / "teacher", seed=1)
    recipe = recipe_for(teacher, train={"batch_size": 2, "precision": "float32"}, evaluate={"held_out": 1})
    run = run_with(tmp_path / "run", recipe, [30, 24, 27, 40])
    annotate(recipe, run)
    shutil.copytree(tiny.save(tmp_path / "student", seed=2), run / "beginning")
    (run / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    told = tmp_path / "figures.json"
    arguments = [
        str(run.root),
        "--positions",
        "30",
        "--draws",
        "2",
        "--steps",
        "2",
        "--tau",
        "0.02",
        "--json",
        str(told),
    ]
    arguments += ["--only", "tau", "k 50", "top 12", "--train", "tau", "k 50"]
    monkeypatch.setattr(sys, "argv", ["signals.py", *arguments])
    signals.main()
    out = capsys.readouterr().out
    figures = json.loads(told.read_text())
    assert {*figures["fidelity"]} - {"top 12, renormalised"} | {"untrained", "text", "exact"} == {*figures["students"]}
    assert all(f"| {name} |" in out for name in figures["students"] | figures["fidelity"])
    assert all(
        r["kl"][0] < figures["students"]["untrained"]["kl"][0]
        for n, r in figures["students"].items()
        if n != "untrained"
    )
    assert "of the squared error of random sampling" in out
