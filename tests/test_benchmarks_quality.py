"""Quality at equal tokens: both sides get the same steps, and what differs is seen, with its intervals."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import ours
import pytest
import quality
import tiny
import torch
from bench import Result
from steps import BATCH, read_order, weights_digest, write_order
from transformers import AutoModelForCausalLM

from limbeck.ledger.canonical import digest_json
from limbeck.models import load_tokenizer
from limbeck.records import Message, Prompt, Split
from limbeck.render.chat import ChatRenderer
from limbeck.render.examples import make_example, make_set, write_examples


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Material as benchmarks/material.py lays it out: 16 chats for tiny models."""
    out = tmp_path_factory.mktemp("material")
    tiny.save(out / "teacher", seed=1)
    tiny.save(out / "student", seed=2, layers=2)
    renderer = ChatRenderer(load_tokenizer(str(out / "teacher")), "t")
    examples, lines = [], []
    for i in range(2 * BATCH):
        question, answer = Message(role="user", content=f"How many {i}?"), "a duck lays eggs " * (1 + i % 5)
        made = renderer.render([question], answer, stopped=True, created=datetime(2026, 1, 1, tzinfo=UTC))
        prompt = Prompt.id_of((question,))
        examples.append(
            make_example(
                made.tokens_T,
                made.mask_T,
                prompt_id=prompt,
                completion=digest_json([prompt, answer]),
                teacher="t",
                split=Split.TRAIN,
            )
        )
        lines.append(json.dumps({"messages": [question.model_dump(), {"role": "assistant", "content": answer}]}))
    digest = digest_json("tokenizer")
    write_examples(out / "examples", make_set(examples, tokenizer=digest, templates={"t": digest}, max_length=999))
    (out / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return out


def options_for(where: Path, out: Path, **more: object) -> argparse.Namespace:
    told = {"material": where, "out": out, "epochs": 2, "steps": 0, "skip": 1, "learning_rate": 1e-3, "seed": 0}
    return argparse.Namespace(**told | {"save": None, "result": out / "result.json"} | more)


def test_a_step_has_the_chats_that_the_file_says_and_what_it_was_done_with_is_told(where, tmp_path):
    """The lengths of the chats in the file are the tokens of each step, in an order that is none of limbeck's own."""
    order = [[15 - i for i in range(BATCH)], [i % 3 for i in range(BATCH)], list(range(BATCH))]
    write_order(tmp_path / "order.json", order)
    found = ours.live(options_for(where, tmp_path, order=tmp_path / "order.json"))
    examples = quality.read_examples(where / "examples").train
    assert found["step_tokens"] == [sum(len(examples[i].tokens_T) for i in step) for step in order]
    assert found["step_supervised"] == [sum(examples[i].supervised for i in step) for step in order]
    student = AutoModelForCausalLM.from_pretrained(where / "student", dtype=torch.float32)
    told = found["settings"]
    assert (told["beginning"], told["weights"]) == (weights_digest(student), student.num_parameters())
    assert (told["betas"], told["weight_decay"], told["weights_in"]) == ([(0.9, 0.95)], [0.0], ["torch.float32"])
    assert found["learning_rates"] == pytest.approx([1e-3, 0.75e-3, 0.25e-3], rel=1e-6)
    assert len(found["gradient_norms"]) == len(found["losses"]) == 3


def test_the_order_is_written_by_number_and_chats_that_are_not_the_examples_are_refused(where, tmp_path):
    path = quality.order_of(options_for(where, tmp_path), where, 3)
    order = read_order(path)
    assert [sorted(order[0] + order[1]), sorted(order[2] + order[3])] == [list(range(2 * BATCH))] * 2
    assert quality.order_of(options_for(where, tmp_path), where, 3) == path
    assert quality.order_of(options_for(where, tmp_path), where, 4) != path
    lines = (where / "chats.jsonl").read_text().splitlines()
    other = tmp_path / "other"
    other.mkdir()
    (other / "examples").symlink_to(where / "examples")
    (other / "chats.jsonl").write_text("\n".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    with pytest.raises(ValueError, match=r"line 4 of chats\.jsonl is not example 3"):
        quality.order_of(options_for(where, tmp_path), other, 3)


def test_an_order_that_trl_would_cut_elsewhere_is_refused(tmp_path):
    write_order(tmp_path / "order.json", [[0] * BATCH, [0] * (BATCH - 1)])
    with pytest.raises(ValueError, match=r"steps of \[7, 8\] chats, expected 8"):
        read_order(tmp_path / "order.json")


def test_any_weight_changes_the_digest_of_the_weights():
    model = tiny.llama(320)
    before = weights_digest(model)
    assert before == weights_digest(tiny.llama(320)) != weights_digest(tiny.llama(320, seed=1))
    with torch.no_grad():
        bits = model.model.norm.weight.view(torch.int32)
        bits[3] ^= 1
    assert weights_digest(model) != before


def test_sides_that_were_not_given_the_same_are_told():
    one: Result = {
        "settings": {"eps": [1e-8]},
        "learning_rates": [3e-4, 1e-4],
        "step_tokens": [5, 6],
        "step_supervised": [3, 4],
    }
    assert quality.unequal({"TRL GKD": one, "limbeck live": dict(one)}) == []
    for key, other in {"settings": {"eps": [1e-6]}, "learning_rates": [3e-4, 2e-4], "step_supervised": [3, 5]}.items():
        (line,) = quality.unequal({"TRL GKD": one, "limbeck live": one | {key: other}})
        assert line.startswith(f"{key}: TRL GKD has ")
        assert str(other) in line


def test_the_interval_over_seeds_is_students():
    """Textbook: t of 2 degrees of freedom is 4.3027 at 0.975, and the deviation of 1, 2, 3 is 1."""
    found = quality.over_seeds([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert quality.over_seeds([0.25]) == (0.25, None, None)


def test_differences_are_paired_by_seed_and_weighed_by_positions():
    """Sums over positions, 10 and 30 of them: differences of 4 / 40 and 8 / 40 in KL, none in agreement."""
    positions_P = np.array([10.0, 30.0])

    def measured(first: float, second: float) -> quality.Measured:
        return quality.Measured(np.array([first, second]), np.array([5.0, 5.0]), positions_P)

    found = {
        ("TRL GKD", 0): measured(20, 60),
        ("limbeck live", 0): measured(21, 63),
        ("TRL GKD", 1): measured(40, 50),
        ("limbeck live", 1): measured(42, 56),
        ("limbeck live", 2): measured(0, 0),
    }
    kl, agreement = quality.differences(found, [0, 1, 2]).splitlines()[2:]
    assert "| KL, nats a token | 0.1000, 0.2000 | 0.1500 (0.1500 to 0.1500) | 0.1500 (" in kl
    assert "| agreement | 0.0000, 0.0000 | 0.0000" in agreement


def test_a_training_is_kept_only_for_the_same_command(tmp_path, monkeypatch):
    calls: list[tuple[str, ...]] = []

    def run_one(run: quality.Run, logs: Path, number: int) -> Result:
        calls.append(run.command)
        return {"losses": [float(len(calls))]}

    monkeypatch.setattr(quality, "run_one", run_one)
    options, student = argparse.Namespace(out=tmp_path, keep=True), tmp_path / "limbeck-live-0"
    one, other = quality.Run("limbeck live", ("a", "--steps", "2")), quality.Run("limbeck live", ("a", "--steps", "3"))
    results = [quality.train(run, student, options, 0) for run in (one, one, other, one)]
    assert [r["losses"] for r in results if r] == [[1.0], [1.0], [2.0], [3.0]]
    options.keep = False
    assert quality.train(one, student, options, 0) == {"losses": [4.0]}
