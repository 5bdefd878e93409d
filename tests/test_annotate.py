"""Annotating: stored signals are what the teacher says at the position before each supervised token,
whatever the batch, the shard, or the moment a run was killed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
)  # fmt: skip

from limbeck import models
from limbeck.errors import InputError, ModelError, StaleError
from limbeck.ledger.canonical import digest_bytes, manifest
from limbeck.recipe import Recipe
from limbeck.records import Example, Split
from limbeck.render.examples import ExampleSet, make_example, make_set, read_examples, write_examples
from limbeck.rundir import RunDir
from limbeck.signal import annotate as stage
from limbeck.signal import head
from limbeck.signal.annotate import annotate, annotate_batch, plan_shards, signal_key
from limbeck.signal.audit import audit
from limbeck.signal.encoding import SampledArrays
from limbeck.signal.head import head_logits, head_of, hidden_states
from limbeck.signal.sampled import SampledCodec
from limbeck.signal.store import Planned, SignalStore, SignalWriter
from limbeck.signal.types import SampledSignal, TextSignal

D = digest_bytes(b"something")
COARSEST = 0.0065
"""Half the grid of stored head probabilities is finer than this everywhere; rounding may go a whole step."""


def chat(seed: int, length: int, teacher: str, *, split: Split = Split.TRAIN, vocab: int = 300) -> Example:
    """Random tokens, some of them supervised, in two stretches as in a chat of two turns."""
    random = np.random.default_rng(seed)
    mask_T = np.zeros(length, np.bool_)
    mask_T[length // 3 : length // 2] = True
    mask_T[-max(1, length // 4) :] = True
    tokens_T = random.integers(3, vocab, length).astype(np.int32)
    return make_example(tokens_T, mask_T, prompt_id=D, completion=f"c{seed}", teacher=teacher, split=split)


def recipe_for(*teachers: Path, **changes) -> Recipe:
    fields = {
        "name": "tiny",
        "seed": 3,
        "prompts": [{"kind": "self-prompt", "count": 1}],
        "student": {"kind": "pruned", "layers": 2},
        "teacher": [{"model": str(t), "precision": "float32"} for t in teachers],
        "signal": {"kind": "sampled", "tau": 0.02},
    }
    return Recipe.model_validate(fields | changes)


def run_with(root: Path, recipe: Recipe, lengths: list[int]) -> RunDir:
    """A RUN directory that has come as far as its examples: teachers in turn, and one held-out chat."""
    names = [t.name for t in recipe.teachers]
    chats = [chat(i, n, names[i % len(names)]) for i, n in enumerate(lengths)]
    chats.append(chat(99, 12, names[0], split=Split.HELD_OUT))
    templates = dict.fromkeys(names, D)
    write_examples(root / "examples", make_set(chats, tokenizer=D, templates=templates, max_length=999))
    return RunDir(root)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two teachers with one tokenizer."""
    home = tmp_path_factory.mktemp("teachers")
    return tiny.save(home / "one", seed=1), tiny.save(home / "two", seed=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """Small chunks, batches and shards, so that a small set has many of each."""
    monkeypatch.setattr(stage, "CHUNK", 16)
    monkeypatch.setattr(stage, "_BATCH", 150)
    monkeypatch.setattr(stage, "_SHARD_MIN", 40)


def taken(store: SignalStore, *ids: str) -> SampledSignal:
    signal = store.take(ids)
    assert isinstance(signal, SampledSignal)
    return signal


def direct(model: PreTrainedModel, example: Example, shift: int = 1) -> torch.Tensor:
    """Logits [N, V] in float64, from the whole model, `shift` positions before each supervised token."""
    tokens_1T = torch.from_numpy(example.tokens_T.astype(np.int64))[None]
    with torch.no_grad():
        logits_TV = model(input_ids=tokens_1T, use_cache=False).logits[0].double()
    return logits_TV[np.flatnonzero(example.mask_T) - shift]


def entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits_NV).entropy()


# ---- the head


