"""Collecting with a local teacher: every answer once, in the journal first, the same whatever interrupts
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked
import pytest
import talker
import tiny
import torch
from talker import completions, gathered, own, prompts, prompts_file, recipe, teacher_of
from transformers import AutoModelForCausalLM

from limbeck import models
from limbeck.collect import local
from limbeck.collect.collect import collect
from limbeck.collect.journal import Journal
from limbeck.collect.local import LocalAnswer
from limbeck.collect.prompts import gather
from limbeck.collect.teachers import Answer, Request, make_teacher
from limbeck.errors import InputError, PromptError
from limbeck.recipe import Recipe
from limbeck.records import Prompt
from limbeck.rundir import RunDir
from limbeck.seeds import derive_seed

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker.save(tmp_path_factory.mktemp("other"), seed=5)


WORDS = ("sea", "fox", "dog", "duck", "egg", "still", "answer")
TEXTS = [f"What is a {word}, and {n}?" for n, word in enumerate(WORDS)] + ["Go on. " * 6]


def test_every_prompt_teacher_and_sample_is_answered_in_order(tmp_path: Path, talking: Path, other: Path):
    made = recipe([talking, other], prompts_file(tmp_path / "p.jsonl", TEXTS), samples=2)
    run = gathered(made, tmp_path / "run")
    facts: dict[str, Any] = collect(made, run)
    rows, asked = completions(run), prompts(run)
    assert [(c.prompt_id, c.teacher, c.sample) for c in rows] == [
        (p.id, str(d), sample) for p in asked for d in (talking, other) for sample in (0, 1)
    ]
    by_id = {p.id: p for p in asked}
    with Journal(run / "journal.db") as journal:
        assert len(journal) == len(rows) == len({c.request_id for c in rows}) == 4 * len(TEXTS)
        assert journal.refused == 0
        for c in rows:
            found = journal.get(c.request_id)
            raw = json.loads(found.raw)
            assert c.response == "sha256:" + hashlib.sha256(found.raw).hexdigest()
            assert (c.created, c.text, c.finish_reason) == (found.created, raw["text"], raw["finish_reason"])
            assert c.messages == by_id[c.prompt_id].messages
            assert c.split == by_id[c.prompt_id].split
            assert c.weights == models.resolve(c.teacher).digest
            assert (c.terms, c.model, c.reasoning) == ("own-model", c.teacher, None)
            assert (c.provider, c.route) == ("self-hosted", "self-hosted")
    assert len({c.text for c in rows}) > len(rows) // 2
    assert facts["answers"] == facts["generated"] == len(rows)
    assert facts["from_journal"] == 0
    assert facts["finish_reasons"] == dict(sorted(Counter(c.finish_reason for c in rows).items()))
    assert facts["completion_tokens"] == facts["tokens_generated"] == sum(c.completion_tokens for c in rows)
    assert facts["prompt_tokens"] == sum(c.prompt_tokens for c in rows)
    assert sum(facts["completion_tokens_by_teacher"].values()) == facts["completion_tokens"]
    assert json.loads(json.dumps(facts)) == facts


def test_the_prompt_is_what_the_chat_template_says_and_greedy_answers_are_those_of_transformers(
    tmp_path: Path, talking: Path
):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS), temperature=0.0)
    run = gathered(made, tmp_path / "run")
    collect(made, run)
    words, model = models.load_tokenizer(str(talking)), AutoModelForCausalLM.from_pretrained(talking)
    for c in completions(run):
        chat = [m.model_dump() for m in c.messages]
        ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert c.prompt_tokens == ids.shape[1]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        answer = whole[0, ids.shape[1] :].tolist()
        ended = words.eos_token_id in answer
        assert c.finish_reason == ("stop" if ended else "length")
        assert c.completion_tokens == len(answer)
        assert c.text == words.decode(answer[:-1] if ended else answer)


def test_once_journaled_nothing_is_generated_or_loaded_again(
    tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch
):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS))
    run = gathered(made, tmp_path / "run")
    collect(made, run)
    first = (run / "completions.parquet").read_bytes()
    monkeypatch.setattr(models, "load_model", None)
    facts = collect(made, run)
    assert (run / "completions.parquet").read_bytes() == first
    assert (facts["generated"], facts["from_journal"]) == (0, len(TEXTS))


def test_only_what_is_new_is_generated(tmp_path: Path, talking: Path):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS[:5]))
    before = gathered(made, tmp_path / "run")
    collect(made, before)
    old = completions(before)
    more = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS[::-1]))
    run = gathered(more, tmp_path / "run")
    facts = collect(more, run)
    assert (facts["generated"], facts["from_journal"]) == (len(TEXTS) - 5, 5)
    now = {c.request_id: c for c in completions(run)}
    assert all(now[c.request_id].text == c.text and now[c.request_id].created == c.created for c in old)


def test_the_key_covers_what_changes_the_answer_and_nothing_else(tmp_path: Path, talking: Path, other: Path):
    run = gathered(recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS)), tmp_path / "run")
    prompt, second, *_ = prompts(run)

    def key(prompt: Prompt = prompt, sample: int = 0, teacher: Path = talking, seed: int = 0, **how) -> str:
        made = recipe(teacher, seed=seed, **how)
        return make_teacher(made.teachers[0], made.collect, made.seed).request(prompt, sample).key

    others = [
        key(second), key(sample=1), key(teacher=other), key(seed=1),
        key(max_tokens=13), key(temperature=0.9), key(top_p=0.9),
    ]  # fmt: skip
    assert len({key(), *others}) == 1 + len(others)
    assert key(concurrency=7, samples=3) == key()
    moved = prompt.model_copy(update={"source": "elsewhere", "licence": "CC0-1.0"})
    assert key(moved) == key()


class _Recorder:
    """Stands in front of `sample_batch`; keeps which batches were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.batches: list[tuple[tuple[int, ...], ...]] = []
        self._real = local.sample_batch
        monkeypatch.setattr(local, "sample_batch", self)

    def __call__(self, model, prompts, sampling, *, stop_ids, seeds, **more):
        self.batches.append(tuple(seeds))
        return self._real(model, prompts, sampling, stop_ids=stop_ids, seeds=seeds, **more)


