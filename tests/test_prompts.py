"""Prompt files, and the stage that makes prompts.parquet of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.collect.files import iter_file_prompts
from limbeck.collect.prompts import gather
from limbeck.collect.split import hold_out, rank, reserve
from limbeck.errors import InputError, PromptError
from limbeck.recipe import FilePrompts, Recipe
from limbeck.records import Prompt, Split
from limbeck.rundir import RunDir
from limbeck.tables import read_records

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Ä, b"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": 'And "c"?\nOr d,\x07 e\u202e?'},
]
ROWS: list[dict[str, object]] = [{"prompt": "What is a still?"}, {"messages": CHAT}, {"prompt": " so\ttoo "}]


def source(path: Path, **more) -> FilePrompts:
    return FilePrompts.model_validate({"path": str(path), **more})


def write(path: Path, rows: list[dict[str, object]], *, text: bool = False) -> Path:
    """The same rows in the format of the suffix; `text`: messages as JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            sheet = csv.DictWriter(file, names, restval="")
            sheet.writeheader()
            cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            sheet.writerows(cells)
    else:
        lists = [row.get("messages") for row in rows]
        columns: dict[str, object] = {name: [row.get(name) for row in rows] for name in names}
        if text and "messages" in names:
            columns["messages"] = [v if v is None else json.dumps(v) for v in lists]
        pq.write_table(pa.table(columns), path)
    return path


def chats(path: Path, **more) -> list[list[dict[str, str]]]:
    return [[m.model_dump() for m in row.messages] for row in iter_file_prompts(source(path, **more))]


def problems(path: Path, **more) -> list[str]:
    """What is wrong with a file, each problem as text."""
    with pytest.raises(PromptError) as error:
        list(iter_file_prompts(source(path, **more)))
    assert all(p.where and p.found and p.expected and p.remedy for p in error.value.problems)
    assert all(c.isprintable() or c == "\n" for c in str(error.value))
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "P.CSV", "text.parquet"])
def test_all_formats_give_the_same_messages(tmp_path: Path, name: str):
    made = write(tmp_path / name.lower(), ROWS, text=name.startswith("text"))
    expected = [
        [{"role": "user", "content": "What is a still?"}],
        CHAT,
        [{"role": "user", "content": " so\ttoo "}],
    ]
    assert chats(made.rename(tmp_path / name)) == expected


