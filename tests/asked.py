"""A RUN directory whose answers came from endpoints: each API alone and by its batches, in the words of the providers'
references, with nothing sent.
"""

from __future__ import annotations

import json
from pathlib import Path

import runs
from pydantic import JsonValue

from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.journal import Journal
from limbeck.collect.teachers import Answer
from limbeck.ledger.canonical import digest_bytes
from limbeck.recipe import Recipe
from limbeck.records import Completion, Message, Prompt, Verdict

RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "teacher": [
            {"kind": "openai", "model": "chat-1", "terms": "own-model"},
            {"kind": "openai", "api": "responses", "model": "responses-1", "terms": "own-model"},
            {"kind": "anthropic", "model": "messages-1", "terms": "own-model"},
        ],
        "prompts": [{"kind": "file", "path": "eggs.jsonl", "licence": "CC0-1.0"}],
        "student": {"kind": "pretrained", "model": "nowhere"},
        "signal": {"kind": "text"},
        "train": {"loss": "cross_entropy"},
    }
)


def chat(place: int) -> JsonValue:
    message = {"role": "assistant", "content": f"About {place}.", "refusal": None, "annotations": []}
    if place == 1:
        message = {"role": "assistant", "content": f"<think>\nDucks.\n</think>\n\nAbout {place}."}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ("stop", "length")[place % 2]}
    usage = {"prompt_tokens": 9 + place, "completion_tokens": 4, "total_tokens": 13 + place}
    return {
        "id": f"chatcmpl-{place}", "object": "chat.completion", "created": 1741569952, "model": "chat-1-2026",
        "choices": [choice], "usage": usage, "system_fingerprint": f"fp_{place % 2}",
    }  # fmt: skip


def responses(place: int) -> JsonValue:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Count the eggs."}]}
    part = {"type": "output_text", "text": f"Some {place}.", "annotations": []}
    message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}
    ended = {"status": "completed", "incomplete_details": None}
    if place == 2:
        ended = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    usage = {"input_tokens": 36, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 87 + place}
    return {
        "id": f"resp_{place}", "object": "response", "error": None, "model": "responses-1-2026",
        "output": [thought, message], "usage": usage, **ended,
    }  # fmt: skip


def messages(place: int) -> JsonValue:
    content = [{"type": "thinking", "thinking": "Eggs.", "signature": "x"}, {"type": "text", "text": f"Say {place}."}]
    usage = {"input_tokens": 20, "cache_creation_input_tokens": 3, "cache_read_input_tokens": place, "output_tokens": 7}
    return {
        "id": f"msg_{place}", "type": "message", "role": "assistant", "model": "messages-1-2026", "content": content,
        "stop_reason": ("end_turn", "max_tokens", "stop_sequence", "refusal")[place % 4], "usage": usage,
    }  # fmt: skip


def batch_line(kind: str, body: JsonValue, place: int) -> bytes:
    """As it is journaled: the line of results, and the batch before it."""
    line: JsonValue = {"custom_id": f"limbeck-{place}", "result": {"type": "succeeded", "message": body}}
    if kind == "openai":
        answered = {"status_code": 200, "request_id": f"req_{place}", "body": body}
        line = {"id": f"batch_req_{place}", "custom_id": f"limbeck-{place}", "response": answered, "error": None}
    return f"\x1ebatch batch_{kind}\n{json.dumps(line)}".encode()


def answers(teacher: Endpoint, prompts: list[Prompt]) -> list[Answer]:
    """Every other one came in a batch; one was refused before a model saw it."""
    body = {"chat-1": chat, "responses-1": responses, "messages-1": messages}[teacher.identity.name]
    found = []
    for place, prompt in enumerate(prompts):
        said = body(place)
        if place == 3 and teacher.identity.name == "chat-1":
            said = {"error": {"code": "content_filter", "message": "The prompt was filtered."}}
        raw = json.dumps(said).encode()
        if place % 2:
            raw = batch_line(teacher.settings.kind, said, place)
        found.append(Answer(teacher.request(prompt, 0), raw))
    return found


def prompts_of(count: int = 4) -> list[Prompt]:
    """The first with a system message."""
    found = [runs._prompt(place) for place in range(count)]
    said = (Message(role="system", content="Be short."), *found[0].messages)
    return [found[0].model_copy(update={"messages": said, "id": Prompt.id_of(said)}), *found[1:]]


def records(root: Path, recipe: Recipe = RECIPE) -> runs.Records:
    """Every prompt answered by every teacher, as the collector reads it."""
    prompts, completions = prompts_of(), list[Completion]()
    teachers = [Endpoint(settings, recipe.collect, recipe.seed) for settings in recipe.teachers]
    (root / "journal.db").unlink(missing_ok=True)
    with Journal(root / "journal.db") as journal:
        made = {teacher.identity.name: answers(teacher, prompts) for teacher in teachers}
        journal.put_group([answer for several in made.values() for answer in several])
        created = journal.get(made["chat-1"][0].request.key).created
    for place, prompt in enumerate(prompts):
        for teacher in teachers:
            answer, who = made[teacher.identity.name][place], teacher.identity
            read = teacher.parse(answer.request, answer.raw)
            completions.append(
                Completion(
                    prompt_id=prompt.id, sample=0, messages=prompt.messages, text=read.text, reasoning=read.reasoning,
                    finish_reason=read.finish_reason, model=read.model, teacher=who.name, provider=who.provider,
                    route=who.route, weights=None, terms=who.terms, prompt_tokens=read.prompt_tokens,
                    completion_tokens=read.completion_tokens, created=created, request_id=answer.request.key,
                    response=digest_bytes(answer.raw), split=prompt.split, batch=teacher.batch(answer.raw),
                    answer_id=read.answer_id, fingerprint=read.fingerprint,
                )
            )  # fmt: skip
    why = {"content_filter": (False, "refusal", "no answer"), "refusal": (False, "refusal", "no answer")}
    verdicts = [
        Verdict(c.prompt_id, c.sample, c.teacher, c.id, *why.get(c.finish_reason, (True, "", ""))) for c in completions
    ]
    return runs.Records(prompts, completions, verdicts, recipe)


def make_run(root: Path, **options) -> Path:
    """See `runs.make_run`."""
    return runs.make_run(root, recipe=RECIPE, change=lambda _: records(root), **options)
