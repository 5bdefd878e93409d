"""A stored top-k signal: the teacher's likeliest tokens and the mass of the rest, bit for bit, from end to end."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from command import call, python
from conftest import prompt_file, recipe_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annotate import chat, direct, recipe_for, run_with, small, teachers  # noqa: F401 - fixtures
from test_store import KEY, plan_of

import limbeck
from limbeck import models
from limbeck.errors import InputError, RecipeError, StaleError
from limbeck.ledger.canonical import manifest
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal import annotate as stage
from limbeck.signal.annotate import annotate, annotate_batch, signal_key
from limbeck.signal.audit import audit
from limbeck.signal.store import Planned, SignalStore, SignalWriter
from limbeck.signal.top_k import TopKArrays, TopKCodec
from limbeck.signal.types import TopKSignal, concat
from limbeck.train.pairing import signal_loss

TOP = KEY.model_copy(update={"kind": "top_k", "tau": None, "k": 4})
SIGNAL = {"signal": {"kind": "top_k", "k": 12}, "train": {"allow_biased": True}}


def random_signal(n: int, seed: int, codec: TopKCodec) -> TopKSignal:
    stream = torch.Generator().manual_seed(seed)
    return codec.from_logits(3 * torch.randn(n, codec.vocab_size, generator=stream), stream)


def same(a: TopKSignal, b: TopKSignal) -> bool:
    names = ("ids_NK", "log_probs_NK", "tail_mass_N")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and a.temperature == b.temperature


def taken(store: SignalStore, *ids: str) -> TopKSignal:
    signal = store.take(ids)
    assert isinstance(signal, TopKSignal)
    return signal


sizes_of_shards = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(sizes_of_shards, st.data())
@pytest.mark.parametrize(("vocab_size", "k"), [(50, 4), (50, 50), (70_000, 1)])
def test_take_gives_back_to_the_bit_what_went_in(vocab_size, k, sizes, data):
    key = TOP.model_copy(update={"vocab_size": vocab_size, "k": k, "temperature": 1.5})
    codec, stream = TopKCodec.of(key), torch.Generator()
    with tempfile.TemporaryDirectory() as home:
        plan = plan_of(sizes)
        inside = {p.id: random_signal(p.positions, i, codec) for i, p in enumerate(p for s in plan for p in s)}
        writer = SignalWriter(Path(home) / "signals", key, plan)
        for number in writer.unwritten():
            writer.write(number, [codec.encode([inside[p.id]], stream) for p in plan[number]])
        counts = writer.finish().counts
        store = SignalStore.open(Path(home) / "signals", expect=key)
        asked = data.draw(st.lists(st.sampled_from(sorted(inside)), max_size=6))
        found = taken(store, *asked)
        assert (found.vocab_size, found.temperature, found.ids_NK.shape[1]) == (vocab_size, 1.5, k)
        assert same(found, concat([inside[i] for i in asked])) if asked else len(found) == 0
        assert counts.entries == k * counts.positions
        shards = [s for s in store.shards() if isinstance(s, TopKSignal)]
        assert same(concat(shards), concat(list(inside.values())))


def test_numbers_that_have_no_round_bits_come_back_too():
    codec = TopKCodec(3, 1.0, 1 << 24)
    odd = np.array([[-0.0, -1e-45, -3e38], [-math.pi, -np.float32(2**-149), -math.inf]], np.float32)
    arrays = TopKArrays(np.array([[0, 1, (1 << 24) - 1], [5, 3, 4]], np.int32), odd, np.array([1e-45, 0], np.float32))
    back = codec.unpack(codec.pack([arrays]))
    assert back.log_probs.tobytes() == odd.tobytes()
    assert all(np.array_equal(a, b) for a, b in zip(back, arrays, strict=True))


def test_a_damaged_block_is_refused():
    codec = TopKCodec(3, 1.0, 300)
    block = codec.pack([codec.encode([random_signal(5, 0, codec)], torch.Generator())])
    for wrong in (block._replace(entries=14), block._replace(positions=6), block._replace(planes=block.planes[:-1])):
        with pytest.raises(StaleError, match="damaged"):
            codec.unpack(wrong)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_stored_is_what_the_teacher_says(teachers, tmp_path, small, temperature):  # noqa: F811
    """The oracle: the whole model, log_softmax in float64, sorted by numpy."""
    recipe = recipe_for(*teachers, **SIGNAL | {"train": {"temperature": temperature, "allow_biased": True}})
    run = run_with(tmp_path, recipe, [30, 12, 45, 20])
    facts = annotate(recipe, run)
    examples = read_examples(run / "examples")
    store = SignalStore.open(run / "signals", expect=signal_key(recipe, examples), examples=examples.train)
    masses = []
    for example in examples.train:
        model = models.load_model(example.teacher, "float32")
        log_NV = (direct(model, example) / temperature).log_softmax(dim=1).numpy()
        signal = taken(store, example.id)
        best_NK = np.argsort(-log_NV, axis=1)[:, :12]
        np.testing.assert_array_equal(signal.ids_NK, best_NK)
        listed_NK = np.take_along_axis(log_NV, best_NK, axis=1)
        np.testing.assert_allclose(signal.log_probs_NK, listed_NK, atol=1e-5)
        np.testing.assert_allclose(signal.tail_mass_N, 1 - np.exp(listed_NK).sum(axis=1), atol=1e-6)
        off_by_one = (direct(model, example, shift=0) / temperature).argmax(dim=1)
        assert (signal.ids_NK[:, 0] == off_by_one).float().mean() < 0.5, "the test can tell"
        masses.append(1 - signal.tail_mass_N.double())
    assert facts["kind"] == "top_k"
    assert (facts["k"], facts["temperature"], facts["entries_a_position"]) == (12, temperature, 12)
    assert facts["stored_mass"] == pytest.approx(float(torch.cat(masses).mean()))


def test_an_interrupted_stage_ends_the_same_to_the_byte(teachers, tmp_path, small, monkeypatch):  # noqa: F811
    recipe = recipe_for(*teachers, **SIGNAL)
    lengths = [30, 12, 45, 20, 27, 33, 50, 28, 40, 22, 60, 35]
    whole, run = (run_with(tmp_path / name, recipe, lengths) for name in ("whole", "killed"))
    annotate(recipe, whole)
    calls: list[int] = []

    def stopping(model, batch, codec, seed):
        calls.append(len(batch))
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return annotate_batch(model, batch, codec, seed)

    monkeypatch.setattr(stage, "annotate_batch", stopping)
    for _ in range(20):
        try:
            annotate(recipe, run)
            break
        except KeyboardInterrupt:
            assert not (run / "signals").exists()
    digests = [manifest(path / "signals") for path in (whole, run)]
    assert digests[0] == digests[1]


def test_the_loss_of_a_stored_signal_is_a_lower_bound_that_no_tail_escapes(teachers, tmp_path):  # noqa: F811
    """Against float64 over k + 1 outcomes, and below the KL over the whole vocabulary (data-processing inequality)."""
    recipe = recipe_for(teachers[0], **SIGNAL)
    run = run_with(tmp_path, recipe, [40, 40])
    annotate(recipe, run)
    examples = read_examples(run / "examples")
    store = SignalStore.open(run / "signals")
    for example in examples.train:
        log_p = direct(models.load_model(str(teachers[0]), "float32"), example).log_softmax(dim=1)
        log_q = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(0)).double().log_softmax(dim=1)
        best = log_p.topk(12, dim=1).indices
        p, q = log_p.exp().gather(1, best), log_q.exp().gather(1, best)
        p, q = (torch.cat([x, 1 - x.sum(dim=1, keepdim=True)], dim=1) for x in (p, q))
        coarse = (p * (p / q).log()).sum(dim=1)
        got = signal_loss(log_q, store.take([example.id]), loss="forward_kl", allow_biased=True)
        torch.testing.assert_close(got.double(), coarse, atol=1e-5, rtol=1e-4)
        assert (got <= (log_p.exp() * (log_p - log_q)).sum(dim=1) + 1e-5).all()


# ---- the audit


def test_an_audit_finds_another_teacher_a_shift_and_a_token_left_out(teachers, tmp_path):  # noqa: F811
    recipe = recipe_for(teachers[0], **SIGNAL)
    run = run_with(tmp_path, recipe, [80, 90, 120])
    examples = read_examples(run / "examples")
    annotate(recipe, run)
    found = audit(run / "signals", recipe, examples, share=1.0)
    assert found.ok, found.problems[:3]
    assert (found.examples, found.positions) == (3, sum(e.supervised for e in examples.train))
    assert found.head_difference < 1e-6
    assert math.isnan(found.entropy_difference)

    key, whole = signal_key(recipe, examples), SignalStore.open(run / "signals")
    codec, inside = TopKCodec.of(key), {e.id: taken(whole, e.id) for e in examples.train}

    def forged(change) -> list[str]:
        plan = [[Planned(e.id, e.supervised) for e in examples.train]]
        writer = SignalWriter(run / "signals", key, plan)
        writer.write(0, [codec.encode([change(inside[e.id])], torch.Generator()) for e in examples.train])
        writer.finish()
        return [str(p) for p in audit(run / "signals", recipe, examples, share=1.0).problems]

    def left_out(signal: TopKSignal) -> TopKSignal:
        ids, log_probs = signal.ids_NK.clone(), signal.log_probs_NK
        ids[7, 0] = next(i for i in range(320) if i not in ids[7])
        return TopKSignal(ids, log_probs, signal.tail_mass_N, signal.vocab_size)

    def wrong_tail(signal: TopKSignal) -> TopKSignal:
        return TopKSignal(signal.ids_NK, signal.log_probs_NK, signal.tail_mass_N * 1.01, signal.vocab_size)

    assert forged(lambda s: s) == []
    problems = forged(left_out)
    assert any("position 7: token" in p and "not stored" in p for p in problems)
    assert len(forged(lambda s: s.index_select(torch.arange(len(s)).roll(1)))) > 100, "one position too early"
    tails = forged(wrong_tail)
    assert len(tails) > 100
    assert all("the tail" in p for p in tails)


def test_what_cannot_be_audited_says_why(teachers, tmp_path):  # noqa: F811
    for signal, loss, why in (("text", "cross_entropy", "own tokens"), ("hidden", "forward_kl", "nothing is stored")):
        recipe = recipe_for(teachers[0], signal={"kind": signal}, train={"loss": loss})
        run = run_with(tmp_path / signal, recipe, [30, 12])
        annotate(recipe, run)
        with pytest.raises(InputError, match=why):
            audit(run / "signals", recipe, read_examples(run / "examples"))


# ---- recipes and runs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {}}, "biased: the tail is one bucket"),
        ({"signal": {"kind": "top_k", "k": 321}}, "signal.k"),
        ({"train": {"allow_biased": True, "loss": {"name": "forward_kl", "temperature": 2}}}, "one temperature"),
    ],
)
def test_preflight_refuses(teacher_dir, tmp_path, changes, words):
    recipe = Recipe.model_validate(
        recipe_dict(teacher_dir, prompt_file(tmp_path / "prompts.jsonl", 12)) | SIGNAL | changes
    )
    with pytest.raises(RecipeError, match=words):
        preflight(recipe)


def test_verify_audits_a_run_and_says_so(teacher_dir, tmp_path):
    """A run with a local top-k signal, then one whose ledger is right about files that are wrong."""
    base = recipe_dict(teacher_dir, prompt_file(tmp_path / "prompts.jsonl", 20)) | {"signal": SIGNAL["signal"]}
    base["train"] = base["train"] | SIGNAL["train"]
    root = limbeck.run(Recipe.model_validate(base), tmp_path / "run").root
    training = json.loads((root / "training.json").read_text())
    assert training["biased"][0]["signal"] == "top_k"
    assert training["steps"][-1]["loss"] < training["steps"][0]["loss"]

    told = call("ledger", "verify", root, "--audit", "--audit-share", 1)
    assert told.exit_code == 0, told.output
    assert "audited against the teacher: nothing differs" in told.output
    result = json.loads(call("ledger", "verify", root, "--audit", "--json").output)
    assert result["ok"]
    assert result["audit"]["examples"] == 1
    assert result["audit"]["entropy_difference"] is None
    assert call("ledger", "verify", root, "--audit", "--audit-share", 2).exit_code == 2

    recipe, examples = RunDir(root).recipe(), read_examples(root / "examples")
    key, store = signal_key(recipe, examples), SignalStore.open(root / "signals")
    codec, plan = TopKCodec.of(key), [[Planned(e.id, e.supervised) for e in examples.train]]
    inside = {e.id: taken(store, e.id) for e in examples.train}
    writer = SignalWriter(root / "signals", key, plan)
    turned = {p.id: inside[p.id].index_select(torch.arange(p.positions).flip(0)) for p in plan[0]}
    writer.write(0, [codec.encode([turned[p.id]], torch.Generator()) for p in plan[0]])
    writer.finish()
    told = call("ledger", "verify", root, "--audit", "--audit-share", 1, "--json")
    assert told.exit_code == 1
    result = json.loads(told.output)
    assert not result["ok"]
    assert len(result["audit"]["problems"]) > 100
    (shard,) = (root / "signals").glob("0*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    told = call("ledger", "verify", root, "--audit")
    assert told.exit_code == 1
    assert "NOT audited" in told.output


def test_verify_refuses_to_audit_text(teacher_dir, tmp_path):
    base = recipe_dict(teacher_dir, prompt_file(tmp_path / "prompts.jsonl", 12)) | {"signal": {"kind": "text"}}
    base["train"] = base["train"] | {"loss": "cross_entropy"}
    limbeck.run(Recipe.model_validate(base), tmp_path / "run", until="annotate")
    assert call("ledger", "verify", tmp_path / "run").exit_code == 0
    told = call("ledger", "verify", tmp_path / "run", "--audit")
    assert told.exit_code == 2
    assert "the answers' own tokens" in told.output


def test_verifying_without_an_audit_needs_no_torch(tmp_path):
    root = runs.make_run(tmp_path / "run")
    code = (
        "import sys; sys.argv = ['limbeck', 'ledger', 'verify', sys.argv[1]]\n"
        "from limbeck.cli import app\n"
        "try:\n    app()\nexcept SystemExit as e:\n    print(e.code, 'torch' in sys.modules)\n"
    )
    assert python(code, root).stdout.split()[-2:] == ["0", "False"]
