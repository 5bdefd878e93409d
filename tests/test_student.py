"""How a student begins: the layers that matter least go, what stays is the teacher's bit for bit, and what
is saved is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, kl_div
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)  # fmt: skip

from limbeck.errors import ModelError
from limbeck.ledger.canonical import digest_bytes, manifest
from limbeck.recipe import Recipe
from limbeck.records import Example, Split
from limbeck.render.examples import make_example, make_set, write_examples
from limbeck.rundir import RunDir
from limbeck.student import begin as stage
from limbeck.student.begin import begin
from limbeck.student.calibrate import calibrate
from limbeck.student.choose import Criterion, choose_layers
from limbeck.student.layers import after, only, stack_of
from limbeck.student.saving import prove, save

D = digest_bytes(b"something")
MEASURED: tuple[Criterion, ...] = ("greedy", "divergence", "influence")


def chats(count: int = 12, *, vocab: int = 99, teacher: str = "t") -> list[Example]:
    random = np.random.default_rng(0)
    return [
        make_example(
            random.integers(3, vocab, 12 + i).astype(np.int32), np.arange(12 + i) > 4,
            prompt_id=D, completion=f"c{i}", teacher=teacher, split=Split.TRAIN,
        )
        for i in range(count)
    ]  # fmt: skip


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    tokens_1T = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(input_ids=tokens_1T, use_cache=False).logits[0]


def silence(model: PreTrainedModel, *layers: int) -> PreTrainedModel:
    """Make layers of a Llama the identity: what they would add is 0."""
    with torch.no_grad():
        for i in layers:
            model.model.layers[i].self_attn.o_proj.weight.zero_()  # pyright: ignore
            model.model.layers[i].mlp.down_proj.weight.zero_()  # pyright: ignore
    return model


# ---- choosing


@pytest.mark.parametrize("criterion", MEASURED)
@pytest.mark.parametrize("idle", [0, 2, 4])
def test_a_layer_that_does_nothing_goes_first(criterion, idle):
    model = silence(tiny.llama(99, layers=5), idle)
    choice = choose_layers(model, chats(), 4, criterion)
    assert choice.removed == (idle,)
    assert choice.scores[idle] == pytest.approx(0, abs=1e-6)
    assert all(score > 0.01 for i, score in enumerate(choice.scores) if i != idle)
    before = logits_of(model)
    with only(model, choice.kept):
        torch.testing.assert_close(logits_of(model), before)


@pytest.mark.parametrize("criterion", [*MEASURED, "even"])
def test_choosing_leaves_the_model_as_it_was(criterion):
    model = tiny.llama(99, layers=4)
    before, config = logits_of(model), model.config.to_dict()
    choice = choose_layers(model, chats(), 2, criterion)
    assert sorted(choice.kept + choice.removed) == [0, 1, 2, 3]
    assert list(choice.kept) == sorted(choice.kept)
    assert torch.equal(logits_of(model), before)
    assert model.config.to_dict() == config
    assert choose_layers(model, chats(), 2, criterion) == choice, "the same choice again"


@pytest.mark.parametrize("criterion", [*MEASURED, "even"])
def test_keeping_all_layers_changes_nothing(criterion):
    model = tiny.llama(99, layers=3)
    choice = choose_layers(model, chats(), 3, criterion)
    assert (choice.kept, choice.removed, choice.divergence) == ((0, 1, 2), (), ())
    before = logits_of(model)
    with only(model, choice.kept):
        assert torch.equal(logits_of(model), before)


def test_even_keeps_the_first_and_the_last():
    model = tiny.llama(99, layers=7)
    assert choose_layers(model, [], 4, "even").kept == (0, 2, 4, 6)
    for keep in range(2, 8):
        kept = choose_layers(model, [], keep, "even").kept
        gaps = np.diff(kept)
        assert (len(kept), kept[0], kept[-1]) == (keep, 0, 6)
        assert gaps.max() - gaps.min() <= 1


def stray(model: PreTrainedModel, kept: list[int], examples: list[Example]) -> float:
    """KL(teacher || model) over the supervised positions, from all logits in float64."""
    total, count = 0.0, 0
    for example in examples:
        tokens_1T = torch.from_numpy(example.tokens_T.astype(np.int64))[None]
        at = np.flatnonzero(example.mask_T) - 1
        with torch.no_grad():
            teacher = model(input_ids=tokens_1T).logits[0, at].double().log_softmax(1)
            with only(model, kept):
                student = model(input_ids=tokens_1T).logits[0, at].double().log_softmax(1)
        total += float(kl_div(student, teacher, reduction="sum", log_target=True))
        count += len(at)
    return total / count


def test_scores_are_the_divergence_without_each_layer():
    """Against the exact divergence over the whole vocabulary; the difference is the sample's."""
    model, examples = tiny.llama(99, layers=4), chats(40)
    choice = choose_layers(model, examples, 2, "divergence", tokens=10**6)
    assert choice.tokens == sum(e.supervised for e in examples)
    exact = [stray(model, [j for j in range(4) if j != i], examples) for i in range(4)]
    assert choice.scores == pytest.approx(exact, rel=0.1)
    assert choice.kept == tuple(sorted(sorted(range(4), key=lambda i: exact[i])[2:]))
    assert choice.divergence == pytest.approx([stray(model, list(choice.kept), examples)], rel=0.1)


