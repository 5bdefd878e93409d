"""What endpoints answered is read twice: by the collector, and by the verifier on its own. Both read the same."""

from __future__ import annotations

import json
from pathlib import Path

import asked
import pyarrow.parquet as pq
import pytest
import runs
from command import call
from hypothesis import given, settings
from hypothesis import strategies as st
from verifier import second

from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer, Request
from limbeck.ledger import verify
from limbeck.ledger.canonical import digest_bytes
from limbeck.ledger.exchanges import read_exchange
from limbeck.ledger.sealing import read_rows
from limbeck.records import Completion
from limbeck.tables import read_records, write_records

TEACHERS = [Endpoint(one, asked.RECIPE.collect, asked.RECIPE.seed) for one in asked.RECIPE.teachers]
BODIES = (asked.chat, asked.responses, asked.messages)
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
ITEM = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'}
USE = {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": [1, None, "é"]}}
WORDS = st.sampled_from(
    ("stop", "length", "tool_calls", "end_turn", "refusal", "max_tokens", "content_filter", "incomplete", "completed",
     "error", "context_length", "Prompt is too long", "<think>a</think>\n\nb", "<think>a", " <think></think>c", "text",
     "thinking", "output_text", "succeeded", "", "é\u2028\U0001f986")
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(
        WORDS, st.none(), st.booleans(), st.integers(-2, 2**53), st.floats(allow_nan=False, allow_infinity=False)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)
MORE = st.sampled_from(
    ({"tool_calls": [CALL, 3]}, {"error": "moderation"}, {"type": "error"}, {"refusal": "No."}, {"reasoning": "r"},
     {"content": [ITEM, USE, {"type": "refusal", "refusal": "No."}]}, {"reasoning_content": "rc"},
     {"output": [ITEM, {"content": [{"type": "reasoning_text", "text": "why"}]}]}, {"choices": []},
     {"id": "é", "system_fingerprint": ""}, {"id": 1, "system_fingerprint": "fp_1"})
)  # fmt: skip


def somewhere(data: st.DataObject, value: object) -> object:
    """The value with one part of it replaced, left out, or something put beside it."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 9)) == 0:
        return data.draw(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key, copy = data.draw(st.sampled_from(list(keys))), json.loads(json.dumps(value))
    match data.draw(st.integers(0, 6)):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy |= data.draw(MORE)
        case _:
            copy[key] = somewhere(data, value[key])
    return copy


def compare(place: int, raw: bytes) -> None:
    teacher = TEACHERS[place]
    request = teacher.request(asked.prompts_of()[0], 0)
    due, found = teacher.parse(request, raw), read_exchange(request.body, raw)
    assert found is not None
    said = found.said
    assert (said.text, said.reasoning, said.finish_reason, said.model) == due[:4]
    assert (said.prompt_tokens, said.completion_tokens) == due[4:6]
    assert said.batch == teacher.batch(raw)
    assert (found.answer_id, found.fingerprint) == (due.answer_id, due.fingerprint)
    told = [(one.name, one.arguments if isinstance(one.arguments, str) else None, one.id) for one in said.calls]
    assert [(name, id_) for name, _, id_ in told] == [(one.name, one.id) for one in due.tool_calls]
    for one, other in zip(said.calls, due.tool_calls, strict=True):
        same = one.arguments if isinstance(one.arguments, str) else json.loads(other.arguments)
        assert same == (other.arguments if isinstance(one.arguments, str) else one.arguments)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_both_readers_read_the_same_whatever_it_is(data):
    place = data.draw(st.integers(0, 2))
    body: object = BODIES[place](data.draw(st.integers(0, 3)))
    for _ in range(data.draw(st.integers(0, 4))):
        body = somewhere(data, body)
    raw = json.dumps(body).encode()
    match data.draw(st.integers(0, 3)):
        case 0:
            line = json.loads(asked.batch_line(TEACHERS[place].settings.kind, body, 0).split(b"\n", 1)[1])
            line = line if data.draw(st.booleans()) else somewhere(data, line)
            raw = b"\x1ebatch b1\n" + json.dumps(line).encode()
        case 1:
            at = data.draw(st.integers(0, max(0, len(raw) - 1)))
            raw = raw[:at] + data.draw(st.sampled_from((b"", b"\xff", b"NaN", b'"\\ud800"', b"1"))) + raw[at + 1 :]
    compare(place, raw)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"null", b"{", b"\xff", b"\x1ebatch b\n", b"\x1ebatch b\nnull", b'{"a":NaN}']
)
@pytest.mark.parametrize("place", range(3))
def test_what_is_no_answer_is_malformed_to_both(place, raw):
    compare(place, raw)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return asked.make_run(tmp_path_factory.mktemp("asked") / "run")


def test_a_run_of_endpoints_verifies_and_every_answer_was_read(run, capsys):
    found = verify(run)
    assert found.ok, found.differences
    assert not [note for note in found.notes if "only their digest" in note]
    assert second.main([str(run)]) == 0
    assert "journal" in capsys.readouterr().out, "the second verifier says that it does not read answers"
    batches = [one.batch for one in read_records(run / "completions.parquet", Completion)]
    assert {*batches} == {None, "batch_openai", "batch_anthropic"}


ANOTHER = {
    "text": "Another.", "reasoning": "Another.", "finish_reason": "another", "model": "another", "prompt_tokens": 77,
    "completion_tokens": 77, "batch": "another", "sample": 7, "answer_id": "another", "fingerprint": "another",
}  # fmt: skip


@pytest.mark.parametrize("field", ANOTHER)
def test_a_completion_that_says_something_else_than_its_answer_is_named_with_both_values(field, tmp_path):
    """Of each API, once alone and once in a batch: six rows, and everything after recorded as if true."""
    rows = range(6)

    def change(_: runs.Records) -> runs.Records:
        made = asked.records(tmp_path / "run")
        told = [
            one.model_copy(update={field: ANOTHER[field]}) if place in rows else one
            for place, one in enumerate(made.completions)
        ]
        verdicts = [v._replace(completion=c.id, sample=c.sample) for v, c in zip(made.verdicts, told, strict=True)]
        return made._replace(completions=told, verdicts=verdicts)

    root = runs.make_run(tmp_path / "run", recipe=asked.RECIPE, change=change, signed=False)
    word = "asked" if field == "sample" else "answered"
    wheres = [f"journal.db, for completions.parquet: row {row}: {field} {word}" for row in rows]
    found = {one.where: one for one in verify(root).differences}
    assert [where for where in found if where.startswith("journal.db")] == wheres
    assert {one.expected for where, one in found.items() if where in wheres} == {
        f"{ANOTHER[field]}, as the completion says"
    }
    original = [getattr(one, field) for one in asked.records(tmp_path / "run").completions]
    assert [found[where].found for where in wheres] == [str(original[row]) for row in rows]


def test_a_leaf_names_what_the_provider_named(run):
    """Each answer as its provider's own bytes have it, and no other."""
    told = [json.loads(row.fields) for row in read_rows(run)]
    ids = {one.response: one.answer_id for one in read_records(run / "completions.parquet", Completion)}
    assert len(told) > 6
    assert all(one["response"]["id"] == ids[one["response"]["digest"]] for one in told)
    assert {one["response"]["id"].partition("_")[0].partition("-")[0] for one in told} == {"chatcmpl", "resp", "msg"}
    for one in told:
        fingerprint = f"fp_{int(one['response']['id'][-1]) % 2}" if one["teacher"] == "chat-1" else None
        assert one["weights"] == {"digest": None, "fingerprint": fingerprint}


def without_names(path: Path, names: tuple[str, ...] = ("answer_id", "fingerprint")) -> None:
    """Completions as an earlier release wrote them."""
    pq.write_table(pq.read_table(path).drop_columns([*names]), path)


def test_names_are_not_got_rid_of_with_their_columns(tmp_path):
    """Where a leaf has them, the records have to; and both columns or none."""
    run = asked.make_run(tmp_path / "run")
    without_names(run / "completions.parquet")
    found = [one.where for one in verify(run).differences]
    assert len([where for where in found if where.endswith(": response")]) == len(list(read_rows(run)))
    assert "leaves.parquet: row 0: weights" in found
    one = asked.make_run(tmp_path / "one", until="collect")
    without_names(one / "completions.parquet", ("fingerprint",))
    wheres = [each.where for each in verify(one).differences]
    assert "journal.db, for completions.parquet: row 0: fingerprint answered" in wheres
    assert "journal.db, for completions.parquet: row 1: fingerprint answered" not in wheres, "it has none"


def test_a_run_of_an_earlier_release_goes_on_without_the_names(tmp_path, monkeypatch, capsys):
    """Its table is read and sealed as it is; that the answers say more is a note, and no difference."""
    monkeypatch.setitem(
        runs._WRITERS,
        "collect",
        lambda root, r: [
            write_records(root / "completions.parquet", r.completions, Completion),
            without_names(root / "completions.parquet"),
        ],
    )
    run = asked.make_run(tmp_path / "run")
    assert {one.answer_id for one in read_records(run / "completions.parquet", Completion)} == {None}
    found = verify(run)
    assert found.ok, found.differences
    (note,) = [note for note in found.notes if "no column" in note]
    assert note.endswith(": 11"), "one answer of twelve is an error, which has no id"
    assert second.main([str(run)]) == 0, capsys.readouterr()
    assert {json.loads(row.fields)["response"]["id"] for row in read_rows(run)} == {None}


def test_an_answer_to_another_question_is_named(tmp_path):
    """The request of one prompt stands for another's: all digests agree, and the messages do not."""

    def change(_: runs.Records) -> runs.Records:
        made = asked.records(tmp_path / "run")
        one, other = made.completions[3], made.completions[6]
        taken = ("request_id", "response", "text", "reasoning", "finish_reason", "prompt_tokens", "batch",
                 "answer_id", "fingerprint")  # fmt: skip
        told = [*made.completions]
        told[3] = one.model_copy(update={name: getattr(other, name) for name in taken})
        verdicts = [v._replace(completion=c.id) for v, c in zip(made.verdicts, told, strict=True)]
        return made._replace(completions=told, verdicts=verdicts)

    root = runs.make_run(tmp_path / "run", recipe=asked.RECIPE, change=change, signed=False)
    result = call("ledger", "verify", root)
    assert result.exit_code == 1
    assert "row 3: messages asked" in result.output
    assert "duck 2" in result.output


def test_calls_are_held_against_the_answer(tmp_path):
    """Arguments that came as an object are the same in any spelling."""
    body = {**asked.messages(0), "content": [USE], "stop_reason": "tool_use"}
    raw, teacher = json.dumps(body).encode(), TEACHERS[2]
    root = asked.make_run(tmp_path / "run", signed=False, until="collect")
    prompt = asked.prompts_of()[0]
    with Journal(root / "journal.db") as journal:
        request = teacher.request(prompt, 0)
        other = Request.of(json.loads(request.body) | {"endpoint": "elsewhere"})
        journal.put_group([Answer(other, raw)])
        created = journal.get(other.key).created
    read = teacher.parse(other, raw)
    path = root / "completions.parquet"
    rows = list(read_records(path, Completion))
    rows[2] = rows[2].model_copy(
        update={
            "request_id": other.key, "response": digest_bytes(raw), "created": created, "text": "", "reasoning": None,
            "finish_reason": "tool_calls", "tool_calls": read.tool_calls,
        }
    )  # fmt: skip

    def told() -> list[str]:
        write_records(path, rows, Completion)
        return [one.where for one in verify(root).differences if one.where.startswith("journal.db")]

    assert told() == []
    changed = read.tool_calls[0].model_copy(update={"arguments": '{"at": [2]}'})
    for calls in ((changed,), None, (*read.tool_calls, changed)):
        rows[2] = rows[2].model_copy(update={"tool_calls": calls})
        assert told() == ["journal.db, for completions.parquet: row 2: tool_calls answered"]
