"""Top-k signals out of the log-probabilities that came with the answers, against the test server's own distribution."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import asking
import numpy as np
import pytest
import served
import tiny
import torch
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import limbeck
from limbeck.cli.show import as_text, standing
from limbeck.collect.endpoints.logprobs import Piece, read_logprobs
from limbeck.collect.journal import Journal
from limbeck.errors import InputError, ModelError
from limbeck.export.words import from_the_words
from limbeck.ledger import verify
from limbeck.recipe import Recipe
from limbeck.records import Completion
from limbeck.render.examples import read_examples
from limbeck.rundir import RunDir
from limbeck.signal.annotate import annotate, signal_key
from limbeck.signal.answers import Wrong
from limbeck.signal.store import SignalStore
from limbeck.signal.told import Vocabulary, text_signal
from limbeck.signal.types import TopKSignal
from limbeck.tables import read_records
from limbeck.testing import Server, Settings
from limbeck.train.losses import LOSSES
from limbeck.train.pairing import signal_loss

SETTINGS = Settings(words=9, vocabulary=served.SIZE)
K = 6


def tokenizer() -> PreTrainedTokenizerFast:
    """The toy vocabulary, cut as the server cuts it: words of four letters are one token."""
    words = served.tokenizer()
    saved = json.loads(words.backend_tokenizer.to_str())
    saved["model"]["ignore_merges"] = True
    core = Tokenizer.from_str(json.dumps(saved))
    pieces = pre_tokenizers.Split(Regex(r" ?[a-z]{4}(?![a-z])|[\s\S]"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=served.START, eos_token=served.END, pad_token=served.PAD, model_max_length=512
    )
    made.chat_template = words.chat_template
    return made


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("student") / "model"
    tiny.llama(served.SIZE).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def recipe(server: Server, root: Path, student: Path, *, api: str = "chat", **more: Any) -> Recipe:
    path = root / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asking.questions(9)))
    signal = {"kind": "top_k", "k": K, "source": "answers"} | more.pop("signal", {})
    return Recipe.model_validate(
        {
            "name": "told",
            "teacher": {"kind": "openai", "base_url": f"{server.url}/v1", "model": "toy", "api": api,
                        "terms": "own-model", **more.pop("teacher", {})},
            "prompts": [{"kind": "file", "path": str(path), "licence": "MIT"}],
            "collect": {"max_tokens": 64, "concurrency": 4, "logprobs": K + 2, **more.pop("collect", {})},
            "student": {"kind": "pretrained", "model": str(student)},
            "signal": signal,
            "train": {"loss": "forward_kl", "allow_biased": True, "batch_size": 4, "epochs": 1, "precision": "float32"},
            "evaluate": {"held_out": 2, "answers": 0},
            **more,
        }
    )  # fmt: skip


def signals(run: RunDir, made: Recipe) -> tuple[list[Any], SignalStore]:
    examples = read_examples(run / "examples")
    store = SignalStore.open(run / "signals", expect=signal_key(made, examples), examples=examples.train)
    return examples.train, store


@pytest.mark.parametrize("form", ["openai", "llama.cpp", "responses"])
def test_every_position_holds_what_the_server_said_there(tmp_path: Path, student: Path, form: str):
    settings = SETTINGS.model_copy(update={"token_ids": form == "llama.cpp"})
    with Server(settings) as server:
        made = recipe(server, tmp_path, student, api="responses" if form == "responses" else "chat")
        limbeck.run(made, tmp_path / "run", until="annotate")
        run = RunDir(tmp_path / "run")
        examples, store = signals(run, made)
        completions = {c.id: c for c in read_records(run / "completions.parquet", Completion)}
        with Journal(run / "journal.db") as journal:
            for example in examples:
                asked = json.loads(journal.get(completions[example.completion].request_id).request)["body"]
                before = server.context({"model": "toy", "messages": asked.get("messages") or asked["input"]})
                signal = store.take([example.id])
                assert isinstance(signal, TopKSignal)
                own = example.tokens_T[example.mask_T]
                for place, number in enumerate(own[:-1]):
                    p_V = np.asarray(server.distribution([*before, *map(int, own[:place])]))
                    best = np.argsort(-p_V, kind="stable")[:K]
                    assert signal.ids_NK[place].tolist() == best.tolist()
                    np.testing.assert_allclose(signal.log_probs_NK[place], p_V[best], rtol=1e-6)
                    tail = 1 - np.exp(p_V[best]).sum()
                    np.testing.assert_allclose(signal.tail_mass_N[place], tail, rtol=1e-5, atol=1e-6)
                    assert number != 0
                # What ends the turn is written by the teacher and told by nobody: its own token, and nothing else.
                assert int(signal.ids_NK[-1, 0]) == int(own[-1])
                assert signal.log_probs_NK[-1].exp().tolist() == [1.0] + [0.0] * (K - 1)
    assert len(examples) == 6
    facts = annotate(made, run)
    assert facts["from_the_words"] == pytest.approx(len(examples) / sum(e.supervised for e in examples))
    assert (facts["source"], facts["unmatched"]) == ("answers", "refuse")


def test_a_student_learns_from_them_and_the_evidence_holds(tmp_path: Path, student: Path):
    with Server(SETTINGS) as server:
        made = recipe(server, tmp_path, student)
        limbeck.run(made, tmp_path / "run")
        assert server.bill.requests == 9
    assert verify(tmp_path / "run").ok, verify(tmp_path / "run").differences
    steps = json.loads((tmp_path / "run" / "training.json").read_text())["steps"]
    assert steps
    assert all(math.isfinite(step["loss"]) for step in steps)


def test_tokens_of_another_tokenizer_are_refused_or_learned_from_the_words(tmp_path: Path):
    other = tiny.save(tmp_path / "other", layers=1)
    with Server(SETTINGS) as server:
        made = recipe(server, tmp_path, other)
        with pytest.raises(ModelError, match="no log-probabilities of the student's tokens") as error:
            limbeck.run(made, tmp_path / "a")
        assert not (tmp_path / "a" / "signals").exists()
        assert {p.remedy for p in error.value.problems} == {
            "take a student with the teacher's tokenizer and chat template, or set signal.unmatched: text"
        }
        made = recipe(server, tmp_path, other, signal={"unmatched": "text"})
        limbeck.run(made, tmp_path / "b")
    run = RunDir(tmp_path / "b")
    examples, store = signals(run, made)
    for example in examples:
        signal = store.take([example.id])
        assert signal.ids_NK[:, 0].tolist() == example.tokens_T[example.mask_T].tolist()
    assert annotate(made, run)["from_the_words"] == 1.0
    told = "ll that it learned from is the words alone: at 100.0 % of the places"
    card, page = ((run / name).read_text(encoding="utf-8") for name in ("student/README.md", "report.html"))
    for text in (card, page, as_text(standing(run.root), facts=False)):
        assert told in " ".join(text.split())
    # What the timeline says of the rows, which are sealed before the gate is asked.
    assert "gate not asked" not in page
    assert "rows are sealed before the terms gate rules on all of them" in page


@pytest.mark.parametrize(
    ("share", "said"), [(0.02, "A part of what"), (0.5, "A part of"), (0.51, "Most of what"), (1.0, "All that")]
)
def test_what_was_learned_from_the_words_is_told(share: float, said: str):
    assert from_the_words({"unmatched": "text", "from_the_words": share}).startswith(said)
    assert f"at {100 * share:.1f}" in from_the_words({"unmatched": "text", "from_the_words": share})
    # Without it only what ends a turn is, which no server tells.
    assert from_the_words({"unmatched": "refuse", "from_the_words": share}) == ""
    assert from_the_words({"unmatched": "text", "from_the_words": 1}).startswith("All")  # as the ledger gives 1.0 back
    assert from_the_words({"unmatched": "text"}) == from_the_words({}) == ""


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"cross_entropy"}))
def test_all_mass_on_the_token_that_stands_there_is_cross_entropy(loss: str):
    torch.manual_seed(0)
    logits_NV = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
    own = [0, 3, 39, 7, 7]
    found_N = signal_loss(logits_NV, text_signal(own, K, 40), loss=loss, allow_biased=True)
    if loss == "forward_kl":
        expected_N = torch.nn.functional.cross_entropy(logits_NV, torch.tensor(own), reduction="none")
        torch.testing.assert_close(found_N, expected_N)
    if loss == "reverse_kl":  # infinite by its definition: the student has mass where the teacher has none
        return
    found_N.sum().backward()
    assert torch.isfinite(logits_NV.grad).all()


def answer(*tokens: dict[str, Any]) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "x"}, "logprobs": {"content": list(tokens)}}]}).encode()


def test_what_servers_say_is_read_in_all_their_ways():
    plain = {
        "token": "a",
        "bytes": [97],
        "logprob": -0.5,
        "top_logprobs": [{"token": "b", "bytes": None, "logprob": -2}],
    }
    found = read_logprobs(answer(plain))
    assert found is not None
    assert found[0].own == Piece(None, b"a", "a", -0.5)
    assert found[0].top == (Piece(None, b"b", "b", -2.0),)
    llama = read_logprobs(answer({"id": 7, **plain}))
    assert llama is not None
    assert llama[0].own == Piece(7, b"a", "a", -0.5)
    vllm = read_logprobs(answer({"token": "token_id:7", "bytes": [1], "logprob": 0, "top_logprobs": []}))
    assert vllm is not None
    assert vllm[0].own == Piece(7, None, "token_id:7", 0.0)
    broken = read_logprobs(answer({"token": "\ufffd", "bytes": None, "logprob": 0}))
    assert broken is not None
    assert broken[0].own.data is None
    for wrong in (b"", b"[]", answer(), answer({"token": "a"}), answer({**plain, "top_logprobs": [{"token": "a"}]})):
        assert read_logprobs(wrong) is None


def test_a_token_is_ours_only_if_all_that_is_known_of_it_agrees():
    ours = Vocabulary(tokenizer())
    word = tokenizer().encode(" batu", add_special_tokens=False)
    assert len(word) == 1
    data = b" batu"
    assert ours.id_of(Piece(None, data, " batu", 0)) == word[0]
    assert ours.id_of(Piece(word[0], data, " batu", 0)) == word[0]
    assert ours.id_of(Piece(None, b"\xe2", "bytes:\\xe2", 0)) == 0xE2
    assert not ours.is_(Piece(word[0] + 1, data, " batu", 0), word[0])
    for wrong in (Piece(word[0] + 1, data, "", 0), Piece(9999, None, "", 0), Piece(None, b"no token", "", 0),
                  Piece(None, None, "\ufffd", 0)):  # fmt: skip
        with pytest.raises(Wrong):
            ours.id_of(wrong)


def test_what_cannot_be_asked_so_is_said_before_anything_is_spent(tmp_path: Path, student: Path):
    with Server(SETTINGS) as server:
        for more, where in (
            ({"collect": {"logprobs": None}}, "collect.logprobs"),
            ({"collect": {"logprobs": K - 1}}, "collect.logprobs"),
            ({"signal": {"k": 1}}, "signal.k"),
            ({"signal": {"server": {"base_url": server.url, "model": "toy"}}}, "signal.server"),
        ):
            with pytest.raises(InputError) as error:
                limbeck.run(recipe(server, tmp_path, student, **more), tmp_path / "run")
            assert where in {p.where for p in error.value.problems}
        biased = recipe(server, tmp_path, student, train={"loss": "forward_kl"})
        with pytest.raises(InputError) as error:
            limbeck.run(biased, tmp_path / "run")
        assert [p.remedy for p in error.value.problems] == [
            "set allow_biased: true beside the loss, which the report then states"
        ]
        assert server.bill.received == 0
    source = {"kind": "file", "path": "p.jsonl"}
    with pytest.raises(ValidationError, match=r"collect\.logprobs"):
        asking.made(server.url, source, kind="anthropic", logprobs=3)