def test_greedy_measures_anew_after_each_removal():
    """Each layer that goes is, by the exact divergence, the least harmful of those left; the path is what
    that harm is."""
    model, examples = tiny.llama(99, layers=5, seed=3), chats(30)
    choice = choose_layers(model, examples, 2, "greedy", tokens=10**6)
    kept = list(range(5))
    for gone, diverged in zip(choice.removed, choice.divergence, strict=True):
        exact = {i: stray(model, [j for j in kept if j != i], examples) for i in kept}
        assert gone == min(exact, key=lambda i: exact[i])
        assert diverged == pytest.approx(exact[gone], rel=0.1)
        kept.remove(gone)
    assert kept == list(choice.kept)


def _before_norm(model: PreTrainedModel, tokens_1T: torch.Tensor) -> torch.Tensor:
    """The last layer's output; transformers lists it after the final norm only."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=tokens_1T)
    hook.remove()
    return seen[0]


def test_influence_is_the_turn_of_the_hidden_state():
    model, examples = tiny.llama(99, layers=3), chats(5)
    turned = torch.zeros(3, dtype=torch.float64)
    for example in examples:
        tokens_1T = torch.from_numpy(example.tokens_T.astype(np.int64))[None]
        at = np.flatnonzero(example.mask_T) - 1
        with torch.no_grad():
            *inputs, _ = model(input_ids=tokens_1T, output_hidden_states=True).hidden_states
            inputs.append(_before_norm(model, tokens_1T))
        for i in range(3):
            turned[i] += (1 - cosine_similarity(inputs[i][0, at].double(), inputs[i + 1][0, at].double())).sum()
    choice = choose_layers(model, examples, 2, "influence", tokens=10**6)
    assert choice.scores == pytest.approx((turned / choice.tokens).tolist(), rel=1e-4)


def test_a_forward_that_starts_in_the_middle_is_the_same():
    model = tiny.llama(99, layers=4)
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    whole = logits_of(model)
    hook.remove()
    with after(model, [2, 3], seen[0]):
        assert torch.equal(logits_of(model), whole)


def chat(name: str, prompt: int, answer: int) -> Example:
    """A chat of so many tokens; its name is its completion."""
    tokens_T = np.random.default_rng(prompt + answer).integers(3, 99, prompt + answer).astype(np.int32)
    return make_example(tokens_T, np.arange(prompt + answer) >= prompt, prompt_id=D, completion=name, teacher="t",
                        split=Split.TRAIN)  # fmt: skip


def read_by(calibration) -> list[tuple[list[int], list[int]]]:
    """Of each example: the tokens that are read, and those of them that are measured."""
    rows = [
        (tokens_T[seen_T == 1].tolist(), tokens_T[1:][at_T[:-1]].tolist())
        for batch in calibration.batches
        for tokens_T, seen_T, at_T in zip(batch.tokens_BT, batch.attention_BT, batch.predict_BT, strict=True)
    ]
    return sorted(rows)


@pytest.mark.parametrize("prompt", [5, 95, 96, 300, 900])
def test_an_answer_is_measured_however_long_its_prompt(prompt):
    """Whole prompts, and the first tokens of each answer: as many of an answer to a long prompt as to a short one."""
    whole = [chat("short", 5, 30), chat("long", prompt, 200)]
    calibration = calibrate(tiny.llama(99, layers=2), whole, tokens=10**6)
    due = [(e.tokens_T[:end].tolist(), e.tokens_T[start:end].tolist())
           for e, start, end in zip(whole, (5, prompt), (35, prompt + 64), strict=True)]  # fmt: skip
    assert read_by(calibration) == sorted(due)
    assert calibration.positions == 30 + 64


def test_too_long_examples_are_measured_last_and_never_all_dropped():
    model, long, short = tiny.llama(99, layers=2), chat("long", 1500, 20), chat("short", 20, 20)
    assert read_by(calibrate(model, [long, short], tokens=20)) == [
        (short.tokens_T.tolist(), short.tokens_T[20:].tolist())
    ]
    [(read, measured)] = read_by(calibrate(model, [long], tokens=20))
    assert read == long.tokens_T[-1024:].tolist()
    assert measured == long.tokens_T[-20:].tolist()


def test_short_answers_to_long_prompts_do_not_cost_without_end():
    """Two tokens of 302 are measured: the bound on what is read ends the drawing, not the 100 tokens asked for."""
    calibration = calibrate(tiny.llama(99, layers=2), [chat(f"c{i}", 300, 2) for i in range(30)], tokens=100)
    read = sum(int(batch.attention_BT.sum()) for batch in calibration.batches)
    assert 32 * 100 - 302 <= read <= 32 * 100
    assert calibration.positions == read // 302 * 2


def test_what_cannot_be_done_is_refused():
    model = tiny.llama(99, layers=3)
    with pytest.raises(ModelError, match="1 to 3"):
        choose_layers(model, chats(), 4)
    with pytest.raises(ModelError, match="nothing to measure"):
        choose_layers(model, [], 2)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="one list of 7 layers"):
        stack_of(model)
    model.config.num_hidden_layers = 3
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="num_kv_shared_layers"):
        stack_of(model)


# ---- saving


COMMON = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {"vocab_size": 99, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
PRUNABLE = [
    Gemma2Config(**COMMON, head_dim=8, sliding_window=4),
    GPT2Config(**SMALL, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4),
]


def made(config) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("config", PRUNABLE, ids=lambda c: c.model_type)
def test_architectures_are_pruned_and_come_back_the_same(config, tmp_path):
    """Also those with two kinds of layers in turn (Gemma 2), of which the configuration keeps a list."""
    model = made(config)
    whole = logits_of(model)
    choice = choose_layers(model, chats(), 2, "greedy")
    for kept in (choice.kept, (1, 2)):
        with only(model, kept):
            measured = logits_of(model)
            save(model, tiny.tokenizer(), tmp_path / str(kept))
            prove(model, tmp_path / str(kept))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(kept)).eval()
        assert torch.equal(logits_of(loaded), measured)
        prompt = torch.arange(3, 9)[None]
        with only(model, kept):
            own = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(loaded.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), own)
    assert torch.equal(logits_of(model), whole)


def test_layers_that_depend_on_their_number_are_refused(tmp_path):
    """Qwen2-MoE makes only some layers dense, by a list of their numbers: kept layers would change their
    kind."""
    model = made(Qwen2MoeConfig(**COMMON, num_experts=2, moe_intermediate_size=16, mlp_only_layers=[3]))
    with only(model, [2, 3]):
        save(model, tiny.tokenizer(), tmp_path)
        with pytest.raises(ModelError, match="another model when it is loaded again"):
            prove(model, tmp_path)


# ---- the stage


def recipe_for(teacher: Path, **student) -> Recipe:
    return Recipe.model_validate({
        "name": "tiny", "prompts": [{"kind": "self-prompt", "count": 1}], "student": student,
        "teacher": {"model": str(teacher), "precision": "float32"},
    })  # fmt: skip


def run_with(root: Path, teacher: Path) -> RunDir:
    examples = make_set(chats(vocab=300, teacher=str(teacher)), tokenizer=D, templates={str(teacher): D}, max_length=99)
    write_examples(root / "examples", examples)
    return RunDir(root)


def test_a_pruned_student_is_the_teacher_with_fewer_layers(tmp_path):
    teacher = tiny.save(tmp_path / "teacher", layers=5)
    run = run_with(tmp_path / "run", teacher)
    facts = begin(recipe_for(teacher, kind="pruned", layers=3), run)
    kept, gone = facts["layers_kept"], facts["layers_removed"]
    assert isinstance(kept, list)
    assert isinstance(gone, list)
    assert (len(kept), len(gone), sorted(kept + gone)) == (3, 2, [0, 1, 2, 3, 4])
    assert facts["criterion"] == "divergence"
    assert len(facts["scores"]) == 5  # type: ignore[arg-type]
    json.dumps(facts, allow_nan=False)

    weights, own = (
        load_file(teacher / "model.safetensors"),
        load_file(run / "beginning" / "model.safetensors"),
    )
    old = {f"model.layers.{new}.": f"model.layers.{was}." for new, was in enumerate(kept)}
    for name, tensor in own.items():
        was = next((was + name.removeprefix(new) for new, was in old.items() if name.startswith(new)), name)
        assert torch.equal(tensor, weights[was]), name
    assert len(own) == len(weights) - 2 * len([n for n in weights if n.startswith("model.layers.0.")])
    student = AutoModelForCausalLM.from_pretrained(run / "beginning")
    assert student.config.num_hidden_layers == 3
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]
    assert facts["parameters"] == student.num_parameters()
    words = AutoTokenizer.from_pretrained(run / "beginning")
    assert words.chat_template == tiny.CHATML
    assert (run / "beginning" / "generation_config.json").read_text() == (
        teacher / "generation_config.json"
    ).read_text()

    first = manifest(run / "beginning")
    begin(recipe_for(teacher, kind="pruned", layers=3), run)
    assert manifest(run / "beginning") == first, "the same bytes again"
    even = begin(recipe_for(teacher, kind="pruned", layers=3, choose="even"), run)
    assert even["layers_kept"] == [0, 2, 4]


def test_nothing_is_left_of_a_student_that_fails(tmp_path, monkeypatch):
    teacher = tiny.save(tmp_path / "teacher")
    run = run_with(tmp_path / "run", teacher)

    def refuse(*_):
        raise ModelError("no")

    monkeypatch.setattr(stage, "prove", refuse)
    with pytest.raises(ModelError):
        begin(recipe_for(teacher, kind="pruned", layers=3), run)
    assert [p.name for p in run.root.iterdir()] == ["examples"]


def test_a_pretrained_student_keeps_its_weights_and_stops_like_the_teacher(tmp_path):
    teacher, student = tiny.save(tmp_path / "teacher"), tiny.save(tmp_path / "student", layers=2, seed=5)
    path = student / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    run = run_with(tmp_path / "run", teacher)
    facts = begin(recipe_for(teacher, kind="pretrained", model=str(student)), run)
    assert facts["layers"] == 2
    own, given = (load_file(d / "model.safetensors") for d in (run / "beginning", student))
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    loaded = AutoModelForCausalLM.from_pretrained(run / "beginning")
    assert loaded.generation_config.eos_token_id == [2]


def test_a_student_with_another_tokenizer_is_refused(tmp_path):
    teacher = tiny.save(tmp_path / "teacher")
    student = tiny.save(tmp_path / "student", layers=2, text=("Something else entirely, 1234 times over.",) * 3)
    run = run_with(tmp_path / "run", teacher)
    with pytest.raises(ModelError, match="do not have the same tokenizer"):
        begin(recipe_for(teacher, kind="pretrained", model=str(student)), run)
    assert not (run / "beginning").exists()
