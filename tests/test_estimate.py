"""Estimates: bounds that hold, intervals that cover, and a pilot that is paid for once."""

from __future__ import annotations

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from asking import ask, file_of, made
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.collect.prompts import gather
from limbeck.errors import InputError, ModelError, RefusedError
from limbeck.estimate import Estimate, as_text, estimate
from limbeck.rundir import RunDir
from limbeck.testing import Model, Server, Settings

PRICED = {"price": {"input": 1.0, "output": 3.0}}
SERVED = Settings(words=40, spread=0.8, delay=0.01, models={"toy": Model(input=Decimal(1), output=Decimal(3))})


def figures(found: Estimate) -> dict[str, tuple[float | None, ...]]:
    return {f.name: (f.value, f.low, f.high, f.at_most) for f in found.figures}


def test_without_a_pilot_nothing_is_sent_and_the_bounds_hold(tmp_path: Path):
    with Server(SERVED) as server:
        recipe = made(server.url, file_of(tmp_path, 50), teacher=PRICED, samples=2)
        found = estimate(recipe)
        assert server.bill.received == 0
        assert (found.prompts, found.requests, found.journaled, found.pilot) == (50, 100, 0, 0)
        assert found.prices == {"toy": "recipe"}
        ask(recipe, tmp_path / "run")
        told = figures(found)
        assert told["money"][:3] == (None, None, None)
        for name, billed in (("money", float(server.bill.money)), ("prompt tokens", server.bill.prompt_tokens),
                             ("answer tokens", server.bill.completion_tokens)):  # fmt: skip
            assert billed <= told[name][3]  # type: ignore[operator]
        again = estimate(recipe, journal=tmp_path / "run" / "journal.db")
        assert again.journaled == 100


def test_a_pilot_is_paid_for_once_and_its_interval_covers_the_bill(tmp_path: Path):
    with Server(SERVED) as server:
        recipe = made(server.url, file_of(tmp_path, 120), teacher=PRICED)
        found = estimate(recipe, pilot=30, journal=tmp_path / "run" / "journal.db")
        assert server.bill.requests == 30
        assert found.journaled == 30
        assert estimate(recipe, pilot=30, journal=tmp_path / "run" / "journal.db").figures == found.figures
        assert server.bill.requests == 30
        facts, _ = ask(recipe, tmp_path / "run")
        assert server.bill.requests == 120
        assert facts["generated"] == 90
        assert facts["money"]["spent_dollars"] == pytest.approx(float(server.bill.money), abs=1e-12)
        told = figures(found)
        for name, billed in (("money", float(server.bill.money)), ("prompt tokens", server.bill.prompt_tokens),
                             ("answer tokens", server.bill.completion_tokens)):  # fmt: skip
            value, low, high, at_most = told[name]
            assert value is not None and low is not None and high is not None and at_most is not None  # noqa: PT018
            assert low <= billed <= high <= at_most
            assert low < value < high
        assert 120 * 0.01 / 16 < told["time"][0] < 30  # type: ignore[operator]
        assert told["journal"][0] > 120 * 100  # type: ignore[operator]


