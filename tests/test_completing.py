"""completions.parquet is the same file, byte for byte, whether its rows were made while requests were under way or from
the journal afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from asking import ask, file_of, made
from hypothesis import given
from hypothesis import strategies as st

from limbeck.collect import completing
from limbeck.collect.collect import collect
from limbeck.collect.completing import Ahead, Asked
from limbeck.collect.contents import Wanted
from limbeck.collect.journal import Journal, Kept
from limbeck.collect.teachers import Parsed, Request
from limbeck.ledger.canonical import digest_bytes
from limbeck.records import Completion, Message, Prompt, Split, TeacherIdentity, Tool, ToolCall
from limbeck.rundir import RunDir
from limbeck.tables import read_records, write_records
from limbeck.testing import Faults, Server, ServerError, Settings, Truncated
from limbeck.testing.faults import Delay, Fault, Withheld


def from_journal(recipe, run: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The file that is made of a finished run's journal when nothing is made ahead."""
    place.mkdir()
    for name in ("prompts.parquet", "journal.db"):
        shutil.copy(run / name, place / name)
    with monkeypatch.context() as patched:
        patched.setattr(Ahead, "expect", lambda *_: None)
        again = RunDir(place)
        again.offline = True
        collect(recipe, again)
    return (place / "completions.parquet").read_bytes()


def records_make_the_same(path: Path) -> None:
    """Its rows, read as records, which checks every field, and written as records."""
    again = path.with_name("again.parquet")
    write_records(again, read_records(path, Completion), Completion)
    assert again.read_bytes() == path.read_bytes()


FAULTS: dict[str, tuple[Fault, ...]] = {
    "out of order": (Delay(seconds=0.15, probability=0.1), Delay(seconds=0.03, probability=0.5)),
    "sent again": (ServerError(status=503, probability=0.1, attempts=1), Delay(seconds=0.02, probability=0.5)),
    "cut off and refused": (Truncated(share=0.3, probability=0.3), Withheld(kind="refusal", probability=0.2)),
}


@pytest.mark.parametrize("kind", ["openai", "responses", "anthropic"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_file_hangs_on_the_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str):
    monkeypatch.setattr("limbeck.collect.endpoints.sending._BACKOFF", 0.05)
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 64)
    with Server(Settings(words=20, delay=0.002), Faults(faults=FAULTS[name])) as server:
        recipe = made(server.url, file_of(tmp_path, 150), kind=kind, samples=2)
        ask(recipe, tmp_path / "run")
    ahead = (tmp_path / "run" / "completions.parquet").read_bytes()
    assert ahead == from_journal(recipe, tmp_path / "run", tmp_path / "again", monkeypatch)
    records_make_the_same(tmp_path / "run" / "completions.parquet")


