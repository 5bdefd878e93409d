"""Prompts that the teacher writes itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import talker
import tiny
import torch
from talker import gathered, own, prompts, prompts_file, recipe, teacher_of
from watched import Watched

from limbeck import models
from limbeck.cli.show import as_text, standing
from limbeck.collect import self_prompt
from limbeck.collect.journal import Journal
from limbeck.collect.local import LocalAnswer
from limbeck.collect.prompts import gather
from limbeck.collect.self_prompt import user_turn, why_not
from limbeck.collect.teachers import Answer
from limbeck.collect.written import tally
from limbeck.errors import InputError, ModelError
from limbeck.ledger.canonical import digest_json
from limbeck.recipe import SelfPrompt
from limbeck.run import run
from limbeck.rundir import RunDir

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker"))


def test_the_users_turn_is_read_off_the_template():
    words = tiny.tokenizer()
    for system in (None, "Be brief. <|im_end|>x"):
        turn = user_turn(words, system)
        assert turn.end == words.convert_tokens_to_ids("<|im_end|>")
        for text in ("Why?", "two\nlines ", "12 + 30"):
            chat = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": text}]
            whole = words.apply_chat_template(chat, return_dict=False)
            inner = words.encode(text, add_special_tokens=False)
            assert whole[: len(turn.tokens)] == list(turn.tokens)
            assert whole[len(turn.tokens) :][: len(inner)] == inner
            assert whole[len(turn.tokens) + len(inner)] == turn.end


def test_the_space_before_the_first_word_is_the_models_to_write():
    words = tiny.tokenizer(template="<|im_start|>ask: {{ messages[-1]['content'] }}\n<|im_end|>")
    turn = user_turn(words, None)
    assert words.decode(turn.tokens) == "<|im_start|>ask:"
    assert turn.end == words.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "nothing before"),
        ("user: {{ messages[0]['content'] }}\n\n", "before and \\n after"),
        ("user: {{ messages[0]['content'] * 2 }}<|im_end|>", "2 times"),
        ("user: {{ messages[0]['content'] | upper }}<|im_end|>", "0 times"),
        ("{{ raise_exception('only in French') }}", "only in French"),
    ],
)
def test_a_template_without_a_users_turn_is_refused(template: str, found: str):
    with pytest.raises(ModelError) as error:
        user_turn(tiny.tokenizer(template=template), None)
    assert found in error.value.problems[0].found
    assert "kind: file" in error.value.problems[0].remedy


def test_a_teacher_writes_its_own_prompts(tmp_path: Path, talking: Path):
    made = recipe(talking, own(20))
    run = RunDir(tmp_path)
    facts: dict[str, Any] = gather(made, run)
    rows, (part,) = prompts(run), facts["sources"]
    assert len(rows) == len({p.messages for p in rows}) == 20
    for p in rows:
        (message,) = p.messages
        assert message.role == "user"
        assert message.content == message.content.strip()
        assert why_not(message.content) is None
        assert (p.source, p.writer, p.licence) == (f"self-prompt:{talking}", str(talking), "unknown")
    assert part["candidates"] == 20 + sum(part["dropped"].values())
    assert part["weights"] == models.resolve(str(talking)).digest
    assert json.loads(json.dumps(facts)) == facts
    with Journal(run / "journal.db") as journal:
        assert len(journal) == -(-part["candidates"] // 4) * 4
        assert journal.refused == 0


def test_while_prompts_are_written_the_tokens_are_told_and_then_what_was_kept(
    tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch
):
    """The teacher's tokens as the journal has them; and kept prompts alone move the line."""
    monkeypatch.setattr("limbeck.progress._NOTED", 0.0)
    watched = Watched()
    gather(recipe(talking, own(10), concurrency=8), RunDir(tmp_path, watched))
    begun, *told = watched.told
    assert begun == f"prompts: 10 written by {talking}"
    first = next(n for n, text in enumerate(told) if "kept" in str(text) or not isinstance(text, str))
    assert first > 5
    assert all(re.fullmatch(r"[\d,]+ tokens, [\d,]+ a second", str(text)) for text in told[:first])
    with Journal(tmp_path / "journal.db") as journal:
        keys = [key for (key,) in journal._db.execute("SELECT key FROM answers")]
        tokens = sum(json.loads(journal.get(key).raw)["completion_tokens"] for key in keys)
    rows = [re.fullmatch(r"(\d+) of (\d+) candidates kept, ([\d,]+) tokens, .*", str(text)) for text in told[first:]]
    kept, seen, written = row.groups() if (row := rows[-1]) else pytest.fail(str(told[-1]))
    assert (kept, int(written.replace(",", ""))) == ("10", tokens)
    assert int(seen) <= len(keys)
    assert sum(units for units in told if not isinstance(units, str)) == 10