def test_the_same_batches_remain_whatever_was_done(tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS), samples=3)
    run = gathered(made, tmp_path / "run")
    teacher = teacher_of(made)
    requests = [teacher.request(p, sample) for p in prompts(run) for sample in range(3)]
    recorder = _Recorder(monkeypatch)
    groups = list(teacher.answer([requests]))
    whole = list(recorder.batches)
    assert [len(group) for group in groups] == [4] * 6
    assert {r.key for group in groups for r, _ in group} == {r.key for r in requests}
    lengths = [len(json.loads(r.body)["tokens"]) for group in groups for r, _ in group]
    assert lengths == sorted(lengths, reverse=True)
    for done in range(6):
        recorder.batches.clear()
        there = {r.key for group in groups[:done] for r, _ in group}
        rest = list(teacher.answer([[r for r in requests if r.key not in there]]))
        assert recorder.batches == whole[done:]
        assert rest == groups[done:]


def test_parse_needs_nothing_but_the_bytes(talking: Path):
    teacher = teacher_of(recipe(talking))
    raw = LocalAnswer(
        model="m", tokens=(1, 2), text="<think>a</think>\x00b", finish_reason="length", stop=None,
        prompt_tokens=3, completion_tokens=2,
    ).bytes()  # fmt: skip
    parsed = teacher.parse(Request.of(None), raw)
    assert parsed[:7] == ("<think>a</think>\x00b", None, "length", "m", 3, 2, ())
    assert parsed[7:] == (None, None)  # no provider numbered it
    for broken in (b"", b"{}", raw[:-2], b"\xff\x1b[31m"):
        with pytest.raises(InputError, match="journaled answer") as error:
            teacher.parse(Request.of(None), broken)
        assert "\x1b" not in str(error.value)


def test_a_prompt_that_leaves_no_room_is_answered_so(tmp_path: Path, talking: Path):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", [*TEXTS, "Long? " * 400]))
    run = gathered(made, tmp_path / "run")
    facts: dict[str, Any] = collect(made, run)
    rows = completions(run)
    assert (rows[-1].finish_reason, rows[-1].text, rows[-1].completion_tokens) == ("context_length", "", 0)
    assert rows[-1].prompt_tokens > 512 - 12
    assert "context_length" not in {c.finish_reason for c in rows[:-1]}
    assert facts["finish_reasons"]["context_length"] == 1


def test_answers_longer_than_the_model_are_refused(tmp_path: Path, talking: Path):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS), max_tokens=512)
    run = gathered(made, tmp_path / "run")
    with pytest.raises(InputError, match=r"collect\.max_tokens") as error:
        collect(made, run)
    assert "512 positions" in error.value.problems[0].expected
    assert not (run / "completions.parquet").exists()


def test_all_prompts_that_the_template_refuses_are_named(tmp_path: Path):
    strict = "{% if messages[0]['content'] is search('BAD') %}" + "{{ raise_exception('no \x1b such') }}{% endif %}"
    strict = strict.replace("is search('BAD')", "== 'BAD' or 'BAD' in messages[0]['content']")
    directory = tiny.save(tmp_path / "teacher", layers=1, template=strict + tiny.CHATML)
    made = recipe(directory, prompts_file(tmp_path / "p.jsonl", ["BAD one", *TEXTS, "BAD\x07 two"]))
    run = gathered(made, tmp_path / "run")
    with pytest.raises(PromptError) as error:
        collect(made, run)
    assert [p.where for p in error.value.problems] == [
        f"{tmp_path}/p.jsonl: BAD one",
        f"{tmp_path}/p.jsonl: BAD\\x07 two",
    ]
    assert all("no \\x1b such" in p.found for p in error.value.problems)
    with Journal(run / "journal.db") as journal:
        assert len(journal) == 0


