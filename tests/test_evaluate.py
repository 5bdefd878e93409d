"""Laws of the evaluation: what is measured, with which interval, and what is said when it cannot be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from pydantic import JsonValue
from transformers import AutoModelForCausalLM

from limbeck.collect.split import rank
from limbeck.errors import InputError, StaleError
from limbeck.evaluate.answers import read_answers
from limbeck.evaluate.compare import agreement, shared_width, sum_over_example, supervised
from limbeck.evaluate.evaluate import choose, evaluate
from limbeck.evaluate.scores import read_scores, score_of, write_scores
from limbeck.evaluate.statistics import Interval
from limbeck.ledger.canonical import EMPTY, canonical
from limbeck.recipe import Recipe
from limbeck.records import Completion, Example, Message, Prompt, Score, Split
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.rundir import RunDir
from limbeck.tables import write_records

NAMES = {"agreement_top1", "kl_forward", "perplexity_on_teacher"}
SUBJECTS = ("student", "before", "teacher")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A RUN directory as the training stage leaves it.


def make_example_of(words, question: str, text: str, teacher: str, split: Split) -> tuple[Example, Completion]:
    messages = (Message(role="user", content=question),)
    chat = [m.model_dump() for m in messages]
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    head = words.encode(prompt, add_special_tokens=False)
    tokens = words.encode(f"{prompt}{text}<|im_end|>\n", add_special_tokens=False)
    assert tokens[: len(head)] == head
    mask = np.arange(len(tokens)) >= len(head)
    mask[-1] = False  # the line break after the turn is the template's, not the teacher's
    completion = Completion(
        prompt_id=Prompt.id_of(messages),
        sample=0,
        messages=messages,
        text=text,
        reasoning=None,
        finish_reason="stop",
        model=teacher,
        teacher=teacher,
        provider="self-hosted",
        route="self-hosted",
        weights=None,
        terms="own-model",
        prompt_tokens=len(head),
        completion_tokens=len(tokens) - len(head),
        created=datetime(2026, 11, 1, tzinfo=UTC),
        request_id=EMPTY,
        response=EMPTY,
        split=split,
    )
    example = make_example(
        np.asarray(tokens, np.int32),
        mask,
        prompt_id=completion.prompt_id,
        completion=completion.id,
        teacher=teacher,
        split=split,
    )
    return example, completion


TEXTS = (
    "Paris is the capital.",
    "A duck lays an egg a day, and the fox jumps.",
    "12 + 30 = 42.",
    "The sea.",
    "def add(a, b):\n    return a + b",
    "Sieben Ähren",
    "It depends on the teacher and on the student.",
    "No.",
)


def make_run(root: Path, teachers: list[Path], prompts: int = 8) -> tuple[Recipe, RunDir, list[Example]]:
    words = tiny.tokenizer()
    pairs = [
        make_example_of(words, f"Question {i}?", TEXTS[(i + j) % len(TEXTS)], str(teacher), split)
        for i in range(prompts)
        for j, teacher in enumerate(teachers)
        for split in [Split.HELD_OUT if i < prompts - 1 else Split.TRAIN]
    ]
    examples = [example for example, _ in pairs]
    names = {str(t): EMPTY for t in teachers}
    write_examples(root / "examples", make_set(examples, tokenizer=EMPTY, templates=names, max_length=512))
    write_records(root / "completions.parquet", [completion for _, completion in pairs], Completion)
    tiny.save(root / "beginning", layers=2, seed=11)
    tiny.save(root / "student", layers=2, seed=12)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "prompts": [{"kind": "self-prompt", "count": prompts}],
            "teacher": [{"model": str(t), "precision": "float32"} for t in teachers],
            "student": {"kind": "pruned", "layers": 2},
            "train": {"precision": "float32"},
            "evaluate": {"held_out": prompts - 1, "answers": 2, "answer_tokens": 6},
        }
    )
    return recipe, RunDir(root), examples


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("teachers")
    return [tiny.save(base / "a", layers=4, seed=0), tiny.save(base / "b", layers=3, seed=5)]


class Evaluated(NamedTuple):
    recipe: Recipe
    run: RunDir
    examples: list[Example]
    facts: dict[str, JsonValue]

    @property
    def scores(self) -> list[Score]:
        return read_scores(self.run / "scores.json")


def the(scores: list[Score], name: str, subject: str) -> Score:
    score = score_of(scores, name, subject)
    assert score is not None
    return score


def bounds(found: Interval | Score) -> tuple[float, float, float]:
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    return found.low, found.value, found.high


@pytest.fixture(scope="module")
def evaluated(two_teachers: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    recipe, run, examples = make_run(tmp_path_factory.mktemp("evaluated"), two_teachers)
    return Evaluated(recipe, run, examples, evaluate(recipe, run))


# The figures against an independent computation: float64 numpy, full logits, examples padded into one batch.


def full_logits(place: Path, examples: list[Example]) -> list[np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64).eval()
    width = max(len(e.tokens_T) for e in examples) + 5
    tokens_BT = torch.full((len(examples), width), 2)
    attention_BT = torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example.tokens_T)] = torch.as_tensor(example.tokens_T)
        attention_BT[row, : len(example.tokens_T)] = 1
    with torch.inference_mode():
        logits_BTV = model(input_ids=tokens_BT, attention_mask=attention_BT).logits.numpy()
    return [logits_BTV[row, : len(e.tokens_T)] for row, e in enumerate(examples)]


def oracle(subject: Path | None, examples: list[Example]) -> dict[str, float]:
    """The three figures by definition; `subject` None is the teacher itself."""
    agree, kl, nll, count = 0, 0.0, 0.0, 0
    for teacher in {e.teacher for e in examples}:
        own = [e for e in examples if e.teacher == teacher]
        for e, p_TV, q_TV in zip(
            own, full_logits(Path(teacher), own), full_logits(subject or Path(teacher), own), strict=True
        ):
            for t in np.flatnonzero(e.mask_T):
                p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p_TV[t - 1], q_TV[t - 1]))
                agree += int(p.argmax() == q.argmax())
                kl += float((p * np.log(p / q)).sum())
                nll -= math.log(q[e.tokens_T[t]])
                count += 1
    mean = {"agreement_top1": agree / count, "kl_forward": kl / count}
    return mean | {"perplexity_on_teacher": math.exp(nll / count)}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_score_equals_its_definition_computed_from_padded_full_logits_in_float64(evaluated, subject):
    held_out = [e for e in evaluated.examples if e.split == Split.HELD_OUT]
    place = {"student": evaluated.run / "student", "before": evaluated.run / "beginning", "teacher": None}[subject]
    for name, value in oracle(place, held_out).items():
        score = the(evaluated.scores, name, subject)
        assert score.value == pytest.approx(value, rel=2e-5, abs=1e-9), name


def test_the_teacher_agrees_with_itself_wholly(evaluated):
    assert the(evaluated.scores, "agreement_top1", "teacher").value == 1.0
    kl = the(evaluated.scores, "kl_forward", "teacher")
    assert (kl.value, kl.low, kl.high) == (0.0, 0.0, 0.0)


def test_the_file_has_the_promised_shape(evaluated):
    rows = json.loads((evaluated.run / "scores.json").read_text())
    assert {(row["name"], row["subject"]) for row in rows} == {(n, s) for n in NAMES for s in SUBJECTS}
    keys = {"name", "subject", "value", "low", "high", "n", "unit", "seed", "unscored"}
    units = {"agreement_top1": "share", "kl_forward": "nats a token", "perplexity_on_teacher": "perplexity"}
    for row in rows:
        assert set(row) == keys
        assert row["unit"] == units[row["name"]]
        assert row["n"] == 7
        assert row["low"] <= row["value"] <= row["high"]
        assert 0 <= row["seed"] < 2**53
        assert row["unscored"] is None


def test_scores_come_back_as_they_were_written(evaluated, tmp_path):
    write_scores(tmp_path / "s.json", evaluated.scores)
    assert read_scores(tmp_path / "s.json") == evaluated.scores


def test_a_broken_score_file_is_refused_with_every_place(tmp_path):
    (tmp_path / "s.json").write_text('[{"name": "a"}, 3]')
    with pytest.raises(InputError) as error:
        read_scores(tmp_path / "s.json")
    places = {p.where.rpartition(": ")[2] for p in error.value.problems}
    assert {"0.subject", "0.value", "0.n", "1"} <= places


def test_facts_are_json_that_a_ledger_takes(evaluated):
    facts = json.loads(canonical(evaluated.facts))
    held_out = [e for e in evaluated.examples if e.split == Split.HELD_OUT]
    assert facts["prompts"] == 7
    assert facts["answers"] == len(held_out) == 14
    assert facts["positions"] == sum(int(e.mask_T.sum()) for e in held_out)
    model = AutoModelForCausalLM.from_pretrained(evaluated.run / "student")
    assert facts["models"]["student"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["models"]["student"]["bytes"] == (evaluated.run / "student" / "model.safetensors").stat().st_size
    assert facts["models"]["student"]["layers"] == 2


def test_again_gives_the_same_bytes(evaluated):
    before = [(evaluated.run / name).read_bytes() for name in ("scores.json", "answers.json")]
    evaluate(evaluated.recipe, evaluated.run)
    assert [(evaluated.run / name).read_bytes() for name in ("scores.json", "answers.json")] == before


def test_answers_stand_side_by_side(evaluated):
    answers = read_answers(evaluated.run / "answers.json")
    held_out = choose([e for e in evaluated.examples if e.split == Split.HELD_OUT], 2)
    assert [a.prompt_id for a in answers] == list(dict.fromkeys(e.prompt_id for e in held_out))
    for a in answers:
        number = int(a.messages[0].content.split()[1].strip("?"))
        assert a.teacher == TEXTS[number]  # of the first teacher of the recipe
        assert a.drawn.temperature == evaluated.recipe.collect.temperature
        assert "<|im_end|>" not in a.before + a.student
        assert a.before != a.student


def test_prompts_that_leave_no_room_are_not_asked(evaluated, tmp_path):
    recipe = evaluated.recipe.model_copy(
        update={"evaluate": evaluated.recipe.evaluate.model_copy(update={"answer_tokens": 500})}
    )
    run = RunDir(shutil.copytree(evaluated.run.root, tmp_path / "run"))
    assert evaluate(recipe, run)["side_by_side"] == 0
    assert read_answers(run / "answers.json") == []


def test_examples_of_other_completions_are_refused(evaluated, tmp_path):
    run = RunDir(shutil.copytree(evaluated.run.root, tmp_path / "run"))
    write_records(run / "completions.parquet", [], Completion)
    (run / "scores.json").unlink()
    with pytest.raises(StaleError, match="no completion"):
        evaluate(evaluated.recipe, run)
    assert not (run / "scores.json").exists()


# What cannot be measured says so.


def test_a_teacher_without_weights_leaves_what_needs_it_unscored(evaluated, two_teachers, tmp_path):
    gone = shutil.copytree(two_teachers[1], tmp_path / "gone")
    recipe, run, _ = make_run(tmp_path / "run", [two_teachers[0], gone], prompts=4)
    shutil.rmtree(gone)
    evaluate(recipe, run)
    scores = read_scores(run / "scores.json")
    for subject in SUBJECTS:
        for name in NAMES:
            score = the(scores, name, subject)
            if name == "perplexity_on_teacher" and subject != "teacher":
                assert score.value is not None
                assert score.unscored is None
            else:
                assert (score.value, score.low, score.high, score.n) == (None, None, None, 0)
                assert str(gone) in (score.unscored or "")


def test_a_single_prompt_has_values_without_intervals(two_teachers, tmp_path):
    recipe, run, _ = make_run(tmp_path, two_teachers[:1], prompts=2)
    evaluate(recipe, run)
    for score in read_scores(run / "scores.json"):
        assert score.value is not None
        assert (score.low, score.high, score.n, score.unscored) == (None, None, 1, None)


def test_nan_is_no_opinion_and_ties_go_to_the_first():
    teacher = torch.tensor([[0.0, 1.0, 1.0], [math.nan, 0.0, 1.0], [0.0, 0.0, 2.0]])
    subject = torch.tensor([[0.0, 5.0, 2.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert agreement(teacher, subject)[0] == 1
    assert agreement(teacher, subject)[1].isnan()
    assert agreement(teacher, subject)[2] == 0


# Nothing but an example itself touches its figures.


def test_what_follows_an_answer_changes_nothing(evaluated, two_teachers):
    teacher = AutoModelForCausalLM.from_pretrained(two_teachers[0])
    student = AutoModelForCausalLM.from_pretrained(evaluated.run / "student")
    example = evaluated.examples[0]
    more = Example(
        "x",
        np.concatenate([example.tokens_T, np.full(40, 2, np.int32)]),
        np.concatenate([example.mask_T, np.zeros(40, bool)]),
        example.prompt_id,
        example.completion,
        example.teacher,
        example.split,
    )
    alone, padded = (sum_over_example(teacher, student, e)[:4] for e in (example, more))
    assert padded == pytest.approx(alone, rel=1e-6)


def test_a_token_is_predicted_from_the_one_before():
    example = Example(
        "x",
        np.array([5, 6, 7, 8], np.int32),
        np.array([True, False, True, True]),
        "p",
        "c",
        "t",
        Split.HELD_OUT,
    )
    at_N, targets_N = supervised(example)
    assert at_N.tolist() == [1, 2]
    assert targets_N.tolist() == [7, 8]


def test_chunks_of_positions_change_nothing(evaluated, two_teachers, monkeypatch):
    teacher = AutoModelForCausalLM.from_pretrained(two_teachers[0])
    student = AutoModelForCausalLM.from_pretrained(evaluated.run / "student")
    whole = sum_over_example(teacher, student, evaluated.examples[0])
    monkeypatch.setattr("limbeck.evaluate.compare._CHUNK_BYTES", 1)
    assert sum_over_example(teacher, student, evaluated.examples[0])[:4] == pytest.approx(whole[:4], rel=1e-6)


def test_heads_padded_to_other_widths_are_compared_over_the_tokens_they_share(evaluated, two_teachers):
    """Rows past the tokenizer's are no tokens: whatever they say, the figures stay those of the unpadded
    head."""
    teacher = AutoModelForCausalLM.from_pretrained(two_teachers[0])
    student = AutoModelForCausalLM.from_pretrained(evaluated.run / "student")
    tokens = len(tiny.tokenizer())
    plain = sum_over_example(teacher, student, evaluated.examples[0])
    with torch.random.fork_rng():
        student.resize_token_embeddings(tokens + 64, mean_resizing=False)
    with torch.no_grad():
        student.lm_head.weight[tokens:] = 9.0
    width = shared_width(teacher, student, tokens)
    assert width == tokens
    padded = sum_over_example(teacher, student, evaluated.examples[0], vocabulary=width)
    assert padded[:4] == pytest.approx(plain[:4], rel=1e-6)
    assert shared_width(student, student, tokens) == tokens, "padded alike, and still no tokens"


def test_the_lowest_ranks_are_scored_whatever_their_order(evaluated):
    held_out = [e for e in evaluated.examples if e.split == Split.HELD_OUT]
    chosen = choose(held_out, 3)
    assert [e.prompt_id for e in chosen[::2]] == sorted({e.prompt_id for e in held_out}, key=rank)[:3]
    assert {e.id for e in choose(held_out[::-1], 3)} == {e.id for e in chosen}
    assert len(chosen) == 6  # every teacher's answer to each of them