@pytest.mark.parametrize("asks", ["recipe", "row"])
def test_a_pilot_buys_no_answers_with_tools_that_no_template_says(tmp_path: Path, asks: str):
    """What is asked for in a row counts also where the pilot would not draw it. Without a pilot nothing is bought."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    source, student = file_of(tmp_path, 8), str(tiny.save(tmp_path / "student", layers=1))
    if asks == "row":
        with open(source["path"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"prompt": "And the weather?", "tools": [tool]}) + "\n")
    with Server(SERVED) as server:
        more: dict[str, Any] = {"tools": [tool]} if asks == "recipe" else {}
        recipe = made(server.url, source, teacher=PRICED, **more)
        recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": student})})
        with pytest.raises(ModelError, match="paid for and then dropped"):
            estimate(recipe, pilot=2, journal=tmp_path / "run" / "journal.db")
        assert estimate(recipe).requests == (8 if asks == "recipe" else 9)
        assert server.bill.received == 0
    assert not (tmp_path / "run").exists()


def test_the_interval_covers_as_often_as_it_says(tmp_path: Path):
    """Pilots on many prompt sets; the bill is what the server would charge for all of them."""
    covered = 0
    with Server(SERVED.model_copy(update={"delay": 0.0})) as server:
        for number in range(20):
            (tmp_path / str(number)).mkdir()
            recipe = made(server.url, file_of(tmp_path / str(number), 60), teacher=PRICED)
            recipe = recipe.model_copy(update={"seed": number})
            before = server.bill.money
            found = estimate(recipe, pilot=20, journal=tmp_path / str(number) / "journal.db")
            shared = recipe.collect.model_copy(update={"journal": str(tmp_path / str(number) / "journal.db")})
            ask(recipe.model_copy(update={"collect": shared}), tmp_path / str(number) / "run")
            _, low, high, _ = figures(found)["money"]
            covered += low <= float(server.bill.money - before) <= high  # type: ignore[operator]
    assert covered >= 16  # 95 % of 20 is 19; fewer than 16 has probability 0.0003


def test_batches_cost_half_and_the_pilot_does_not_wait_for_one(tmp_path: Path):
    with Server(SERVED) as server:
        alone = made(server.url, file_of(tmp_path, 60), teacher=PRICED)
        batched = alone.model_copy(update={"collect": alone.collect.model_copy(update={"batch": True})})
        whole, half = figures(estimate(alone)), figures(estimate(batched))
        assert half["money"][3] == pytest.approx(whole["money"][3] / 2)  # type: ignore[operator]
        assert half["prompt tokens"] == whole["prompt tokens"]
        found = estimate(batched, pilot=20, journal=tmp_path / "j.db")
        assert all(charge.batch is None for charge in server.bill.charges)
        assert (server.bill.requests, found.batches) == (20, True)
        full = estimate(alone, pilot=20, journal=tmp_path / "j.db")
        assert server.bill.requests == 20
        for mine, other in zip(figures(found)["money"], figures(full)["money"], strict=True):
            assert mine is not None
            assert other is not None
            assert mine == pytest.approx(other / 2, rel=1e-6)
        assert "time" not in figures(found)
        assert "24 hours" in as_text(found)
        assert "24 hours" not in as_text(full)


def test_a_pilot_that_cannot_be_is_refused(tmp_path: Path):
    recipe = made("http://127.0.0.1:9", file_of(tmp_path, 10), teacher=PRICED)
    with pytest.raises(InputError) as error:
        estimate(recipe, pilot=30)
    assert len(error.value.problems) == 2
    assert all(p.remedy for p in error.value.problems)


def local(source: dict) -> dict:
    """A recipe whose teacher runs here."""
    return {
        "name": "here", "teacher": {"kind": "local", "model": "./nowhere", "terms": "own-model"}, "prompts": [source],
        "student": {"kind": "pretrained", "model": "./nowhere"},
    }  # fmt: skip


def test_teachers_that_run_here_cost_nothing_and_need_no_extra(tmp_path: Path):
    """Without the packages of the extra `collect`, and without weights."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(local(file_of(tmp_path, 7)) | {"collect": {"samples": 3}}))
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('orjson', 'aiohttp', 'genai_prices'))); "
        "from limbeck.cli import app; app()"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, "estimate", str(path)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert "7 prompts" in told.stdout
    assert "21 answers" in told.stdout
    assert "at most 0" not in told.stdout
    path.write_text(yaml.safe_dump(made("http://127.0.0.1:9", file_of(tmp_path, 7)).model_dump(mode="json")))
    told = subprocess.run(
        [sys.executable, "-c", program, "estimate", str(path)], capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "[collect]" in told.stderr


def test_prompts_that_are_yet_to_be_written_are_counted_and_not_bounded(tmp_path: Path):
    written = {"kind": "evolve", "count": 9, "seeds": {"kind": "file", "path": file_of(tmp_path, 5)["path"]}}
    recipe = made("http://127.0.0.1:9", written, teacher=PRICED, samples=2)
    found = estimate(recipe)
    assert (found.prompts, found.written, found.requests) == (9, 9, 18)
    assert all(figure.at_most is None for figure in found.figures if not figure.name.startswith("evolve: "))
    capped = made("http://127.0.0.1:9", written, teacher=PRICED, budget={"money": 2.5})
    assert figures(estimate(capped))["money"][3] == 2.5


def test_a_pilot_of_teachers_that_run_here_is_refused_in_one_sentence(tmp_path: Path):
    from limbeck.recipe import Recipe

    with pytest.raises(InputError) as error:
        estimate(Recipe.model_validate(local({"kind": "self-prompt", "count": 20})), pilot=2)
    assert len(error.value.problems) == 1


def test_the_command(tmp_path: Path):
    with Server(SERVED) as server:
        recipe = made(server.url, file_of(tmp_path, 20), teacher=PRICED)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        arguments = ["estimate", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
        plain = CliRunner().invoke(app, arguments)
        assert plain.exit_code == 0, plain.output
        assert "at most" in plain.output
        result = CliRunner().invoke(app, [*arguments, "--pilot", "8", "--json"])
        assert result.exit_code == 0, result.output
        assert {f["name"] for f in json.loads(result.stdout)["figures"]} == {
            "prompt tokens", "answer tokens", "money", "time", "journal",
        }  # fmt: skip
        assert server.bill.requests == 8


def written(tmp_path: Path, kind: str, count: int, **more) -> dict:
    """A source that the teacher writes, from twenty rows."""
    rows = file_of(tmp_path, 20)
    key = "documents" if kind == "documents" else "seeds"
    return {"kind": kind, "count": count, "max_tokens": 90, key: rows} | more


@pytest.mark.parametrize(
    ("kind", "more"), [("documents", {}), ("evolve", {"rounds": 1}), ("multi-turn", {"turns": 2, "max_tokens": 90})]
)
def test_what_writing_prompts_takes_is_projected_from_its_first_requests(tmp_path: Path, kind: str, more: dict):
    """Half of the answers run into `max_tokens`, or nearly: those are dropped, and paid for all the same."""
    served = SERVED.model_copy(update={"words": 70, "spread": 0.8, "delay": 0.0, "idempotency": False})
    with Server(served) as server:
        recipe = made(server.url, written(tmp_path, kind, 150, **more), teacher=PRICED)
        bounds = figures(estimate(recipe))
        assert server.bill.received == 0
        path = tmp_path / "run" / "journal.db"
        path.parent.mkdir()
        found = estimate(recipe, pilot=60, journal=path)
        piloted = server.bill.requests
        told = figures(found)
        assert f"{kind}: requests" in as_text(found)
        assert "projected from nothing" not in as_text(found)
        facts: dict[str, Any] = gather(recipe, RunDir(tmp_path / "run"))
        (part,) = facts["sources"]
        assert server.bill.requests == part["requests"] > piloted  # the pilot's were not asked again
        assert len({charge.digest for charge in server.bill.charges}) == server.bill.requests
        billed = {
            "requests": server.bill.requests,
            "prompt tokens": server.bill.prompt_tokens,
            "answer tokens": server.bill.completion_tokens,
            "money": float(server.bill.money),
        }
    assert part["candidates"] > 1.3 * 150
    for name, true in billed.items():
        value, low, high, at_most = told[f"{kind}: {name}"]
        assert low < value < high  # type: ignore[operator]
        # The run writes whole waves, and so up to one more than it looks at.
        assert 0.8 * low < true < 1.5 * high  # type: ignore[operator]
        assert (at_most is None and kind == "multi-turn") or true <= at_most  # type: ignore[operator]
        assert bounds[f"{kind}: {name}"] == (None, None, None, at_most)


def test_a_cap_bounds_what_writing_can_cost_and_a_pilot_stops_at_it(tmp_path: Path):
    with Server(SERVED) as server:
        recipe = made(server.url, written(tmp_path, "evolve", 50), teacher=PRICED, budget={"money": 0.004})
        assert figures(estimate(recipe))["evolve: money"] == (None, None, None, 0.004)
        with pytest.raises(RefusedError, match="the money cap is reached"):
            estimate(recipe, pilot=40, journal=tmp_path / "journal.db")
        assert 0 < float(server.bill.money) <= 0.004
