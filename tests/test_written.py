"""Prompts that a teacher writes when it is told to, asked of the test server."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard
from asking import ask, made
from hypothesis import given
from hypothesis import strategies as st
from watched import Watched

from limbeck.collect.journal import Journal
from limbeck.collect.prompts import gather
from limbeck.collect.written.kinds import items
from limbeck.collect.written.likeness import Likeness, alike
from limbeck.errors import EndpointError, InputError, RefusedError
from limbeck.ledger.canonical import digest_file
from limbeck.recipe import Recipe
from limbeck.records import Message, Prompt
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.terms.sources import declared, today
from limbeck.testing import Server, Settings

SETTINGS = Settings(words=12, spread=0.5)
LISTS = Settings(words=12, spread=0.5, items=3)


def rows(path: Path, texts: list[str], licence: str = "MIT") -> dict[str, Any]:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return {"kind": "file", "path": str(path), "licence": licence}


def sources(tmp_path: Path, count: int = 12) -> dict[str, dict[str, Any]]:
    seeds = rows(tmp_path / "seeds.jsonl", [f"Seed number {n} asks for copper." for n in range(5)])
    who = rows(tmp_path / "who.jsonl", [f"A cooper of {n} years" for n in range(3)], "CC0-1.0")
    texts = [" ".join(f"d{n}w{i}" for i in range(25)) for n in range(4)]
    common = {"count": count, "max_tokens": 40}
    return {
        "evolve": {"kind": "evolve", "seeds": seeds, "rounds": 2, **common},
        "personas": {"kind": "personas", "personas": who, "tasks": seeds, **common},
        "documents": {"kind": "documents", "documents": rows(tmp_path / "docs.jsonl", texts), "words": 10, **common},
        "self-instruct": {
            "kind": "self-instruct",
            "seeds": seeds,
            "examples": 4,
            "rounds": 3,
            **common,
            "max_tokens": 800,
        },
        "multi-turn": {"kind": "multi-turn", "seeds": seeds, **common},
    }


def gathered(recipe, root: Path) -> tuple[list[Prompt], dict[str, Any]]:
    root.mkdir(exist_ok=True)
    facts: dict[str, Any] = gather(recipe, RunDir(root))
    return list(read_records(root / "prompts.parquet", Prompt)), facts["sources"][0]


KINDS_OF_ROWS = {
    **{"evolve": {"seed"}, "self-instruct": {"seed"}, "multi-turn": {"seed"}, "documents": {"document"}},
    "personas": {"persona", "task"},
}


@pytest.mark.parametrize("kind", ["evolve", "personas", "documents", "self-instruct", "multi-turn"])
def test_a_teacher_writes_prompts_once_and_is_recorded_with_what_they_came_from(tmp_path: Path, kind: str):
    with Server(LISTS if kind == "self-instruct" else SETTINGS) as server:
        recipe = made(server.url, sources(tmp_path)[kind], concurrency=4)
        prompts, facts = gathered(recipe, tmp_path / "a")
        billed = server.bill.requests
        assert billed == len(Journal(tmp_path / "a" / "journal.db"))
        again, _ = gathered(recipe, tmp_path / "a")
        assert again == prompts
        assert server.bill.requests == billed
        one = recipe.model_copy(update={"collect": recipe.collect.model_copy(update={"concurrency": 1})})
        assert gathered(one, tmp_path / "b")[0] == prompts
    assert len(prompts) == 12 == len({p.id for p in prompts})
    files = {r["path"]: r["licence"] for r in sources(tmp_path)[kind].values() if isinstance(r, dict)}
    known = {
        Prompt.id_of((Message(role="user", content=json.loads(line)["prompt"]),))
        for path in files
        for line in Path(path).read_text().splitlines()
    }
    for prompt in prompts:
        assert prompt.writer == "toy"
        assert prompt.source == f"{kind}:toy"
        assert prompt.parents is not None
        rows = [parent for parent in prompt.parents if parent.kind != "prompt"]
        assert {parent.source: parent.licence for parent in rows} == files
        assert {parent.id for parent in rows} <= known
        assert {str(parent.kind) for parent in rows} == KINDS_OF_ROWS[kind]
    earlier = [
        (at, parent) for at, prompt in enumerate(prompts) for parent in prompt.parents or () if parent.kind == "prompt"
    ]
    assert bool(earlier) == (kind in ("evolve", "self-instruct"))
    ids = [prompt.id for prompt in prompts]
    for at, parent in earlier:
        assert parent.id in ids[:at]
        assert (parent.source, parent.licence) == (prompts[at].source, prompts[at].licence)
    for prompt in prompts:
        assert set(prompt.licence.split(" AND ")) == set(files.values())
    assert facts["candidates"] == 12 + sum(facts["dropped"].values())
    wording = Path(__file__).parents[1] / "limbeck" / "collect" / "written" / "wording"
    assert facts["wording"] == {name: digest_file(wording / f"{name}.jinja") for name in facts["wording"]}
    assert facts["wording"]


def test_little_more_is_asked_for_than_is_looked_at(tmp_path: Path):
    """A second wave of 64 for the last six prompts would be paid for in vain."""
    source = sources(tmp_path, 70)["documents"] | {"words": 5, "similarity": None}
    with Server(SETTINGS) as server:
        _, facts = gathered(made(server.url, source), tmp_path / "a")
        assert facts["requests"] == server.bill.requests <= facts["candidates"] + 8


@pytest.mark.parametrize("kind", ["documents", "self-instruct"])
def test_prompts_move_the_line_and_answers_do_not(tmp_path: Path, kind: str):
    watched = Watched()
    with Server(LISTS if kind == "self-instruct" else SETTINGS) as server:
        root = tmp_path / "a"
        root.mkdir()
        gather(made(server.url, sources(tmp_path)[kind]), RunDir(root, watched))
    assert watched.told[0] == f"prompts: 12 of kind {kind} written by toy"
    assert sum(units for units in watched.told if not isinstance(units, str)) == 12
    assert re.fullmatch(r"12 of \d+ candidates kept, .*at once", str(watched.told[-1]))


def exchanged(root: Path) -> list[tuple[tuple[tuple[str, str], ...], bytes]]:
    """What the teacher was sent, as roles and contents, and the raw answer, out of the journal."""
    with sqlite3.connect(root / "journal.db") as db:
        rows_ = db.execute("SELECT request, raw FROM answers").fetchall()
    unpack = zstandard.ZstdDecompressor().decompress
    bodies = [(orjson.loads(unpack(request))["body"], unpack(raw)) for request, raw in rows_]
    return [(tuple((m["role"], m["content"]) for m in body["messages"]), raw) for body, raw in bodies]


def asked(root: Path) -> list[str]:
    """What the teacher was told, out of the journal."""
    return [chat[-1][1] for chat, _ in exchanged(root)]


def test_each_persona_meets_each_task_and_rounds_evolve_what_was_evolved(tmp_path: Path):
    with Server(SETTINGS) as server:
        gathered(made(server.url, sources(tmp_path, 15)["personas"]), tmp_path / "p")
        evolved, _ = gathered(made(server.url, sources(tmp_path)["evolve"]), tmp_path / "e")
    told = asked(tmp_path / "p")
    for n in range(3):
        for m in range(5):
            assert any(f"A cooper of {n} years" in t and f"Seed number {m} " in t for t in told)
    told = asked(tmp_path / "e")
    assert any("Seed number" in t for t in told)
    assert any(p.messages[-1].content in t for p in evolved[:6] for t in told)
    assert not any(p.messages[-1].content in t for p in evolved[6:] for t in told)


@pytest.mark.parametrize("show", [True, False])
def test_a_piece_is_shown_or_only_used_to_ask(tmp_path: Path, show: bool):
    with Server(SETTINGS) as server:
        made_ = made(server.url, sources(tmp_path)["documents"] | {"show": show})
        prompts, _ = gathered(made_, tmp_path / "d")
    # 25 words in pieces of 10 at most
    parts = [(0, 8), (8, 16), (16, 25)]
    pieces = [" ".join(f"d{n}w{i}" for i in range(*part)) for n in range(4) for part in parts]
    told = asked(tmp_path / "d")
    assert all(any(f"\n{piece}\n" in t for t in told) for piece in pieces)
    starts = [any(p.messages[0].content.startswith(f"{piece}\n\n") for piece in pieces) for p in prompts]
    assert all(starts) if show else not any("w1" in p.messages[0].content for p in prompts)


@pytest.mark.parametrize("kind", ["evolve", "self-instruct", "multi-turn"])
def test_writing_counts_under_the_cap_and_offline_sends_nothing(tmp_path: Path, kind: str):
    price = {"price": {"input": 1.0, "output": 1.0}}
    settings = LISTS if kind == "self-instruct" else SETTINGS
    with Server(settings.model_copy(update={"idempotency": False})) as server:  # each run pays for itself
        source = sources(tmp_path, 24)[kind] | {"max_tokens": 100}
        run = RunDir(tmp_path / "off")
        run.root.mkdir()
        run.offline = True
        with pytest.raises(EndpointError, match="does not hold every answer"):
            gather(made(server.url, source), run)
        assert server.bill.received == 0
        whole, _ = gathered(made(server.url, source, teacher=price), tmp_path / "whole")
        requests, cost = server.bill.requests, tokens(tmp_path / "whole") / 1e6
        capped = made(server.url, source, teacher=price, budget={"money": cost / 2})
        with pytest.raises(RefusedError):
            gathered(capped, tmp_path / "cap")
        sent = server.bill.requests - requests
        assert 0 < sent < requests
        assert tokens(tmp_path / "cap") / 1e6 <= cost / 2
        raised = made(server.url, source, teacher=price, budget={"money": 5.0})
        assert gathered(raised, tmp_path / "cap")[0] == whole
        assert server.bill.requests == 2 * requests
        held = RunDir(tmp_path / "cap")
        held.offline = True
        gather(raised, held)
        _, answers = ask(raised, tmp_path / "cap")
    assert len(answers) == 24


def tokens(root: Path) -> int:
    """What the server's answers in a journal say was billed."""
    found = [re.findall(rb'"total_tokens":\s*(\d+)', raw) for _, raw in exchanged(root)]
    return sum(int(told[-1]) for told in found)


