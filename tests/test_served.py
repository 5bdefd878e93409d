"""Signals that a server says: exactly its distribution, never paid for twice, and never a number it did not say."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing

import forked
import numpy as np
import pytest
import served
from command import call
from conftest import prompt_file, recipe_dict
from served import LENGTHS, SERVER, SIZE, attempted, recipe_for, run_with

import limbeck
from limbeck.collect.journal import Journal
from limbeck.errors import EndpointError, InputError, RecipeError, StaleError
from limbeck.ledger.canonical import manifest
from limbeck.preflight import preflight
from limbeck.recipe import Recipe
from limbeck.render.examples import read_examples
from limbeck.signal import endpoint
from limbeck.signal.annotate import annotate, signal_key
from limbeck.signal.audit import audit
from limbeck.signal.store import SignalStore
from limbeck.signal.types import TopKSignal
from limbeck.testing import Server, Settings


def taken(store: SignalStore, *ids: str) -> TopKSignal:
    found = store.take(ids)
    assert isinstance(found, TopKSignal)
    return found


pytestmark = pytest.mark.usefixtures("quick_asking")


@pytest.mark.parametrize("ask", ["prompt_logprobs", "echo"])
def test_what_is_stored_is_what_the_server_says(toy_teacher, tmp_path, ask):
    """The oracle is the distribution that the test server declares, sorted by numpy."""
    with Server(SERVER) as server:
        recipe = recipe_for(toy_teacher, server.url + "/v1", ask=ask)
        run = run_with(tmp_path, recipe, LENGTHS)
        facts = annotate(recipe, run)
        assert server.bill.requests == len(LENGTHS)
        assert annotate(recipe, run)["positions"] == facts["positions"]
        assert server.bill.requests == len(LENGTHS), "finished signals are not asked for again"
        examples = read_examples(run / "examples")
        store = SignalStore.open(run / "signals", expect=signal_key(recipe, examples), examples=examples.train)
        for example in examples.train:
            found = taken(store, example.id)
            places = np.flatnonzero(example.mask_T)
            assert len(found) == len(places)
            for row, place in enumerate(places):
                log_V = np.array(server.distribution(example.tokens_T[:place].tolist()))
                best = np.argsort(-log_V)[:7]
                assert found.ids_NK[row].tolist() == best.tolist()
                np.testing.assert_allclose(found.log_probs_NK[row], log_V[best], atol=1e-6)
                assert float(found.tail_mass_N[row]) == pytest.approx(1 - np.exp(log_V[best]).sum(), abs=1e-6)
    said = {"id": "toy", "owned_by": "limbeck"}
    told = {"base_url": recipe.signal.server.base_url, "model": "toy", "ask": ask, "said": said, "answered": "toy"}
    assert facts["server"] == told
    assert store.manifest.key.teachers == {}
    with Journal(run / "journal.db") as journal:
        assert len(journal) == len(LENGTHS)
    with pytest.raises(InputError, match="toy at http"):
        audit(run / "signals", recipe, examples)


def test_the_prompts_own_token_beyond_k_is_no_entry(toy_teacher, tmp_path):
    """Of random tokens hardly any is among the 7 likeliest, so nearly every row has 8 entries."""
    with Server(SERVER) as server:
        recipe = recipe_for(toy_teacher, server.url + "/v1")
        run = run_with(tmp_path, recipe, [60])
        annotate(recipe, run)
    (example,) = read_examples(run / "examples").train
    found = taken(SignalStore.open(run / "signals"), example.id)
    own = np.asarray(example.tokens_T)[example.mask_T]
    assert np.mean((found.ids_NK.numpy() == own[:, None]).any(axis=1)) < 0.3


def test_another_server_or_another_model_is_another_signal(toy_teacher, tmp_path, monkeypatch):
    with Server(SERVER) as server:
        recipe = recipe_for(toy_teacher, server.url + "/v1")
        run = run_with(tmp_path, recipe, [30, 12])
        annotate(recipe, run)
        examples = read_examples(run / "examples")
        for changes in ({"model": "other"}, {"ask": "echo"}, {"k": 6}):
            other = recipe_for(toy_teacher, server.url + "/v1", **changes)
            with pytest.raises(StaleError, match=r"key\.(server|k)"):
                SignalStore.open(run / "signals", expect=signal_key(other, examples))

        async def identity(self):
            return {"id": "toy", "root": "another-model"}

        monkeypatch.setattr(endpoint.Endpoint, "identity", identity)
        (run / "signals" / "manifest.json").unlink()
        annotate(recipe, run)
        assert server.bill.requests == 4, "the answers of the model before it do not count"


def test_a_killed_stage_sends_nothing_twice_but_what_was_in_flight(toy_teacher, tmp_path):
    lengths = [20 + i % 17 for i in range(40)]
    with Server(SERVER.model_copy(update={"delay": 0.05})) as server:
        recipe = recipe_for(toy_teacher, server.url + "/v1")
        whole, run = (run_with(tmp_path / name, recipe, lengths) for name in ("whole", "killed"))
        for stop in (7, 19):
            process = forked.start(served.work, toy_teacher, server.url + "/v1", run.root)
            while server.bill.requests < stop:
                assert process.is_alive(), "it ended before it was killed"
                time.sleep(0.005)
            process.kill()
            process.join()
            assert not (run / "signals").exists()
        annotate(recipe, run)
        sent = server.bill.requests
        assert len(lengths) <= sent <= len(lengths) + 2 * 4, "4 in flight at each of two kills"
        with Journal(run / "journal.db") as journal:
            assert len(journal) == len(lengths)
            assert journal.refused == 0
        annotate(recipe, whole)
        assert server.bill.requests == sent + len(lengths)
    assert manifest(run / "signals") == manifest(whole / "signals")


def test_no_more_are_in_flight_than_the_recipe_says(toy_teacher, tmp_path, monkeypatch):
    flying, most, complete = 0, 0, endpoint.Endpoint.complete

    async def counted(self, body, what):
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        try:
            return await complete(self, body, what)
        finally:
            flying -= 1

    monkeypatch.setattr(endpoint.Endpoint, "complete", counted)
    with Server(SERVER.model_copy(update={"delay": 0.02})) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server, concurrency=3)
        annotate(recipe, run)
    assert most == 3


# ---- keys and recipes


def test_a_key_comes_from_the_environment_and_is_written_nowhere(toy_teacher, tmp_path, monkeypatch):
    key = "sk-only-in-the-environment"
    monkeypatch.setenv("SERVED_KEY", key)
    with Server(Settings(vocabulary=SIZE, api_keys=(key,))) as server:
        recipe, run = attempted(toy_teacher, tmp_path, server, api_key_env="SERVED_KEY")
        annotate(recipe, run)
        files = [p for p in run.root.rglob("*") if p.is_file()]
        assert len(files) > 3
        assert all(key.encode() not in p.read_bytes() for p in files)
        with closing(sqlite3.connect(run / "journal.db")) as db:
            rows = [row for (row,) in db.execute("SELECT key FROM answers")]
        with Journal(run / "journal.db") as journal:
            kept = [journal.get(row) for row in rows]
        assert len(kept) == len(LENGTHS)
        assert all(key.encode() not in one.request + one.raw for one in kept)
        monkeypatch.setenv("SERVED_KEY", "sk-a-wrong-one")
        (run / "signals" / "manifest.json").unlink()
        with pytest.raises(EndpointError, match="401") as caught:
            annotate(recipe, run)
        assert "sk-a-wrong-one" not in str(caught.value)
    monkeypatch.delenv("SERVED_KEY")
    with pytest.raises(EndpointError, match="SERVED_KEY is not set"):
        annotate(recipe, run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signal": {"server": {"api_key_env": "NO_SUCH_KEY"}}}, "NO_SUCH_KEY is not set"),
        ({"train": {"temperature": 2.0}}, "without the tail they cannot be softened"),
        ({"train": {"allow_biased": False}}, "biased"),
    ],
)
def test_preflight_refuses_what_a_server_cannot_give(toy_teacher, tmp_path, changes, words):
    base = recipe_dict(toy_teacher, prompt_file(tmp_path / "prompts.jsonl", 12))
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "toy"} | changes.get("signal", {}).get("server", {})
    base |= {"signal": {"kind": "top_k", "k": 7, "server": server}}
    base["train"] = {"allow_biased": True} | changes.get("train", {})
    with pytest.raises(RecipeError, match=words):
        preflight(Recipe.model_validate(base))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://me:secret@host/v1", "ftp://host"])
def test_an_address_with_a_password_or_none_at_all_is_refused(toy_teacher, url):
    with pytest.raises(ValueError, match="base_url"):
        recipe_for(toy_teacher, url)


def test_a_student_learns_from_a_server_and_everybody_is_told_of_the_bias(toy_teacher, tmp_path):
    with Server(SERVER) as server:
        base = recipe_dict(toy_teacher, prompt_file(tmp_path / "prompts.jsonl", 20))
        base["signal"] = {"kind": "top_k", "k": 20, "server": {"base_url": server.url + "/v1", "model": "toy"}}
        base["train"] |= {"allow_biased": True}
        run = limbeck.run(Recipe.model_validate(base), tmp_path / "run").root
    training = json.loads((run / "training.json").read_text())
    (term,) = training["biased"]
    assert (term["term"], term["signal"]) == ("forward_kl", "top_k")
    assert "one bucket" in term["why"]
    first, last = training["steps"][0]["loss"], training["steps"][-1]["loss"]
    assert 0 < last < first, "it learned from what the server said"
    report, card = (run / "report.html").read_text(), (run / "student" / "README.md").read_text()
    assert "not exactly the loss that is named" in report
    assert "was said by a server, toy at http://127.0.0.1" in report
    assert "blind to how the student spreads its tail" in report
    assert "training loss was biased" in card
    assert "blind to how the student spreads its tail" in card
    assert "top-k, k 20" in card.replace("\\", "")
    told = call("ledger", "verify", run)
    assert told.exit_code == 0, told.output


def test_teacher_and_probabilities_may_both_come_from_servers(toy_teacher, tmp_path):
    """No teacher's weights are here: one endpoint writes the answers, the completions of the same server judge them."""
    with Server(SERVER.model_copy(update={"words": 12})) as server:
        address = server.url + "/v1"
        base = recipe_dict(toy_teacher, prompt_file(tmp_path / "prompts.jsonl", 20))
        base["teacher"] = {"kind": "openai", "base_url": address, "model": "toy", "terms": "own-model"}
        base["student"] = {"kind": "pretrained", "model": str(toy_teacher)}
        base["signal"] = {"kind": "top_k", "k": 20, "server": {"base_url": address, "model": "toy"}}
        base["train"] |= {"allow_biased": True}
        run = limbeck.run(Recipe.model_validate(base), tmp_path / "run", until="train").root
    examples = read_examples(run / "examples")
    recipe = Recipe.model_validate(base)
    store = SignalStore.open(run / "signals", expect=signal_key(recipe, examples), examples=examples.train)
    assert store.manifest.counts.examples == len(examples.train) > 5
    steps = json.loads((run / "training.json").read_text())["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"]