def test_rows_say_where_they_stand(tmp_path: Path):
    jsonl = tmp_path / "p.jsonl"
    jsonl.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n   \n{"prompt": "b"}')
    assert [row.where for row in iter_file_prompts(source(jsonl))] == [f"{jsonl}:1", f"{jsonl}:4"]
    sheet = tmp_path / "p.csv"
    sheet.write_bytes(b'\xef\xbb\xbfprompt,x\r\n"two\nlines",1\r\n\r\nlast,2\r\n')
    assert [row.where for row in iter_file_prompts(source(sheet))] == [f"{sheet}:2", f"{sheet}:5"]
    table = write(tmp_path / "p.parquet", ROWS)
    assert [row.where for row in iter_file_prompts(source(table))] == [f"{table}: row {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_named_column_and_a_named_format(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"p{suffix}", [{"question": "[why]?", "prompt": "not this"}])
    path = path.rename(tmp_path / "p.data")
    assert chats(path, column="question", format=suffix[1:]) == [[{"role": "user", "content": "[why]?"}]]
    assert "suffix .data" in problems(path, column="question")[0]


def test_a_list_of_messages_may_stand_in_any_column(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", [{"prompt": CHAT}, {"prompt": CHAT, "chat": CHAT[:2]}])
    assert chats(path) == [CHAT, CHAT]
    assert chats(write(tmp_path / "q.parquet", [{"chat": CHAT}]), column="chat") == [CHAT]


def test_long_fields_are_read(tmp_path: Path):
    long = "word " * 60_000
    assert chats(write(tmp_path / "p.csv", [{"prompt": long}])) == [[{"role": "user", "content": long}]]


WRONG_LINES = {
    b'{"prompt": ""}': "prompt: empty",
    b'{"prompt": " \\n\\t"}': "the user's message is  \\n\\t",
    b'{"prompt": null}': "prompt: null",
    b'{"prompt": 7}': "prompt: 7",
    b'{"text": "a"}': "keys text",
    b"{}": "keys none",
    b'["a"]': '["a"]',
    b'{"prompt": "a"': "not JSON",
    b"prompt": "not JSON",
    b"[" * 100_000: "not JSON (RecursionError",
    b'{"n": 1' + b"0" * 5000 + b"}": "not JSON (ValueError",
    b'{"prompt": "\xff\xfe"}': "not UTF-8",
    b'{"prompt": "a", "x": "\xed\xa0\x80"}': "not UTF-8",
    b'{"prompt": "half \\ud800"}': "half of a character, \\ud800",
    b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}': "both messages and prompt",
    b'{"messages": []}': "messages: []\n    expected: at least the user's message",
    b'{"messages": "hello"}': "messages: hello",
    b'{"messages": "{}"}': "messages: {}",
    b'{"messages": {"role": "user", "content": "b"}}': 'messages: {"role"',
    b'{"messages": ["hello"]}': "messages[0]: hello",
    b'{"messages": [{"role": "User", "content": "b"}]}': "messages[0].role: User",
    b'{"messages": [{"role": ["user"], "content": "b"}]}': 'messages[0].role: ["user"]',
    b'{"messages": [{"role": "user"}]}': "messages[0].content: null",
    b'{"messages": [{"role": "user", "content": [{"text": "b"}]}]}': "messages[0].content: [{",
    b'{"messages": [{"role": "user", "content": "b", "tool_calls": []}]}': "tool_calls",
    b'{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}': (
        "messages ends with a message of assistant"
    ),
    b'{"prompt": {"a\\u001b[31m": "\\u202e"}}': 'prompt: {"a\\u001b[31m": "\\u202e"}',
}


def test_every_wrong_row_is_named_with_what_was_found(tmp_path: Path):
    path, shown = tmp_path / "p.jsonl", 20
    lines = [b'{"prompt": "fine"}', *WRONG_LINES]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(PromptError, match=f"{len(WRONG_LINES)} wrong rows, the first {shown}"):
        list(iter_file_prompts(source(path)))
    assert [p.split("\n")[0] for p in problems(path)] == [f"{path}:{n + 2}" for n in range(shown)]
    for line, found in WRONG_LINES.items():
        path.write_bytes(line)
        (problem,) = problems(path)
        assert found in problem
        assert len(problem) < 700


def test_good_rows_come_before_the_error(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{}\n{"prompt": "b"}\n')
    seen = []
    with pytest.raises(PromptError, match="1 wrong row"):
        seen.extend(row.messages[0].content for row in iter_file_prompts(source(path)))
    rows = iter_file_prompts(source(path))
    assert [next(rows).messages[0].content, next(rows).messages[0].content] == ["a", "b"]


def test_wrong_tables(tmp_path: Path):
    sheet = tmp_path / "p.csv"
    for content, found in {
        b"": "no prompts",
        b"prompt\n": "no prompts",
        b"question,answer\na,b\n": "question, answer",
        b"prompt,prompt\na,b\n": "twice",
        b"prompt,x\na\n": "1 fields",
        b"prompt,x\na, b, c\n": "3 fields",
        b'prompt,x\n"a" b,c\n': "not CSV",
        b'prompt\n"open': "not CSV",
        b"prompt\nab\xffcd\n": "0xff",
        b"messages\nhello\n": "messages: hello",
    }.items():
        sheet.write_bytes(content)
        assert found in problems(sheet)[0], content
    table = tmp_path / "p.parquet"
    table.write_bytes(b"PAR1 no more than that PAR1")
    assert "not a Parquet file" in problems(table)[0]
    pq.write_table(pa.table({"prompt": [1, 2]}), table)
    assert [p.split("\n")[0] for p in problems(table)] == [f"{table}: row 1", f"{table}: row 2"]
    pq.write_table(pa.table({"a": ["b"]}), table)
    assert "columns a" in problems(table)[0]
    bad = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"prompt": bad}), table)
    assert "not UTF-8" in problems(table)[0]
    assert f"{table}: row 2" in problems(table)[0]
    data = bytearray(write(table, [{"prompt": f"{n} {'x' * n}"} for n in range(3000)]).read_bytes())
    data[200:9000] = b"\0" * 8800
    table.write_bytes(data)
    assert "damaged" in problems(table)[0]


def test_files_that_are_not_there(tmp_path: Path):
    assert "no such file" in problems(tmp_path / "p.jsonl")[0]
    assert "a directory" in problems(tmp_path)[0]
    (tmp_path / "p.txt").write_text("a")
    assert "suffix .txt" in problems(tmp_path / "p.txt")[0]
    (tmp_path / "e.jsonl").write_text("\n \n")
    assert "no prompts" in problems(tmp_path / "e.jsonl")[0]


def test_limit_counts_different_prompts_and_reads_no_further(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    texts = ["a", "a", "b", "a", "c"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts) + "broken")
    got = [row.messages[0].content for row in iter_file_prompts(source(path, limit=3))]
    assert got == texts
    assert "not JSON" in problems(path, limit=4)[0]