def test_what_is_dropped_is_counted_and_too_few_is_an_error(tmp_path: Path):
    source = sources(tmp_path)["evolve"]
    with Server(SETTINGS) as server:
        _, facts = gathered(made(server.url, source | {"max_tokens": 14, "min_words": 10}), tmp_path / "a")
        assert set(facts["dropped"]) == {"ended by length", "short"}
        with pytest.raises(InputError, match="too few prompts") as error:
            gathered(made(server.url, source | {"max_tokens": 4}), tmp_path / "b")
    assert "0 of 240 candidates kept (0.0%; ended by length: 240)" in error.value.problems[0].found
    assert not (tmp_path / "b" / "prompts.parquet").exists()


def test_only_a_teacher_of_the_recipe_can_write(tmp_path: Path):
    with pytest.raises(ValueError, match="a teacher of the recipe: toy"):
        made("http://127.0.0.1:9", sources(tmp_path)["evolve"] | {"by": "other"})


@given(*[st.lists(st.sampled_from("abcd"), min_size=1, max_size=9)] * 2, st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_likeness_is_that_of_rouge_l(one: list[str], other: list[str], limit: float):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    recall, precision = table[-1][-1] / len(other), table[-1][-1] / len(one)
    score = 2 * recall * precision / (recall + precision) if table[-1][-1] else 0.0
    if abs(score - limit) > 1e-9:
        assert alike(one, other, limit) == (score > limit)


WORDS = st.lists(st.sampled_from("abcdefgh"), max_size=7)


@given(st.lists(WORDS, max_size=24), st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0]))
def test_what_is_near_is_found_without_comparing_each_with_each(texts: list[list[str]], limit: float):
    found = Likeness(limit)
    for place, text in enumerate(texts):
        assert found.near(text) == any(alike(text, before, limit) for before in texts[:place])
        found.add(text)


