"""Tools, schemas and images, from a row of a prompt file to an example, against the providers' own types."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rfc8785
import runs
import tiny
from anthropic.types import message_create_params
from asking import ask, made
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params
from pydantic import TypeAdapter

import limbeck
from limbeck.collect.contents import tools_of
from limbeck.collect.endpoints.forms import strict
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.files import iter_file_prompts
from limbeck.collect.journal import Journal
from limbeck.curate.curate import curate
from limbeck.errors import InputError, ModelError, PromptError
from limbeck.ledger import verify
from limbeck.ledger.sealing import parse_row, read_rows
from limbeck.models.speech import cannot_call
from limbeck.preflight import preflight
from limbeck.recipe import FilePrompts, Recipe
from limbeck.records import Completion, Message, Prompt, Split, ToolCall, Verdict
from limbeck.render.chat import ChatRenderer, Rendered, Said
from limbeck.rundir import RunDir
from limbeck.tables import read_records
from limbeck.testing import Faults, Malformed, Server, Settings

KINDS = ("openai", "responses", "anthropic")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"answer": {"type": "string"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Weather in Ulm and Bern?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Ulm"}'}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Bern"}'}},
    ]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": "snow"},
]  # fmt: skip
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<call>{\"name\": \"{{ c['function']['name'] }}\", \"arguments\": "
    "{{ c['function']['arguments'] | tojson }}}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(path: Path, *more: dict[str, Any]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in more))
    return {"kind": "file", "path": str(path), "licence": "MIT"}


def seeing(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def plain(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}?"} for n in range(count)]


def body_of(recipe: Recipe, prompt: Prompt) -> dict[str, Any]:
    (settings,) = recipe.teachers
    assert settings.kind != "local"
    teacher = Endpoint(settings, recipe.collect, recipe.seed)
    return json.loads(teacher.wire(teacher.request(prompt, 0)))


FORMS = {
    "openai": completion_create_params.CompletionCreateParamsNonStreaming,
    "responses": response_create_params.ResponseCreateParamsNonStreaming,
    "anthropic": message_create_params.MessageCreateParamsNonStreaming,
}


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_what_the_official_clients_types_say(tmp_path: Path, kind: str):
    (tmp_path / "a.png").write_bytes(PNG)
    look = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "image_url", "image_url": {"url": "https://example.org/b.png"}}]  # fmt: skip
    source = rows(tmp_path / "p.jsonl", {"messages": HISTORY, "tools": [WEATHER], "json_schema": SCHEMA},
                  {"messages": [{"role": "user", "content": look}]})  # fmt: skip
    more = {} if kind == "anthropic" else {"logprobs": 5}
    recipe = made("http://127.0.0.1:9", source, kind=kind, **more)
    for row in iter_file_prompts(FilePrompts.model_validate(source)):
        prompt = Prompt(id=row.id, messages=row.messages, source="s", licence="MIT", split=Split.TRAIN,
                        **row.wanted._asdict())  # fmt: skip
        body = body_of(recipe, prompt)
        hints = get_type_hints(FORMS[kind])
        # Anthropic's newest client has no temperature; older models take it, and `omit` leaves it out.
        body.pop("temperature", None)
        assert set(body) <= set(hints)
        for key, value in body.items():
            TypeAdapter(hints[key]).validate_python(value, strict=False)
        assert ("tools" in body) == (row.wanted.tools is not None)
    image = json.dumps(body)
    assert base64.b64encode(PNG).decode() in image
    assert "https://example.org/b.png" in image
    (own, elsewhere) = [part for part in prompt.messages[0].parts or () if part.image]
    assert own.digest == "sha256:" + hashlib.sha256(PNG).hexdigest()
    assert elsewhere.digest is None


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_kept_apart_and_conversations_with_results_go_on(tmp_path: Path, kind: str):
    source = rows(tmp_path / "p.jsonl", *plain(6), {"messages": HISTORY})
    with Server(Settings(words=8)) as server:
        recipe = made(server.url, source, kind=kind, tools=[WEATHER])
        facts, answers = ask(recipe, tmp_path / "run")
    *called, told = answers
    assert {c.finish_reason for c in called} == {"tool_calls"}
    for completion in called:
        assert completion.tool_calls is not None
        (call,) = completion.tool_calls
        assert (call.name, completion.text, bool(call.id)) == ("weather", "", True)
        jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])
        assert completion.tools is not None
        assert completion.tools[0].name == "weather"
    assert (told.finish_reason, told.tool_calls, bool(told.text)) == ("stop", None, True)  # the results were seen
    assert facts["finish_reasons"] == {"stop": 1, "tool_calls": 6}
    assert all(c.answers(c.prompt_id) for c in answers)
    assert len({c.id for c in answers}) == 7


def test_a_rows_own_schema_and_tools_win_and_make_another_prompt(tmp_path: Path):
    own = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    source = rows(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a", "json_schema": own}, {"prompt": "b"},
                  {"prompt": "a", "json_schema": json.dumps(own)}, *plain(4))  # fmt: skip
    with Server(Settings(words=8)) as server:
        facts, answers = ask(made(server.url, source, json_schema=SCHEMA), tmp_path / "run")
    assert facts["answers"] == 7  # the fourth row is the second again
    assert [c.json_schema for c in answers[:3]] == [SCHEMA, own, SCHEMA]
    assert not any(c.mismatch for c in answers)
    assert strict(SCHEMA)
    assert not strict(own)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "a", "tools": [WEATHER, WEATHER]}, "weather twice"),
        ({"prompt": "a", "json_schema": {"type": "no such type"}}, "json_schema, at type"),
        ({"prompt": "a", "json_schema": "{"}, "json_schema: {"),
        ({"messages": [*HISTORY[:3], {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, "c9"),
        ({"messages": [HISTORY[1], {"role": "assistant", "content": None}, HISTORY[1]]}, "content: null"),
        (seeing("no.png"), "no.png"),
        (seeing("a.bmp"), "a.bmp"),
        (seeing("data:image/png;base64,@@"), "base64"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(tmp_path: Path, row: dict[str, Any], said: str):
    source = rows(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(PromptError) as error:
        list(iter_file_prompts(FilePrompts.model_validate(source)))
    (problem,) = error.value.problems
    assert said in problem.found
    assert problem.where.endswith("p.jsonl:2")
    assert problem.remedy


def test_answers_to_images_are_dropped_for_students_that_read_text(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(PNG)
    look = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]}
    with Server(Settings(words=8)) as server:
        recipe = made(
            server.url, rows(tmp_path / "p.jsonl", *plain(6), look), teacher={"price": {"input": 1, "output": 1}}
        )
        ask(recipe, tmp_path / "run")
    curate(recipe, RunDir(tmp_path / "run"))
    verdicts = list(read_records(tmp_path / "run" / "verdicts.parquet", Verdict))
    assert [v.filter for v in verdicts if not v.keep] == ["images"]
    assert "1 image in the prompt" in next(v.reason for v in verdicts if not v.keep)


def test_what_a_request_can_cost_covers_images_and_tools(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(PNG)
    said = 'the words "type":"image_url" and "tools":[ are text here'
    source = rows(
        tmp_path / "p.jsonl", {"prompt": said}, {"prompt": said, "tools": [WEATHER]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}] * 2}]},
    )  # fmt: skip
    recipe = made("http://127.0.0.1:9", source)
    (settings,) = recipe.teachers
    assert settings.kind != "local"
    teacher, beyond = Endpoint(settings, recipe.collect, 0), []
    for row in iter_file_prompts(FilePrompts.model_validate(source)):
        prompt = Prompt(id=row.id, messages=row.messages, source="s", licence="MIT", split=Split.TRAIN,
                        **row.wanted._asdict())  # fmt: skip
        wire = teacher.wire(teacher.request(prompt, 0))
        beyond.append(teacher.bound(wire).prompt - len(wire))
    assert beyond == [512, 512 + 1024, 512 + 2 * 50_000]


# Rendering


def answer_with_calls(*calls: ToolCall) -> Said:
    return Said("Let me see.", calls, tools_of([WEATHER]))


def test_calls_are_rendered_as_the_template_says_and_learned_as_a_whole():
    words = tiny.tokenizer(template=TOOLS_TEMPLATE)
    assert cannot_call(words) is None
    call = ToolCall(name="weather", arguments='{"place": "Ulm", "days": 3}', id="c1")
    user = (Message(role="user", content="Weather in Ulm?"),)
    said = answer_with_calls(call, call)
    out = ChatRenderer(words, "t").render(user, said, stopped=True, created=datetime(2026, 1, 1, tzinfo=UTC))
    assert isinstance(out, Rendered)
    function = {"name": "weather", "arguments": {"place": "Ulm", "days": 3}}
    calls = [{"type": "function", "function": function}] * 2
    chat = [user[0].model_dump(), {"role": "assistant", "content": "Let me see.", "tool_calls": calls}]
    theirs = words.apply_chat_template(chat, tools=[WEATHER], tokenize=True, return_dict=False)
    assert np.array_equal(out.tokens_T, theirs)
    once = '<call>{"name": "weather", "arguments": {"place": "Ulm", "days": 3}}</call>'
    assert words.decode(out.tokens_T[out.mask_T]) == f"Let me see.{once}{once}<|im_end|>"


def test_a_template_without_tools_drops_such_answers_and_says_why(tmp_path: Path):
    assert "says no tools" in (cannot_call(tiny.tokenizer()) or "")
    half = TOOLS_TEMPLATE.replace("{{ c['function']['arguments'] | tojson }}", "")
    assert "no calls" in (cannot_call(tiny.tokenizer(template=half)) or "")
    for name, template in (("with", TOOLS_TEMPLATE), ("without", tiny.CHATML)):
        student = tiny.save(tmp_path / name, layers=1, template=template)
        with Server(Settings(words=8)) as server:
            recipe = made(server.url, rows(tmp_path / "p.jsonl", *plain(8), {"messages": HISTORY[:2]}), tools=[WEATHER])
            recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": str(student)})})
            ask(recipe, tmp_path / f"run-{name}")
        run = RunDir(tmp_path / f"run-{name}")
        if name == "with":
            assert "tools" not in json.dumps(curate(recipe, run)["dropped"])
            continue
        with pytest.raises(InputError, match="dropped by tools"):
            curate(recipe, run)


@pytest.mark.parametrize(
    ("row", "more", "named"),
    [
        ({"prompt": "a"}, {"tools": [WEATHER]}, "collect.tools"),
        ({"prompt": "a", "tools": [WEATHER]}, {}, "1 prompt has tools, the first at"),
        ({"messages": HISTORY}, {}, "p.jsonl:9"),
        ({"prompt": "a"}, {}, None),
    ],
)
def test_a_template_without_tools_is_refused_before_anything_is_paid_for(
    tmp_path: Path, row: dict[str, Any], more: dict[str, Any], named: str | None
):
    def by(template: str) -> Recipe:
        student = tiny.save(tmp_path / f"student-{len(template)}", layers=1, template=template)
        recipe = made(server.url, rows(tmp_path / "p.jsonl", *plain(8), row), **more)
        return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": str(student)})})

    with Server(Settings(words=8)) as server:
        preflight(by(TOOLS_TEMPLATE))
        recipe = by(tiny.CHATML)
        preflight(recipe, answered=True)  # nothing is left to pay for: curating tells what it drops
        if named is None:
            preflight(recipe)
            return
        with pytest.raises(ModelError, match="paid for and then dropped") as error:
            limbeck.run(recipe, tmp_path / "run")
        assert server.bill.received == 0
    (problem,) = error.value.problems
    assert "says no tools" in problem.found
    assert named in problem.found
    assert not (tmp_path / "run").exists()


def test_records_of_plain_text_have_the_digests_they_always_had():
    messages = (Message(role="system", content="s"), Message(role="user", content="Ähren"))
    canonical = '[{"content":"s","role":"system"},{"content":"Ähren","role":"user"}]'
    assert Prompt.id_of(messages) == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert messages[0].model_dump(mode="json") == {"role": "system", "content": "s"}
    assert Completion.model_fields["tool_calls"].default is None


def test_leaves_cover_the_calls_of_answers_and_no_plain_answers_digest_changes(tmp_path: Path):
    """The oracle is rfc8785 over what docs/ledger-format.md says."""
    call = ToolCall(name="weather", arguments='{"place":"Köln"}', id="c1")

    def change(records: runs.Records) -> runs.Records:
        first, *rest = records.completions
        called = first.model_copy(update={"tool_calls": (call,)})
        verdicts = [v._replace(completion=called.id) if v.completion == first.id else v for v in records.verdicts]
        return records._replace(completions=[called, *rest], verdicts=verdicts)

    run = runs.make_run(tmp_path / "run", until="seal", change=change)
    kept = {v.completion for v in read_records(run / "verdicts.parquet", Verdict) if v.keep}
    answers = [c for c in read_records(run / "completions.parquet", Completion) if c.id in kept]
    due: list[tuple[str, str]] = []
    for c in answers:
        said = {"finish_reason": c.finish_reason, "reasoning": c.reasoning, "text": c.text}
        asked = [c.prompt_id, c.sample, c.teacher, c.text, c.reasoning, c.finish_reason]
        calls = [{"arguments": o.arguments, "id": o.id, "name": o.name} for o in c.tool_calls or ()]
        values = (said | {"tool_calls": calls}, [*asked, calls]) if calls else (said, asked)
        due.append(tuple("sha256:" + hashlib.sha256(rfc8785.dumps(value)).hexdigest() for value in values))
    leaves = [parse_row(row).values for row in read_rows(run)]
    assert [(one["completion"], one["parents"]) for one in leaves] == [(a, [["completion", b]]) for a, b in due]
    assert answers[0].tool_calls
    assert not any(c.tool_calls for c in answers[1:])
    (told,) = verify(run).differences  # the journaled answer, of a form without calls, called nothing
    assert told.where.endswith("tool_calls answered")
    table = pq.read_table(run / "completions.parquet")
    place = table.schema.get_field_index("tool_calls")
    for hostile in ("[" * 100_000, "[NaN]", "no JSON"):
        calls = pa.array([hostile, *[None] * (table.num_rows - 1)], pa.string())
        pq.write_table(table.set_column(place, "tool_calls", calls), run / "completions.parquet")
        assert any(one.where == "leaves.parquet" and "cannot be read" in one.found for one in verify(run).differences)


def test_keys_are_nowhere_in_what_goes_beyond_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    key = "sk-limbeck-beyond-0123456789"
    monkeypatch.setenv("TEACHER_KEY", key)
    (tmp_path / "key").write_text(key + "\n")
    places = ({"api_key_env": "TEACHER_KEY"}, {"api_key_file": str(tmp_path / "key")}, {"api_key_env": "TEACHER_KEY"})
    for kind, place in zip(KINDS, places, strict=True):
        with Server(Settings(words=8, api_keys=(key,)), Faults(faults=(Malformed(contains="What is 3"),))) as server:
            more = {"teacher": place, "tools": [WEATHER]} | ({} if kind == "anthropic" else {"logprobs": 3})
            recipe = made(server.url, rows(tmp_path / "p.jsonl", *plain(6), {"messages": HISTORY}), kind=kind, **more)
            ask(recipe, tmp_path / kind)
            assert server.bill.requests == 7
        assert key not in recipe.model_dump_json()
        assert not [p for p in (tmp_path / kind).rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
        with Journal(tmp_path / kind / "journal.db") as journal:  # whose rows are compressed
            for completion in read_records(tmp_path / kind / "completions.parquet", Completion):
                found = journal.get(completion.request_id)
                assert key.encode() not in found.request + found.raw
    assert key not in "".join(capfd.readouterr())