@given(st.sets(st.text(max_size=8), min_size=1, max_size=60), st.integers(1, 80), st.randoms())
def test_the_split_depends_on_content_only(texts: set[str], held_out: int, moments):
    ids = [Prompt.id_of(()) + text for text in texts]
    shuffled = moments.sample(ids, len(ids))
    if len(ids) <= held_out:
        with pytest.raises(InputError, match=rf"evaluate\.held_out: {held_out}") as error:
            hold_out(ids, held_out)
        assert str(len(ids)) in error.value.problems[0].found
        return
    held = hold_out(ids, held_out)
    assert held == hold_out(shuffled, held_out)
    assert held_out <= len(held) == reserve(len(ids), held_out) < len(ids)
    assert len(held) <= max(held_out, len(ids) // 2)
    kept = set(ids) - held
    assert max(rank(i) for i in held) < min(rank(i) for i in kept)


def recipe(*prompts: dict, held_out: int = 2) -> Recipe:
    return Recipe.model_validate({
        "name": "t", "teacher": {"model": "/nowhere"}, "prompts": prompts,
        "student": {"kind": "pruned", "layers": 1}, "evaluate": {"held_out": held_out},
    })  # fmt: skip


def gathered(run: Path, *prompts: dict, held_out: int = 2) -> tuple[list[Prompt], dict]:
    facts = gather(recipe(*prompts, held_out=held_out), RunDir(run))
    return list(read_records(run / "prompts.parquet", Prompt)), facts


def file(path: Path, **more) -> dict:
    return {"kind": "file", "path": str(path), **more}


def test_equal_prompts_are_kept_once_from_the_first_source(tmp_path: Path):
    one = write(tmp_path / "one.jsonl", [{"prompt": t} for t in "abca"])
    two = write(tmp_path / "two.csv", [{"prompt": t} for t in "dbe"])
    prompts, facts = gathered(tmp_path / "run", file(one, licence="MIT"), file(two))
    assert [(p.messages[0].content, p.source, p.licence) for p in prompts] == [
        ("a", str(one), "MIT"), ("b", str(one), "MIT"), ("c", str(one), "MIT"),
        ("d", str(two), "unknown"), ("e", str(two), "unknown"),
    ]  # fmt: skip
    assert all(p.id == Prompt.id_of(p.messages) and p.writer is None for p in prompts)
    assert (facts["prompts"], facts["duplicates"], facts["train"], facts["held_out"]) == (5, 2, 3, 2)
    assert [(s["rows"], s["kept"], s["duplicates"]) for s in facts["sources"]] == [(4, 3, 1), (3, 2, 1)]
    assert json.loads(json.dumps(facts)) == facts


@given(order=st.permutations(range(12)), cut=st.integers(0, 12))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reordering_and_moving_rows_changes_no_split(tmp_path: Path, order: list[int], cut: int):
    texts = [f"Question {n}" for n in order]
    parts = [
        file(write(tmp_path / f"{name}.jsonl", [{"prompt": t} for t in part]))
        for name, part in (("a", texts[:cut]), ("b", texts[cut:]))
        if part
    ]
    prompts, _ = gathered(tmp_path / "run", *parts, held_out=3)
    assert [p.messages[0].content for p in prompts] == texts
    held = {p.messages[0].content for p in prompts if p.split is Split.HELD_OUT}
    everything = sorted((f"Question {n}" for n in range(12)), key=lambda t: rank(_id(t)))
    assert held == set(everything[:5])  # half as many again as are scored, rounded up


def _id(text: str) -> str:
    from limbeck.records import Message

    return Prompt.id_of((Message(role="user", content=text),))


def test_too_few_prompts_leave_nothing_behind(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError) as error:
        gathered(tmp_path / "run", file(path), held_out=2)
    (problem,) = error.value.problems
    assert "2 different prompts" in problem.found
    assert "at least 3" in problem.expected
    assert "at least 1 more" in problem.remedy
    assert "at most 1" in problem.remedy
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from limbeck.collect import prompts as module

    path = write(tmp_path / "p.jsonl", [{"prompt": t} for t in "abcd"])
    (tmp_path / "run").mkdir()

    def meddling(ids, held_out):
        write(path, [{"prompt": t} for t in "abcx"])
        return hold_out(ids, held_out)

    monkeypatch.setattr(module, "hold_out", meddling)
    with pytest.raises(PromptError, match="changed"):
        gathered(tmp_path / "run", file(path))
    assert list((tmp_path / "run").iterdir()) == []
