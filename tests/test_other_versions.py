"""A RUN that another version of limbeck made, or another recipe: what is refused, and what the remedy may promise."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import runs
from asking import made
from command import call
from pydantic import JsonValue

from limbeck import __version__
from limbeck.collect.teachers import make_teacher
from limbeck.errors import RunDirError
from limbeck.ledger import verify
from limbeck.recipe import Recipe
from limbeck.records import Message, Prompt, Split
from limbeck.rundir import open_run, refuse_unfit


class Older(Recipe):
    """As a version that did not know two of the keys resolved it, wrote it and recorded its digest."""

    def model_dump(self, **options: object) -> dict[str, JsonValue]:
        values = super().model_dump(**options)  # pyright: ignore[reportArgumentType]
        del values["waivers"], values["collect"]["ray"]
        return values


class Newer(Recipe):
    """As a version that knows two more keys did."""

    def model_dump(self, **options: object) -> dict[str, JsonValue]:
        values = super().model_dump(**options)  # pyright: ignore[reportArgumentType]
        return values | {"later": True, "evaluate": values["evaluate"] | {"judges": 3}}


def made_by(version: type[Recipe], root: Path, **options) -> Path:
    values = Recipe.model_dump(runs.RECIPE, mode="json")
    return runs.make_run(root, recipe=version.model_validate(values), **options)


def bytes_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def test_an_older_run_is_verified_and_not_gone_on_with_under_a_recipe_of_another_digest(tmp_path: Path):
    run = made_by(Older, tmp_path / "run", until="annotate")
    before = bytes_of(run)
    assert verify(run).ok
    with pytest.raises(RunDirError, match="another version of limbeck") as refused:
        refuse_unfit(run, runs.RECIPE, lambda *_: "answers: 6")
    with pytest.raises(RunDirError, match="another version of limbeck"), open_run(run, runs.RECIPE):
        pass
    assert [problem.where.rpartition(": ")[2] for problem in refused.value.problems] == ["collect.ray", "waivers"]
    assert all(__version__ in problem.remedy and "journal.db" in problem.remedy for problem in refused.value.problems)
    assert bytes_of(run) == before
    assert call("show", run).exit_code == 0


def test_what_also_differs_in_an_older_run_is_told_apart(tmp_path: Path):
    run = made_by(Older, tmp_path / "run", until="annotate")
    with pytest.raises(RunDirError, match="another recipe") as refused:
        refuse_unfit(run, runs.RECIPE.model_copy(update={"seed": 5}))
    told = {problem.where.rpartition(": ")[2]: problem.remedy for problem in refused.value.problems}
    assert set(told) == {"collect.ray", "seed", "waivers"}
    assert [key for key, remedy in told.items() if "did not know the key" in remedy] == ["collect.ray", "waivers"]


def test_an_older_run_in_which_nothing_was_collected_goes_on(tmp_path: Path):
    run = made_by(Older, tmp_path / "run", until="prompts")
    with open_run(run, runs.RECIPE, collected=lambda *_: "") as held:
        assert held.recipe() == runs.RECIPE
        assert not (run / "ledger.db").exists()


@pytest.mark.parametrize("command", ["show RUN", "terms check RUN", "export RUN --to spdx"])
def test_what_a_newer_version_wrote_is_named_key_by_key_with_that_version(tmp_path: Path, command: str):
    run = made_by(Newer, tmp_path / "run")
    assert verify(run).ok
    result = call(*(str(run) if word == "RUN" else word for word in shlex.split(command)))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    for key in ("later", "evaluate.judges"):
        assert re.search(rf"recipe\.yaml: {re.escape(key)}\n", result.stderr), result.stderr
    assert f"use the limbeck that made this run ({__version__}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("text", ["- 1\n", "just words\n", "a: [\n", "name: \xff\n", ""])
def test_what_is_no_recipe_at_all_is_told_in_one_problem(tmp_path: Path, text: str):
    run = runs.make_run(tmp_path / "run", until="collect")
    (run / "recipe.yaml").write_bytes(text.encode("latin-1"))
    result = call("show", run)
    assert result.exit_code == 2
    assert result.stderr.count("found:") == 1
    assert str(run / "recipe.yaml") in result.stderr


def keys_of(recipe: Recipe) -> set[str]:
    """What the journal knows a request by."""
    asked = (Message(role="user", content="What is 1?"),)
    prompt = Prompt(id=Prompt.id_of(asked), messages=asked, source="p", licence="MIT", split=Split.TRAIN)
    return {make_teacher(one, recipe.collect, recipe.seed).request(prompt, 0).key for one in recipe.teachers}


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 5), ("name", "b"), ("teacher.base_url", "http://b.invalid/v1"), ("teacher.model", "b"),
     ("teacher.omit", ["seed"]), ("teacher.extra", {"reasoning_effort": "low"}), ("teacher.api", "responses"),
     ("teacher.limit_key", "max_completion_tokens"), ("teacher.terms", "unknown"), ("teacher.route", "router"),
     ("teacher.price", {"input": 1, "output": 1}), ("teacher.timeout", 5), ("teacher.attempts", 2),
     ("collect.max_tokens", 9), ("collect.temperature", 0.1), ("collect.top_p", 0.5), ("collect.logprobs", 3),
     ("collect.json_schema", {"type": "object"}), ("collect.concurrency", 3), ("collect.samples", 2),
     ("collect.budget", {"money": 3}), ("train.epochs", 7), ("evaluate.held_out", 1)],
)  # fmt: skip
def test_a_remedy_promises_that_nothing_is_paid_twice_where_the_journal_knows_the_requests(
    tmp_path: Path, key: str, value: JsonValue
):
    first = made("http://a.invalid", {"kind": "file", "path": str(tmp_path / "p.jsonl")})
    values = first.model_dump(mode="json")
    part, _, name = key.rpartition(".")
    (values[part] if part else values)[name] = value
    other = Recipe.model_validate(values)
    with open_run(tmp_path / "run", first):
        (tmp_path / "run" / "completions.parquet").touch()  # something was collected
    with pytest.raises(RunDirError) as refused:
        refuse_unfit(tmp_path / "run", other)
    promised = all("so nothing is paid twice" in problem.remedy for problem in refused.value.problems)
    assert promised == (keys_of(first) == keys_of(other))