def test_rows_are_what_their_records_would_write(tmp_path: Path):
    """Tools, calls, results, images and schemas too."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    rows = [
        {"prompt": 'A "quoted" line\n\t\u2028 \U0001f600 \x7f \\'},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]},
        {"prompt": "Look.", "tools": [tool]},
        {"prompt": "Say it in JSON.", "json_schema": {"type": "object", "required": ["é"]}},
        {
            "messages": [
                {"role": "user", "content": "Look."},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "A cat."},
            ],
            "tools": [tool],
        },
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Server(Settings(words=20)) as server:
        recipe = made(server.url, {"kind": "file", "path": str(path), "licence": "MIT"})
        _, found = ask(recipe, tmp_path / "run")
    assert len(found) == len(rows)
    records_make_the_same(tmp_path / "run" / "completions.parquet")


def test_every_value_of_a_row_stands_under_its_own_name():
    """Two texts that change places make a file that can be read, and says something else."""
    schema, tool, call = {"type": "string"}, Tool(name="look"), ToolCall(name="look", arguments="{}", id="c")
    said = (Message(role="user", content="Why?"),)
    digests = [digest_bytes(bytes([n])) for n in range(4)]
    prompt = Prompt(id=digests[0], messages=said, source="a file", licence="MIT", split=Split.HELD_OUT)
    identity = TeacherIdentity(name="name", kind="openai", provider="provider", route="router", model="asked for",
                               weights=digests[1], terms="own-model")  # fmt: skip
    parsed = Parsed("text", "reasoning", "stop", "model", 3, 5, tool_calls=(call,))
    asked = Asked(Request(digests[2], b"{}"), prompt, 7, SimpleNamespace(identity=identity))  # type: ignore[arg-type]
    kept = Kept(digests[3], datetime(2026, 1, 2, tzinfo=UTC))
    values = completing._values(asked, parsed, kept, "batch", Wanted((tool,), schema), "differs")
    fields = dict(zip(Completion.model_fields, values, strict=True))
    assert fields == Completion(
        prompt_id=digests[0], sample=7, messages=said, text="text", reasoning="reasoning", finish_reason="stop",
        model="model", teacher="name", provider="provider", route="router", weights=digests[1], terms="own-model",
        prompt_tokens=3, completion_tokens=5, created=datetime(2026, 1, 2, tzinfo=UTC), request_id=digests[2],
        response=digests[3], split=Split.HELD_OUT, batch="batch", tools=(tool,), tool_calls=(call,), json_schema=schema,
        mismatch="differs",
    ).__dict__  # fmt: skip


@given(st.lists(st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.text())))
def test_messages_are_written_as_every_record_writes_them(messages):
    assert completing._chat_text(tuple(messages)) == json.dumps(
        [{"role": m.role, "content": m.content} for m in messages], ensure_ascii=False
    )


@pytest.mark.parametrize("busy", [0.0, 1e9], ids=["never to spare", "always to spare"])
def test_the_file_is_the_same_however_busy_the_processor_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: float
):
    monkeypatch.setattr(completing, "_BUSY", busy)
    monkeypatch.setattr(completing, "_HELD", 100)
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 16)
    waiting, expect = [], Ahead.expect

    def watched(self: Ahead, stretch, lacking) -> None:
        expect(self, stretch, lacking)
        waiting.append(len(self._waiting))

    monkeypatch.setattr(Ahead, "expect", watched)
    with Server(Settings(words=20, delay=0.002)) as server:
        recipe = made(server.url, file_of(tmp_path, 400))
        ask(recipe, tmp_path / "run")
    assert max(waiting) <= 100
    assert busy or max(waiting) > 84  # who has no time lets as many wait as may, and no more
    monkeypatch.undo()
    ahead = (tmp_path / "run" / "completions.parquet").read_bytes()
    assert ahead == from_journal(recipe, tmp_path / "run", tmp_path / "again", monkeypatch)


@pytest.mark.parametrize("most", [(100, 2**20), (10**6, 5000)], ids=["rows", "bytes"])
def test_no_more_than_so_many_rows_wait_for_a_late_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most):
    monkeypatch.setattr(completing, "_HELD", most[0])
    monkeypatch.setattr(completing, "_HELD_BYTES", most[1])
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 16)
    waiting = []
    expect = Ahead.expect

    def watched(self: Ahead, stretch, lacking) -> None:
        expect(self, stretch, lacking)
        waiting.append(len(self._waiting))

    monkeypatch.setattr(Ahead, "expect", watched)
    late = (Delay(seconds=0.6, contains="What is 3 and 4"),)
    with Server(Settings(words=20, delay=0.002), Faults(faults=late)) as server:
        recipe = made(server.url, file_of(tmp_path, 400))
        ask(recipe, tmp_path / "run")
    assert 16 <= max(waiting) <= 100
    assert len(waiting) == 25  # the late one held nobody else up
    monkeypatch.undo()
    ahead = (tmp_path / "run" / "completions.parquet").read_bytes()
    assert ahead == from_journal(recipe, tmp_path / "run", tmp_path / "again", monkeypatch)


def test_what_was_there_already_takes_its_place_between_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half of the answers, here and there, come from the journal."""
    with Server(Settings(words=20, delay=0.002)) as server:
        recipe = made(server.url, file_of(tmp_path, 200))
        ask(recipe, tmp_path / "run")
        first = list(read_records(tmp_path / "run" / "completions.parquet", Completion))
        (tmp_path / "half").mkdir()
        with Journal(tmp_path / "run" / "journal.db") as whole, Journal(tmp_path / "half" / "journal.db") as half:
            whole.copy_to(half, [c.request_id for n, c in enumerate(first) if n % 7 in (0, 2, 3) or 60 < n < 90])
            kept = len(half)
        facts, second = ask(recipe, tmp_path / "half")
        assert facts["from_journal"] == kept
        assert facts["generated"] == 200 - kept
    assert [c.id for c in first] == [c.id for c in second]
    ahead = (tmp_path / "half" / "completions.parquet").read_bytes()
    assert ahead == from_journal(recipe, tmp_path / "half", tmp_path / "again", monkeypatch)