COMMON = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {"vocab_size": 99, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = [
    Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=3.0),
    CohereConfig(**COMMON, logit_scale=0.3),
    GraniteConfig(**COMMON, logits_scaling=7.0),
    MixtralConfig(**COMMON, num_local_experts=2),
    GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    OPTConfig(vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
              word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_the_head_is_the_models_own(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    tokens_BT = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    with torch.no_grad():
        own_BTV = model(input_ids=tokens_BT).logits
        hidden_BTD = hidden_states(model, tokens_BT)
        at = torch.tensor([1, 4, 8])
        assert torch.equal(head_logits(model, hidden_BTD[1]), own_BTV[1])
        torch.testing.assert_close(head_logits(model, hidden_BTD[1, at]), own_BTV[1, at])
        torch.testing.assert_close(head_of(model).logits(hidden_BTD[1, at]), own_BTV[1, at])
        assert torch.equal(model(input_ids=tokens_BT).logits, own_BTV), "the model is as it was"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_head_that_does_something_else_is_refused():
    model = tiny.llama(99)
    model.config.logit_scale = 3.0
    with pytest.raises(ModelError, match=r"scale 3\.0"):
        head_of(model)
    model.get_decoder = lambda: nn.Identity()  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="do not come from"):
        head_logits(model, torch.zeros(2, 32))


# ---- the plan


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 60), st.sampled_from("ab")), max_size=40), st.randoms())
def test_the_plan_depends_on_the_examples_only(kinds, random):
    chats = [chat(i, n, t) for i, (n, t) in enumerate(kinds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_BATCH", 100)
        patch.setattr(stage, "_SHARD_MIN", 30)
        plan = plan_shards(chats, ["b", "a"])
        mixed = random.sample(chats, len(chats))
        assert [[[e.id for e in b] for b in s] for s in plan_shards(mixed, ["b", "a"])] == [
            [[e.id for e in b] for b in s] for s in plan
        ]
    batches = [batch for shard in plan for batch in shard]
    assert sorted(e.id for b in batches for e in b) == sorted(e.id for e in chats)
    for batch in batches:
        assert len({e.teacher for e in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(len(e.tokens_T) for e in batch) <= 100
    size = max(30, sum(e.supervised for e in chats) // stage._SHARDS)
    for shard in plan:
        assert sum(e.supervised for batch in shard[:-1] for e in batch) < size


@given(st.lists(st.integers(0, 3 * head.CHUNK), max_size=8))
def test_chunks_cut_an_example_at_its_own_multiples(counts):
    chunks = list(stage._chunks(counts))
    assert all(sum(size for _, size in chunk) <= head.CHUNK for chunk in chunks)
    pieces = [piece for chunk in chunks for piece in chunk]
    assert pieces == sorted(pieces, key=lambda piece: piece[0])
    for number, count in enumerate(counts):
        sizes = [size for n, size in pieces if n == number]
        assert sum(sizes) == count
        assert all(size == head.CHUNK for size in sizes[:-1])


# ---- the signals


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_signals_are_the_teachers_word_at_the_position_before(teachers, tmp_path, small, temperature):
    """With a tau so small that every token is in the head, the stored distribution is the teacher's up to
    the rounding of the encoding; each example is annotated by the teacher that wrote it."""
    recipe = recipe_for(*teachers, signal={"kind": "sampled", "tau": 1e-4}, train={"temperature": temperature})
    run = run_with(tmp_path, recipe, [30, 12, 45, 20, 7, 33])
    facts = annotate(recipe, run)
    examples = read_examples(run / "examples")
    store = SignalStore.open(run / "signals", expect=signal_key(recipe, examples))
    assert store.manifest.key.temperature == temperature
    step = math.log(store.manifest.key.vocab_size) / 0xFFFF
    stored_entropy = []
    for example in examples.train:
        model = models.load_model(example.teacher, "float32")
        logits_NV = direct(model, example) / temperature
        signal = taken(store, example.id)
        assert len(signal) == store.positions(example.id) == example.supervised
        assert (signal.to_dense() - logits_NV.softmax(1)).abs().max() < COARSEST
        torch.testing.assert_close(signal.entropy_N.double(), entropy(logits_NV), rtol=0, atol=1.01 * step + 1e-5)
        off_by_one = entropy(direct(model, example, shift=0) / temperature)
        assert (signal.entropy_N - off_by_one).abs().mean() > 100 * step, "the test can tell"
        stored_entropy.append(signal.entropy_N)
    assert facts["positions"] == sum(e.supervised for e in examples.train)
    assert facts["entropy_nats"] == pytest.approx(float(torch.cat(stored_entropy).double().mean()))
    assert facts["stored_mass"] == pytest.approx(1, abs=0.02)
    assert examples.held_out[0].id not in store


def test_a_padded_head_is_cut_to_the_tokenizer(tmp_path):
    directory = tiny.save(tmp_path / "teacher")
    words, model = models.load_tokenizer(str(directory)), tiny.llama(320)
    model.resize_token_embeddings(352, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[320:] = 1.0  # pyright: ignore
    model.save_pretrained(directory)
    recipe = recipe_for(directory, signal={"kind": "sampled", "tau": 1e-4})
    run = run_with(tmp_path / "run", recipe, [20, 30])
    annotate(recipe, run)
    (example, *_) = read_examples(run / "examples").train
    signal = taken(SignalStore.open(run / "signals"), example.id)
    assert signal.vocab_size == len(words) == 320
    logits_NV = direct(model.eval(), example)
    assert logits_NV.shape[1] == 352
    torch.testing.assert_close(signal.entropy_N.double(), entropy(logits_NV[:, :320]), rtol=0, atol=2e-4)


def test_a_signal_does_not_depend_on_the_company(teachers):
    model = models.load_model(str(teachers[0]), "float32")
    double = AutoModelForCausalLM.from_pretrained(teachers[0], dtype=torch.float64).eval()
    assert model.dtype == torch.float32
    chats = [chat(i, n, "t") for i, n in enumerate([30, 12, 45, 20])]
    how = SampledCodec(tau=0.02, temperature=1.0, vocab_size=320)
    together = annotate_batch(double, chats, how, seed=3)
    for example, arrays in zip(chats, together, strict=True):
        (alone,) = annotate_batch(double, [example], how, seed=3)
        assert all(np.array_equal(a, b) for a, b in zip(alone, arrays, strict=True))
    (other,) = annotate_batch(double, chats[:1], how, seed=4)
    assert not all(np.array_equal(a, b) for a, b in zip(other, together[0], strict=True))


def test_an_interrupted_stage_goes_on_and_ends_the_same(teachers, tmp_path, small, monkeypatch):
    recipe = recipe_for(*teachers)
    lengths = [30, 12, 45, 20, 27, 33, 50, 28, 40, 22, 60, 35, 55, 41]
    whole, run = (run_with(tmp_path / name, recipe, lengths) for name in ("whole", "killed"))
    shards = annotate(recipe, whole)["shards"]
    assert isinstance(shards, int)
    assert shards > 3
    calls: list[int] = []

    def stopping(model, batch, how, seed):
        calls.append(len(batch))
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return annotate_batch(model, batch, how, seed)

    monkeypatch.setattr(stage, "annotate_batch", stopping)
    facts = None
    for _ in range(shards + 1):
        try:
            facts = annotate(recipe, run)
            break
        except KeyboardInterrupt:
            assert not (run / "signals").exists()
    assert facts is not None
    assert facts["shards_from_an_earlier_attempt"]
    assert manifest(run / "signals") == manifest(whole / "signals")
    done = len(calls)
    assert annotate(recipe, run)["shards_from_an_earlier_attempt"] == shards
    assert len(calls) == done, "finished signals are not made again"


def test_no_more_logits_than_a_chunk(teachers, tmp_path, small, monkeypatch):
    rows: list[int] = []
    monkeypatch.setattr(stage, "head_logits", lambda m, h: rows.append(len(h)) or head_logits(m, h))
    recipe = recipe_for(teachers[0])
    annotate(recipe, run_with(tmp_path, recipe, [60, 90, 30]))
    assert max(rows) == 16
    assert sum(rows) == sum(chat(i, n, "").supervised for i, n in enumerate([60, 90, 30]))


def test_a_text_signal_is_the_answers_tokens(teachers, tmp_path):
    recipe = recipe_for(teachers[0], signal={"kind": "text"}, train={"loss": "cross_entropy"})
    run = run_with(tmp_path, recipe, [30, 12])
    facts = annotate(recipe, run)
    assert [p.name for p in (run / "signals").iterdir()] == ["manifest.json"]
    examples = read_examples(run / "examples")
    signal = SignalStore.open(run / "signals", expect=signal_key(recipe, examples)).take([e.id for e in examples.train])
    assert isinstance(signal, TextSignal)
    assert signal.ids_N.tolist() == [int(t) for e in examples.train for t in e.tokens_T[e.mask_T]]
    assert facts["positions"] == len(signal)
    with pytest.raises(InputError, match="a text signal"):
        audit(run / "signals", recipe, examples)


@pytest.mark.parametrize("changes", [
    {"seed": 4},
    {"signal": {"kind": "sampled", "tau": 0.05}},
    {"train": {"temperature": 2.0}},
    {"teacher": "two"},
    {"signal": {"kind": "text"}, "train": {"loss": "cross_entropy"}},
])  # fmt: skip
def test_another_recipe_has_other_signals(teachers, tmp_path, changes):
    recipe = recipe_for(teachers[0])
    run = run_with(tmp_path, recipe, [30, 12])
    annotate(recipe, run)
    if changes == {"teacher": "two"}:
        changes = {"teacher": {"model": str(teachers[1]), "precision": "float32"}}
    examples = read_examples(run / "examples")
    with pytest.raises(StaleError, match="made from something else"):
        SignalStore.open(run / "signals", expect=signal_key(recipe_for(teachers[0], **changes), examples))
    fewer = ExampleSet(examples.examples[1:], examples.manifest)
    with pytest.raises(StaleError, match=r"key\.examples"):
        SignalStore.open(run / "signals", expect=signal_key(recipe, fewer))


# ---- the audit


def forge(run: RunDir, recipe: Recipe, change) -> None:
    """Put other signals under a manifest that fits: `change` makes them of each example and its own."""
    examples = read_examples(run / "examples")
    key = signal_key(recipe, examples)
    assert key.tau
    model = models.load_model(recipe.teachers[0].model, "float32")
    how = SampledCodec(key.tau, 1.0, key.vocab_size)
    writer = SignalWriter(run / "signals", key, [[Planned(e.id, e.supervised) for e in examples.train]])
    writer.write(0, [change(e, annotate_batch(model, [e], how, key.seed)[0]) for e in examples.train])
    writer.finish()


def test_an_audit_finds_what_a_digest_cannot(teachers, tmp_path):
    recipe = recipe_for(teachers[0])
    run = run_with(tmp_path, recipe, [80, 90, 120])
    examples = read_examples(run / "examples")
    annotate(recipe, run)
    found = audit(run / "signals", recipe, examples, share=1.0)
    assert found.ok, found.problems[:3]
    assert (found.examples, found.positions) == (3, sum(e.supervised for e in examples.train))
    assert 0 < found.head_difference < COARSEST
    assert found.entropy_difference < 1e-4
    assert found.tail_rank == pytest.approx(0.5, abs=0.05)
    assert audit(run / "signals", recipe, examples, share=0.01).examples == 1

    other = models.load_model(str(teachers[1]), "float32")
    how = SampledCodec(0.02, 1.0, 320)
    forge(run, recipe, lambda e, _: annotate_batch(other, [e], how, seed=3)[0])
    problems = audit(run / "signals", recipe, examples, share=1.0).problems
    assert len(problems) > 100, "another teacher's word"

    def shifted(e: Example, _: SampledArrays) -> SampledArrays:
        model = models.load_model(str(teachers[0]), "float32")
        late = Example(e.id, e.tokens_T, np.append(e.mask_T[1:], False), D, "", e.teacher, e.split)
        (arrays,) = annotate_batch(model, [late], how, seed=3)
        return arrays

    forge(run, recipe, shifted)
    assert len(audit(run / "signals", recipe, examples, share=1.0).problems) > 100, "one position too early"

    def random_tail(e: Example, a: SampledArrays) -> SampledArrays:
        ids, at = a.ids.copy(), 0
        random = np.random.default_rng(0)
        for n_head, n_tail in zip(a.n_head.astype(int), a.n_tail.astype(int), strict=True):
            free = np.setdiff1d(np.arange(320), ids[at : at + n_head])
            ids[at + n_head : at + n_head + n_tail] = np.sort(random.choice(free, n_tail, replace=False))
            at += n_head + n_tail
        return a._replace(ids=ids)

    forge(run, recipe, random_tail)
    found = audit(run / "signals", recipe, examples, share=1.0)
    assert "mean rank" in found.problems[-1].where
    assert found.tail_rank < 0.45
