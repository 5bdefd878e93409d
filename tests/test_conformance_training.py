"""docs/correctness.md: the traps of masks, denominators, teachers and runs, on the trainer itself.

Everything the trainer computes here is held against full logits of whole models, example by example, in float64 (where
transformers lets it be: norms and rotations are rounded to float32, alike on both sides). As in test_conformance.py,
each test first shows that the mistake would give another number on its own data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pytest
import tiny
import torch
from test_learning import curve, logits_by_hand, make_order, prepared
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    PreTrainedModel,
    TrainingArguments,
)

from limbeck.evaluate.compare import shared_width, sum_over_example
from limbeck.records import Example, Rollout, Split
from limbeck.render.batches import collate, collate_packed
from limbeck.render.examples import make_example, read_examples
from limbeck.rundir import RunDir
from limbeck.signal.head import head_of, hidden_states
from limbeck.tables import read_records
from limbeck.train.feed import Feed
from limbeck.train.losses import reverse_kl
from limbeck.train.rollouts import prompt_length
from limbeck.train.schedule import Schedule, cut, make_schedule
from limbeck.train.sources import LiveTeacher
from limbeck.train.stage import train
from limbeck.train.trainer import DistillationTrainer

VOCAB = 50
RAGGED = ((5, 1), (6, 2), (9, 1), (30, 25), (34, 30), (40, 33))
"""Tokens and supervised tokens of examples."""


def chat(length: int, supervised: int, seed: int = 0) -> Example:
    """Random tokens; the last ones are supervised, and where there is room one earlier stretch of one token."""
    tokens_T = np.random.default_rng([seed, length]).integers(3, VOCAB, length).astype(np.int32)
    mask_T = np.arange(length) >= length - supervised
    return make_example(tokens_T, mask_T, prompt_id="", completion=f"{length}/{seed}", teacher="", split=Split.TRAIN)


def two_turns() -> Example:
    one = chat(12, 4, seed=3)
    mask_T = one.mask_T.copy()
    mask_T[3:5] = True
    return make_example(one.tokens_T, mask_T, prompt_id="", completion="two", teacher="", split=Split.TRAIN)


def pair_of(vocab: int = VOCAB) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher in float64."""
    return tiny.llama(vocab, layers=2, seed=1).double(), tiny.llama(vocab, layers=3, seed=2).double()


def trainer_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    place: Path,
    *,
    accumulate: int = 1,
    packed: bool = False,
    vocab: int = VOCAB,
    own: Callable[[int], list[Example]] | None = None,
) -> DistillationTrainer:
    """A trainer whose only step sees all the examples, or what the student writes in their stead."""
    every = tuple(range(len(examples)))
    schedule = Schedule(((),), (every,), 1) if own else Schedule((every,), ((),), 1)
    feed = Feed(examples, schedule, own_answers=own, accumulate=accumulate, packed=packed)
    args = TrainingArguments(
        output_dir=str(place),
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
    )
    source = LiveTeacher(teacher, vocab)
    return DistillationTrainer(student, feed=feed, source=source, loss="forward_kl", temperature=1.0, args=args)


class Step(NamedTuple):
    loss: float
    grads: Tensor
    tokens: int


def step_of(trainer: DistillationTrainer, accumulate: int = 1) -> Step:
    """Loss, gradient of all parameters, and denominator of one step, as the trainer goes about it."""
    model = cast("PreTrainedModel", trainer.model)
    model.zero_grad()
    batches = iter(trainer.get_train_dataloader())
    samples, count = trainer.get_batch_samples(batches, accumulate, torch.device("cpu"))
    losses = [trainer.compute_loss(model, sample, num_items_in_batch=count) for sample in samples]
    for loss in losses:
        loss.backward()
    return Step(sum(float(loss.detach()) for loss in losses), flat_gradient(model), int(count))


def flat_gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, example: Example, *, shift: int = 1) -> Tensor:
    """KL(teacher || student), nats at each supervised position, from full logits of the example alone."""
    tokens_1T = torch.from_numpy(example.tokens_T.astype(np.int64))[None]
    at_N = np.flatnonzero(example.mask_T) - shift
    log_q_NV = student(input_ids=tokens_1T).logits[0, at_N].double().log_softmax(-1)
    with torch.no_grad():
        log_p_NV = teacher(input_ids=tokens_1T).logits[0, at_N].double().log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def gradient_by_hand(student: PreTrainedModel, loss: Tensor) -> Tensor:
    student.zero_grad()
    loss.backward()
    return flat_gradient(student)