def test_a_run_that_was_stopped_tells_what_was_written_for_prompts_from_answers(
    tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch
):
    """By what each request in the journal was for; stopped while prompts are written, then while they are answered."""
    made, root, put = recipe(talking, own(6)), tmp_path / "run", Journal.put_group
    for stopped in ("self-prompt-0", "collect"):
        groups = Counter[str]()

        def stopping(self: Journal, answers: Sequence[Answer], groups=groups, stopped=stopped) -> int:
            groups[json.loads(answers[0].request.body)["stream"]] += 1
            if groups[stopped] > 1:
                raise KeyboardInterrupt
            return put(self, answers)

        monkeypatch.setattr(Journal, "put_group", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(made, root, until="collect")
        with Journal(root / "journal.db") as journal:
            keys = [key for (key,) in journal._db.execute("SELECT key FROM answers")]
            streams = Counter(json.loads(journal.get(key).request)["stream"] for key in keys)
        told, text = standing(root).collecting, as_text(standing(root), facts=False)
        assert told is not None
        assert (told.answers, told.for_prompts) == (streams["collect"], streams["self-prompt-0"])
        assert f"written for prompts  {streams['self-prompt-0']} in " in text
        assert ("answers" in text) == (stopped == "collect") == (told.answers > 0)


def test_own_prompts_do_not_hang_on_the_batch_and_more_of_them_begin_alike(tmp_path: Path, talking: Path):
    texts = []
    for name, count, width in (("a", 9, 4), ("b", 9, 9), ("c", 14, 3)):
        run = gathered(recipe(talking, own(count), concurrency=width), tmp_path / name)
        texts.append([p.messages[0].content for p in prompts(run)])
    assert texts[0] == texts[1] == texts[2][:9]


def test_candidates_of_a_shared_journal_are_kept_in_the_run_too(tmp_path: Path, talking: Path):
    made = recipe(talking, own(6), journal=str(tmp_path / "shared.db"))
    first, second = gathered(made, tmp_path / "a"), gathered(made, tmp_path / "b")
    assert prompts(first) == prompts(second)
    with Journal(tmp_path / "shared.db") as shared:
        keys = [key for (key,) in shared._db.execute("SELECT key FROM answers")]
        for run in (first, second):
            with Journal(run / "journal.db") as journal:
                assert [journal.get(key).raw for key in keys] == [shared.get(key).raw for key in keys]


def test_own_prompts_are_different_from_files_and_from_each_other(tmp_path: Path, talking: Path):
    first = [p.messages[0].content for p in prompts(gathered(recipe(talking, own(6)), tmp_path / "first"))]
    made = recipe(talking, prompts_file(tmp_path / "p.jsonl", first[:3]), own(6), own(6), own(5, system="Ask."))
    (tmp_path / "run").mkdir()
    facts: dict[str, Any] = gather(made, RunDir(tmp_path / "run"))
    rows = prompts(RunDir(tmp_path / "run"))
    assert len({p.id for p in rows}) == len(rows) == 3 + 6 + 6 + 5
    assert [p.messages[0].content for p in rows[3:6]] == first[3:]
    assert [s["kept"] for s in facts["sources"]] == [3, 6, 6, 5]
    assert all(p.messages[0].role == "system" and p.messages[0].content == "Ask." for p in rows[-5:])


def test_too_few_of_use_is_an_error_with_the_share(tmp_path: Path, talking: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tally, "TRIES", 3)
    with pytest.raises(InputError) as error:
        gather(recipe(talking, own(6, max_tokens=1)), RunDir(tmp_path))
    (problem,) = error.value.problems
    assert problem.found.startswith("0 of 18 candidates kept (0.0%; ran on: ")
    assert "count: 6" in problem.expected
    assert not (tmp_path / "prompts.parquet").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("Hello there.", "short"),
        ("--- ??? ... !!!", "short"),
        ("法国的首都是哪里？", None),
        ("How do you define resilience?", None),
        ("User: What is it?\nAssistant: A still.", "role marker"),
        ("What is it?\n**Assistant:** a still", "role marker"),
        ("What is it?\n\nassistant\n", "role marker"),
        ("What does <|im_start|> mean?", "role marker"),
        ("Can the user: a person, ask an AI?\nAsk the AI now", None),
        ("Your ENTIRE ENTIRE ENTIRE ENTIRE plan", "loop"),
        ("Is it, is it, is it, is it so?", "loop"),
        ("Is it that that that is odd?", None),
        ("Why?\n```python\nif a:\n                                pass\n```", None),
        ("What a caf\ufffd, is it not?", "broken character"),
    ],
)
def test_why_a_candidate_is_dropped(text: str, reason: str | None):
    assert why_not(text) == reason


def test_a_special_token_in_the_middle_drops_a_candidate():
    turn = user_turn(tiny.tokenizer(), None)
    inner = next(iter(turn.special - {turn.end}))
    plain = LocalAnswer(
        model="m", tokens=(40, 41), text="What is it?", finish_reason="stop", stop=turn.end,
        prompt_tokens=1, completion_tokens=3,
    )  # fmt: skip
    drop = self_prompt._dropped
    assert drop(plain, turn, plain.text) is None
    assert drop(plain.model_copy(update={"tokens": (40, inner)}), turn, plain.text) == "special token"
    assert drop(plain.model_copy(update={"stop": None}), turn, plain.text) == "ran on"
    assert drop(plain.model_copy(update={"stop": inner}), turn, plain.text) == "ended as an answer"


def test_settings_of_own_prompts_are_in_their_keys(talking: Path):
    teacher = teacher_of(recipe(talking))
    base = SelfPrompt(count=3)
    keys = {teacher.continuation((1, 2), 2, base, "a", 0).key: None}
    for more in ({"max_tokens": 5}, {"temperature": 0.5}, {"top_p": 0.5}):
        keys[teacher.continuation((1, 2), 2, base.model_copy(update=more), "a", 0).key] = None
    for tokens, stop, stream, number in (
        ((1, 3), 2, "a", 0),
        ((1, 2), 0, "a", 0),
        ((1, 2), 2, "b", 0),
        ((1, 2), 2, "a", 1),
    ):
        keys[teacher.continuation(tokens, stop, base, stream, number).key] = None
    assert len(keys) == 8
    request = teacher.continuation((1, 2), 2, base, "a", 0)
    assert request.key == digest_json(json.loads(request.body))