def test_lists_are_made_of_seeds_and_of_what_earlier_rounds_kept(tmp_path: Path):
    with Server(LISTS) as server:
        prompts, _ = gathered(made(server.url, sources(tmp_path)["self-instruct"]), tmp_path / "s")
    shown = [set(re.findall(r"(?m)^\d+\. (.*)$", told)) for told in asked(tmp_path / "s")]
    seeds = {f"Seed number {n} asks for copper." for n in range(5)}
    texts = [p.messages[-1].content for p in prompts]
    assert {len(examples) for examples in shown} == {4}
    assert {len(examples & seeds) for examples in shown} == {3, 4}
    assert all(len(examples & set(texts[:8])) == 1 for examples in shown if len(examples & seeds) == 3)
    assert not any(text in examples for text in texts[8:] for examples in shown)
    said = {Prompt.id_of((Message(role="user", content=text),)): text for text in (*seeds, *texts)}
    for prompt in prompts:
        parents = {said[parent.id]: parent.kind for parent in prompt.parents or ()}
        assert {*parents} in shown  # all that it was shown, and nothing else
        assert {text for text, kind in parents.items() if kind == "seed"} == {*parents} & seeds
        assert {text for text, kind in parents.items() if kind == "prompt"} == {*parents} - seeds


ITEM = st.text("abc .\"'*", min_size=1, max_size=12).map(lambda text: f"a{text}a")