def test_trap_01_gradient_reaches_the_position_before_each_supervised_token_and_no_other(tmp_path):
    student, teacher = pair_of()
    example, states = two_turns(), []

    def keep(_module, _inputs, output):
        if output.last_hidden_state.requires_grad:  # not where the head is proved
            output.last_hidden_state.retain_grad()
            states.append(output.last_hidden_state)

    right, unshifted = (float(by_hand(student, teacher, example, shift=n).mean().detach()) for n in (1, 0))
    assert abs(right - unshifted) > 0.01 * right
    trainer = trainer_of(student, teacher, [example], tmp_path)
    handle = student.model.register_forward_hook(keep)
    step = step_of(trainer)
    handle.remove()
    assert step.loss == pytest.approx(right, rel=1e-6)
    touched_T = (states[0].grad[0] != 0).any(-1)
    assert touched_T.nonzero()[:, 0].tolist() == [2, 3, 7, 8, 9, 10]
    assert np.flatnonzero(example.mask_T).tolist() == [3, 4, 8, 9, 10, 11], "where an unshifted mask would put it"


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_trap_02_the_gradient_of_a_step_does_not_depend_on_its_pieces(tmp_path, accumulate):
    student, teacher = pair_of()
    examples = [chat(*size) for size in RAGGED]
    count = sum(e.supervised for e in examples)
    whole = torch.cat([by_hand(student, teacher, e) for e in examples]).sum() / count
    exact = gradient_by_hand(student, whole)
    step = step_of(trainer_of(student, teacher, examples, tmp_path, accumulate=accumulate), accumulate)
    assert step.tokens == count
    assert step.loss == pytest.approx(float(whole.detach()), rel=1e-6)
    torch.testing.assert_close(step.grads, exact, rtol=1e-4, atol=1e-6)
    if accumulate > 1:  # the mistake: a mean over pieces of the mean of each
        pieces = [[examples[i] for i in part] for part in cut([len(e.tokens_T) for e in examples], accumulate)]
        means = [torch.cat([by_hand(student, teacher, e) for e in piece]).mean() for piece in pieces]
        wrong = gradient_by_hand(student, sum(means) / accumulate)
        assert (wrong - exact).norm() > 0.3 * exact.norm()


def test_trap_02_tokens_are_counted_after_the_student_has_written(tmp_path):
    student, teacher = pair_of()
    prompts = [chat(*size) for size in RAGGED[3:]]
    written = [chat(12, 3, seed=1), chat(14, 1, seed=1), chat(20, 9, seed=1)]
    step = step_of(trainer_of(student, teacher, prompts, tmp_path, own=lambda _: written))
    assert step.tokens == 13 != sum(e.supervised for e in prompts)
    expected = sum(float(by_hand(student, teacher, e).sum().detach()) for e in written) / 13
    assert step.loss == pytest.approx(expected, rel=1e-6)


COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = [
    Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=0.7),
    Gemma3TextConfig(**COMMON, head_dim=8, final_logit_softcapping=0.7),
    CohereConfig(**COMMON, logit_scale=0.3),
    Cohere2Config(**COMMON, logit_scale=0.3),
    GraniteConfig(**COMMON, logits_scaling=7.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_trap_09_the_loss_is_that_of_the_models_own_logits(tmp_path, config):
    built = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built.append(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval())
    student, teacher = built
    example = chat(14, 8)
    expected = by_hand(student, teacher, example).mean()
    exact = gradient_by_hand(student, expected)
    with torch.no_grad():  # the mistake: hidden states times weights, and nothing more
        batch = collate([example], 0)
        bare = [(hidden_states(m, batch.tokens_BT)[batch.predict_BT] @ head_of(m).weight.T) for m in built]
        log_q, log_p = (x.log_softmax(-1) for x in bare)
        assert abs((log_p.exp() * (log_p - log_q)).sum(-1).mean() - expected) > 0.2 * expected
    step = step_of(trainer_of(student, teacher, [example], tmp_path))
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(step.grads, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_trap_14_and_20_a_live_teacher_never_drops_out_and_gets_no_gradient(tmp_path):
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    batch = collate([chat(14, 8)], 0)
    teacher.train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        dropped, again = (hidden_states(teacher, batch.tokens_BT)[batch.predict_BT] for _ in range(2))
        assert (dropped - again).abs().max() > 0.1, "the mistake"
    source = LiveTeacher(teacher, VOCAB)
    first, second = source.take(batch), source.take(batch)
    assert torch.equal(first.hidden_ND, second.hidden_ND)
    assert not first.hidden_ND.requires_grad
    student = tiny.llama(VOCAB, layers=2).double()
    trainer = trainer_of(student, teacher, [chat(14, 8)], tmp_path)
    student.train()
    step_of(trainer)
    assert student.training
    assert not any(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_trap_18_step_n_is_what_it_always_is_though_nothing_was_asked_before(tmp_path):
    examples = [chat(6 + i, 1 + i % 5) for i in range(13)]
    order = make_schedule([len(e.tokens_T) for e in examples], batch_size=4, epochs=2, pieces=2, seed=0)

    def read(first: int) -> list[tuple[str, ...]]:
        feed = Feed(examples, order, accumulate=2)
        return [tuple(i for batch in feed[n].passes for i in batch.example_ids) for n in range(first, len(feed))]

    whole = read(0)
    for killed_at in (2, 6):
        assert read(killed_at) == whole[killed_at:]
        # The mistake: a counter that begins anew after a resume.
        assert read(killed_at) != whole[: len(whole) - killed_at]


def test_trap_19_held_out_kl_and_training_loss_are_one_number_on_the_same_examples(tmp_path):
    """With heads that are padded alike, and padding that would show."""
    student, teacher = pair_of(VOCAB + 14)
    with torch.no_grad():
        student.get_input_embeddings().weight[VOCAB:] *= 3  # pyright: ignore
    examples = [chat(*size) for size in RAGGED]
    width = shared_width(teacher, student, VOCAB)
    sums = [sum_over_example(teacher, student, e, vocabulary=width) for e in examples]
    count = sum(e.supervised for e in examples)
    trained = step_of(trainer_of(student, teacher, examples, tmp_path)).loss
    assert sum(s.kl for s in sums) / sum(s.positions for s in sums) == pytest.approx(trained, rel=1e-6)
    padded = sum(float(by_hand(student, teacher, e).sum().detach()) for e in examples) / count
    by_example = np.mean([s.kl / s.positions for s in sums])
    for wrong in (padded, by_example, sum(s.kl for s in sums)):
        assert abs(wrong - trained) > 0.005 * trained


def test_trap_20_packed_examples_are_asked_about_and_learned_from_as_if_each_were_alone(tmp_path):
    student, teacher = pair_of()
    examples = [chat(*size) for size in RAGGED]
    source, packed = LiveTeacher(teacher, VOCAB), collate_packed(examples)
    alone = torch.cat([source.take(collate([e], 0)).hidden_ND for e in examples])
    torch.testing.assert_close(source.take(packed).hidden_ND, alone)
    unmarked = source.take(replace(packed, positions_BT=None)).hidden_ND
    assert (unmarked - alone).abs().max() > 0.1, "the mistake: one example reads the other"
    padded, one_row = (
        step_of(trainer_of(student, teacher, examples, tmp_path, packed=layout)) for layout in (False, True)
    )
    assert one_row.loss == pytest.approx(padded.loss, rel=1e-6)
    torch.testing.assert_close(one_row.grads, padded.grads, rtol=1e-4, atol=1e-6)


class OwnAnswers(NamedTuple):
    recipe: object
    run: RunDir
    stops: frozenset[int]
    rows: list[Rollout]


@pytest.fixture(scope="module")
def own_answers(tiny_run, tmp_path_factory) -> OwnAnswers:
    """A run on answers that the student drew at temperature 0.5, many of which it ended itself."""
    on_policy = {"share": 1.0, "max_tokens": 9, "every": 1, "temperature": 0.5}
    place = tmp_path_factory.mktemp("own") / "run"
    recipe, run = prepared(tiny_run, place, loss="reverse_kl", epochs=0.3, on_policy=on_policy)
    path, stops = run / "beginning" / "generation_config.json", range(3, 320, 6)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(stops)}))
    train(recipe, run)
    return OwnAnswers(recipe, run, frozenset(stops), list(read_records(run / "rollouts.parquet", Rollout)))


def test_trap_03_the_token_that_ends_the_students_own_answer_is_learned(own_answers):
    ended = [row for row in own_answers.rows if row.finish_reason == "stop"]
    assert len(ended) > 3
    assert all(row.tokens[-1] in own_answers.stops | {2} for row in ended), "any of the ids that end an answer"
    assert not any(set(row.tokens[:-1]) & own_answers.stops for row in own_answers.rows)
    steps = json.loads((own_answers.run / "training.json").read_text())["steps"]
    assert steps[-1]["tokens"] == sum(len(row.tokens) for row in own_answers.rows), "ends are counted"


def test_trap_10_answers_are_drawn_at_one_temperature_and_learned_at_another(own_answers):
    recipe, run, _, rows = own_answers
    examples, prompts = read_examples(run / "examples").train, make_order(recipe, run).prompts[0]
    right, wrong, count = 0.0, 0.0, 0
    for row in (row for row in rows if row.step == 0):
        parent = examples[prompts[row.slot]]
        tokens_T = np.append(parent.tokens_T[: prompt_length(parent)], row.tokens).astype(np.int32)
        mask_T = np.arange(len(tokens_T)) >= prompt_length(parent)
        own = make_example(tokens_T, mask_T, prompt_id="", completion="", teacher="", split=Split.TRAIN)
        logits = [logits_by_hand(place, own) for place in (run / "beginning", Path(recipe.teachers[0].model))]
        right += float(reverse_kl(*logits).sum())
        wrong += float(reverse_kl(*logits, temperature=0.5).sum())
        count += len(row.tokens)
    assert abs(wrong - right) > 0.1 * right
    assert curve(run)[0] == pytest.approx(right / count, rel=1e-4)