class _Lines:
    """A progress that keeps what it was told."""

    def __init__(self):
        self.seen: list[tuple[str, float | None, str]] = []
        self.done = 0.0

    def begin(self, text: str) -> None:
        assert text

    @contextmanager
    def line(self, name: str, total: float | None, unit: str):
        self.seen.append((name, total, unit))
        self.done = 0.0
        yield self

    def advance(self, units: float = 1) -> None:
        self.done += units

    def note(self, text: str) -> None:
        assert text


def test_progress_counts_what_is_there_already(tmp_path: Path, talking: Path):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS), samples=2)
    run, lines = gathered(made, tmp_path / "run"), _Lines()
    run.progress = lines  # type: ignore[assignment]
    for _ in range(2):
        collect(made, run)
        assert lines.seen[-1] == ("collect", 2 * len(TEXTS), "answers")
        assert lines.done == 2 * len(TEXTS)


def test_the_seed_decides(tmp_path: Path, talking: Path):
    def texts(name: str, seed: int) -> list[str]:
        made = recipe(talking, own(5), seed=seed)
        run = gathered(made, tmp_path / name)
        collect(made, run)
        return [c.text for c in completions(run)]

    assert texts("a", 1) == texts("b", 1) != texts("c", 2)


def _work(made: str, root: str, log: str) -> None:
    """What a run does up to `collect`, in a process of its own, with a line in the log before each batch is
    generated and after each is acknowledged.
    """
    torch.set_num_threads(1)
    plan = Recipe.model_validate_json(made)
    generate, put = local.sample_batch, Journal.put_group
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def told(word: str, seeds: Sequence[int]) -> None:
        os.write(handle, f"{word} {' '.join(map(str, seeds))}\n".encode())

    def generating(model, prompts, sampling, *, stop_ids, seeds, **more):
        told("begin", seeds)
        return generate(model, prompts, sampling, stop_ids=stop_ids, seeds=seeds, **more)

    def putting(self: Journal, answers: Sequence[Answer]) -> int:
        new = put(self, answers)
        told("kept", [derive_seed(plan.seed, "answer", request.key) for request, _ in answers])
        return new

    local.sample_batch = generating
    Journal.put_group = putting  # type: ignore[method-assign]
    run = RunDir(root)
    if not (run / "prompts.parquet").exists():
        gather(plan, run)
    collect(plan, run)


def _journal(root: Path) -> dict[str, bytes]:
    with Journal(root / "journal.db") as journal:
        assert journal.refused == 0
        keys = [key for (key,) in journal._db.execute("SELECT key FROM answers")]
        return {key: journal.get(key).raw for key in keys}


def test_killed_at_random_moments_and_continued_it_is_the_same_run(tmp_path: Path, talking: Path):
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", TEXTS), own(8), max_tokens=40)
    moments, log = random.Random(11), tmp_path / "log"

    def start(root: Path) -> BaseProcess:
        root.mkdir(exist_ok=True)
        return forked.start(_work, made.model_dump_json(), str(root), str(log))

    whole = start(tmp_path / "whole")
    whole.join(120)
    assert whole.exitcode == 0
    log.unlink()
    killed = 0
    while True:
        worker, seen = start(tmp_path / "run"), log.stat().st_size if log.exists() else 0
        for _ in range(moments.randrange(1, 4)):  # so many lines later, and a moment
            while worker.is_alive() and (log.stat().st_size if log.exists() else 0) == seen:
                time.sleep(0.001)
            seen = log.stat().st_size
        worker.join(moments.uniform(0, 0.05))
        worker.kill()
        worker.join(60)
        if worker.exitcode == 0:
            break
        assert worker.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 5

    begun, kept = Counter[str](), set[str]()
    for line in log.read_text().splitlines():
        word, *seeds = line.split()
        if word == "kept":
            kept.update(seeds)
        else:
            assert kept.isdisjoint(seeds), "generated again although it was journaled"
            begun.update([" ".join(seeds)])
    assert sum(begun.values()) - len(begun) <= killed, "more batches begun again than were cut off"
    assert _journal(tmp_path / "run") == _journal(tmp_path / "whole")
    bytes_of = [(tmp_path / name / "prompts.parquet").read_bytes() for name in ("run", "whole")]
    assert bytes_of[0] == bytes_of[1]
    both = [completions(RunDir(tmp_path / name)) for name in ("run", "whole")]
    rows = [[c.model_dump(exclude={"created"}) for c in some] for some in both]
    assert rows[0] == rows[1]
    assert len(rows[0]) == len(TEXTS) + 8