@given(st.lists(st.lists(ITEM, min_size=1, max_size=3), max_size=6), st.integers(1, 50), st.sampled_from(".):"))
def test_a_numbered_list_is_read_back_from_whatever_number_it_starts(lists: list[list[str]], first: int, mark: str):
    lines = [f"{n}{mark} " + "\n   ".join(item) for n, item in enumerate(lists, first)]
    for between in ("\n", "\n\n"):
        text = "Here they are:\n\n" + between.join(lines) + "\n\nShall I go on?"
        assert items(text) == ["\n".join(item) for item in lists]


def test_the_last_item_of_a_list_that_was_cut_off_is_dropped(tmp_path: Path):
    source = sources(tmp_path)["self-instruct"] | {"max_tokens": 20, "min_words": 1, "similarity": None}
    with Server(Settings(words=12, items=3)) as server:
        prompts, facts = gathered(made(server.url, source), tmp_path / "a")
        assert facts["dropped"]["ended by length"] > 0
        with pytest.raises(InputError, match="too few prompts") as error:
            gathered(made(server.url, source | {"max_tokens": 6}), tmp_path / "b")
    assert all(len(p.messages[0].content.split()) == 12 for p in prompts)
    assert "ended by length: 240" in error.value.problems[0].found
    with Server(SETTINGS) as server, pytest.raises(InputError, match="too few prompts") as error:
        gathered(made(server.url, source | {"max_tokens": 99}), tmp_path / "c")
    assert "no list: 240" in error.value.problems[0].found


@pytest.mark.parametrize("turns", [2, 4])
def test_a_chat_is_what_the_teacher_was_asked_and_said(tmp_path: Path, turns: int):
    source = sources(tmp_path, 6)["multi-turn"] | {"turns": turns}
    with Server(SETTINGS) as server:
        prompts, facts = gathered(made(server.url, source), tmp_path / "m")
    said: dict[tuple, bytes] = defaultdict(bytes)
    for chat, raw in exchanged(tmp_path / "m"):
        said[chat] += raw
    for prompt in prompts:
        assert [m.role for m in prompt.messages] == ["user", *["assistant", "user"] * (turns - 1)]
        assert prompt.messages[0].content.startswith("Seed number")
        for place, written in enumerate(prompt.messages[1:], 1):
            before = prompt.messages[:place]
            if written.role == "assistant":
                assert written.content.encode() in said[tuple((m.role, m.content) for m in before)]
            else:
                told = [chat[0][1] for chat, raw in said.items() if written.content.encode() in raw]
                assert any(all(m.content in instruction for m in before) for instruction in told)
    assert facts["candidate_tokens"] >= sum(len(m.content.split()) for p in prompts for m in p.messages[1:])


def test_a_chat_is_written_by_one_model(tmp_path: Path):
    source = sources(tmp_path)["multi-turn"]
    assert made("http://127.0.0.1:9", source | {"teacher": "toy"}).prompts[0].kind == "multi-turn"
    with pytest.raises(ValueError, match="a prompt has one writer on record"):
        made("http://127.0.0.1:9", source | {"teacher": "other"})


@pytest.mark.parametrize("kind", ["evolve", "personas", "documents", "self-instruct", "multi-turn"])
def test_the_gate_counts_the_writer_of_every_kind(tmp_path: Path, kind: str):
    source = sources(tmp_path)[kind]
    whole = made("http://127.0.0.1:9", source).model_dump(mode="json", exclude_unset=True)
    both = [whole["teacher"], whole["teacher"] | {"model": "second", "terms": "unknown"}]
    recipe = Recipe.model_validate(whole | {"teacher": both, "prompts": [source | {"by": "second"}]})
    found = {(s.name, s.terms) for s in declared(recipe, today()) if s.role == "prompt"}
    assert found == {("second", "unknown")}