def test_requests_that_are_alike_are_two_rows_of_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A row that names the recipe's tools itself is another prompt, and the same request where an API takes no seed."""
    tool = {"type": "function", "function": {"name": "look", "description": None, "parameters": {"type": "object"}}}
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 2)
    rows = [{"prompt": f"What is {n}?", **({"tools": [tool]} if twin else {})} for n in range(20) for twin in (0, 1)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Server(Settings(words=20, delay=0.01)) as server:
        recipe = made(server.url, {"kind": "file", "path": str(path), "licence": "MIT"}, kind="anthropic", tools=[tool])
        _, found = ask(recipe, tmp_path / "run")
    assert len(found) == 40
    assert len({c.request_id for c in found}) == 20
    ahead = (tmp_path / "run" / "completions.parquet").read_bytes()
    assert ahead == from_journal(recipe, tmp_path / "run", tmp_path / "again", monkeypatch)


@pytest.mark.parametrize("threshold", [(700, 10, 10), (0, 10, 10), (10**6, 5, 5)])
def test_garbage_is_looked_for_afterwards_as_before(tmp_path: Path, threshold, monkeypatch: pytest.MonkeyPatch):
    """However collecting ends; and where it is switched off (0), it stays so."""
    during = []
    add = completing.Completing.add

    def watched(self, *args) -> None:
        during.append(gc.get_threshold())
        add(self, *args)
        if len(during) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(completing.Completing, "add", watched)
    before = gc.get_threshold()
    gc.set_threshold(*threshold)
    try:
        with Server(Settings(words=8)) as server, pytest.raises(OSError, match="No space"):
            ask(made(server.url, file_of(tmp_path, 10)), tmp_path / "run")
        assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)
    assert {rarely[0] for rarely in during} == {threshold[0] and max(threshold[0], 200_000)}


def test_it_can_be_collected_where_an_event_loop_runs_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a notebook; more prompts than one stretch."""
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 16)
    with Server(Settings(words=20)) as server:
        recipe = made(server.url, file_of(tmp_path, 60))

        async def cell() -> int:
            return len(ask(recipe, tmp_path / "run")[1])

        assert asyncio.run(cell()) == 60


def test_a_full_disk_ends_the_stage_and_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """completions.parquet cannot be written while requests are under way; nothing half-written stays."""
    monkeypatch.setattr("limbeck.collect.collect._STRETCH_SENT", 16)
    with Server(Settings(words=20)) as server:
        recipe = made(server.url, file_of(tmp_path, 100))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(completing.Completing, "add", full)
            with pytest.raises(OSError, match="No space left"):
                ask(recipe, tmp_path / "run")
        assert sorted(path.name for path in (tmp_path / "run").glob("*completions*")) == []
        with Journal(tmp_path / "run" / "journal.db") as journal:
            assert len(journal) == server.bill.requests > 0
        assert len(ask(recipe, tmp_path / "run")[1]) == 100
        assert server.bill.requests == 100
