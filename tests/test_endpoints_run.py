"""A whole run with a teacher that is only an endpoint: text to a student, nothing of the teacher's weights."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from asking import file_of
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.errors import InputError
from limbeck.ledger import verify
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe
from limbeck.testing import Faults, Model, Refusal4xx, Server, Settings

KEY = "sk-limbeck-0123456789-secret"


def values(url: str, tmp_path: Path, student: Path) -> dict[str, Any]:
    return {
        "name": "api",
        "teacher": {"kind": "openai", "base_url": f"{url}/v1", "model": "toy", "terms": "own-model",
                    "api_key_env": "TEACHER_KEY", "price": {"input": 1.0, "output": 2.0}},
        "prompts": [file_of(tmp_path, 30)],
        "collect": {"max_tokens": 40, "temperature": 0.8, "concurrency": 8, "budget": {"money": 1.0}},
        "curate": {"loops": False, "cut_off": "keep"},
        "student": {"kind": "pretrained", "model": str(student)},
        "signal": {"kind": "text"},
        "train": {"loss": "cross_entropy", "epochs": 2, "learning_rate": 0.003, "precision": "float32"},
        "evaluate": {"held_out": 6, "answers": 2, "answer_tokens": 8},
    }  # fmt: skip


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "student", layers=2)


def test_text_of_an_endpoint_trains_a_student_and_the_key_is_nowhere(
    tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    settings = Settings(
        words=8, models={"toy": Model(input=Decimal(1), output=Decimal(2), reasoning=3)}, api_keys=(KEY,)
    )
    with Server(settings) as server:
        made = values(server.url, tmp_path, student)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
        arguments = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--json"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert server.bill.requests == 30
        offline = CliRunner().invoke(app, ["collect", *arguments[1:], "--offline"])
        assert offline.exit_code == 0, offline.output
        assert server.bill.received == 30
    run = tmp_path / "run"
    scores = {(s["name"], s["subject"]): s for s in json.loads((run / "scores.json").read_text())}
    before, after = (scores["perplexity_on_teacher", subject]["value"] for subject in ("before", "student"))
    assert after < before
    for name, subject in [
        ("agreement_top1", "student"),
        ("kl_forward", "before"),
        ("perplexity_on_teacher", "teacher"),
    ]:
        assert scores[name, subject]["value"] is None
        assert "weights are not here" in scores[name, subject]["unscored"]
    assert verify(run).ok, verify(run).differences
    report = (run / "report.html").read_text()
    assert "weights are not here" in report
    spent = f"{float(server.bill.money):.4f}"
    assert spent in report
    printed = result.output + result.stderr + offline.output + caplog.text
    assert KEY not in printed
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_wrong_key_is_in_no_message_and_no_file(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)

    def repeating(self, http) -> None:
        from limbeck.testing.errors import Refused

        kind = "unauthorized" if "sk-l" in http.headers.get("authorization", "") else "invalid"
        raise Refused(kind, f"Incorrect API key provided: {http.headers.get('authorization')}")

    monkeypatch.setattr("limbeck.testing.service.Service.check_key", repeating)
    with Server(Settings(words=8)) as server:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values(server.url, tmp_path, student)))
        arguments = ["collect", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Bearer [key]" in result.stderr
    assert KEY not in result.output + result.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_exit_codes(tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with Server(Settings(words=8), Faults(faults=(Refusal4xx(kind="quota", requests=(20, 99)),))) as server:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values(server.url, tmp_path, student)))
        arguments = ["collect", str(tmp_path / "recipe.yaml"), "--out"]
        capped = CliRunner().invoke(app, [*arguments, str(tmp_path / "a"), "--set", "collect.budget.money=0.0012"])
        assert (capped.exit_code, "the money cap is reached" in capped.stderr) == (1, True), capped.stderr
        empty = CliRunner().invoke(app, [*arguments, str(tmp_path / "b")])
        assert (empty.exit_code, "quota" in empty.stderr) == (2, True)
        monkeypatch.delenv("TEACHER_KEY")
        no_key = CliRunner().invoke(app, [*arguments, str(tmp_path / "c")])
        assert (no_key.exit_code, "TEACHER_KEY" in no_key.stderr) == (2, True)


# What a recipe cannot ask of a teacher without weights


def test_what_needs_weights_is_refused_with_the_remedy(tmp_path: Path, student: Path):
    from limbeck.errors import RecipeError

    made = values("http://127.0.0.1:9", tmp_path, student)
    made |= {"student": {"kind": "pruned", "layers": 2}, "signal": {"kind": "sampled"}, "train": {"loss": "forward_kl"}}
    made["prompts"] = [{"kind": "self-prompt", "count": 30}]
    made["teacher"]["api_key_file"] = "key"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert {p.where.split(": ")[-1] for p in error.value.problems} == {"teacher", "signal", "student", "prompts"}
    assert all(p.remedy for p in error.value.problems)


def test_a_cap_needs_prices_and_a_student_a_template(tmp_path: Path):
    base = tiny.save(tmp_path / "base", layers=1, template=None)
    made = values("http://127.0.0.1:9", tmp_path, base)
    del made["teacher"]["price"]
    with pytest.raises(InputError) as error:
        preflight(Recipe.model_validate(made))
    assert [p.where for p in error.value.problems] == ["teacher.price"]
    made["collect"]["budget"] = {}
    with pytest.raises(InputError, match="chat template"):
        preflight(Recipe.model_validate(made))
    made["teacher"] |= {"base_url": "https://api.openai.com/v1", "model": "gpt-4o", "terms": "openai/api/2026-01-01"}
    made["use"] = {"distribution": "internal", "purpose": "classifier"}
    made["collect"]["budget"] = {"money": 1.0}
    made["student"]["model"] = str(tiny.save(tmp_path / "student", layers=1))
    preflight(Recipe.model_validate(made))


def test_a_local_teacher_and_an_endpoint_teach_together(
    tmp_path: Path, student: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with Server(Settings(words=8)) as server:
        made = values(server.url, tmp_path, student)
        made["teacher"] = [{"model": str(teacher_dir), "terms": "own-model", "precision": "float32"}, made["teacher"]]
        result = limbeck.run(Recipe.model_validate(made), tmp_path / "run")
    assert verify(tmp_path / "run").ok
    assert any(s.unscored and "toy" in s.unscored for s in result.scores)
