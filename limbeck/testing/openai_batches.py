"""OpenAI's /v1/files and /v1/batches.

Fields of the file, batch and error objects as in the openai Python client 3.57; the lines of output and error files
(`id`, `custom_id`, `response` with `status_code`, `request_id`, `body`, and `error`) as OpenAI's description has them.
A row that is refused, expired or cancelled goes into the error file; both files may be absent. Of the codes of
validation errors only the fields were verified, not the words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import orjson
from pydantic import Field, JsonValue

from limbeck.testing.answers import Json
from limbeck.testing.batches import Batch, Fault, Result, Row
from limbeck.testing.errors import Refused, render
from limbeck.testing.faults import BadBatch
from limbeck.testing.requests import Body, checked

_ROWS = 50_000
_EXPIRES = 24 * 3600
_LEFT = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "canceled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}


class File(NamedTuple):
    """An uploaded file, or one that a batch wrote."""

    id: str
    name: str
    purpose: str
    data: bytes
    created: int

    def as_json(self) -> Json:
        """The file object."""
        return {"id": self.id, "object": "file", "bytes": len(self.data), "created_at": self.created,
                "filename": self.name, "purpose": self.purpose, "status": "processed"}  # fmt: skip


class Files:
    """All files of a server."""

    def __init__(self):
        self._all: dict[str, File] = {}

    def add(self, serial: str, name: str, purpose: str, data: bytes) -> File:
        """Keep a file."""
        file = File(f"file-{serial}", name, purpose, data, int(time.time()))
        self._all[file.id] = file
        return file

    def get(self, name: str) -> File:
        """A file by its id. Raises `Refused` where there is none."""
        if name not in self._all:
            raise Refused("not_found", f"No such File object: {name}", param="id")
        return self._all[name]

    def remove(self, name: str) -> Json:
        """Delete a file."""
        file = self.get(name)
        del self._all[name]
        return {"id": file.id, "object": "file", "deleted": True}

    def listed(self) -> list[File]:
        """All files, the newest first."""
        return list(reversed(self._all.values()))


class BatchRequest(Body):
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/responses", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = Field(default=None, max_length=16)


def new_batch(body: Json, files: Files, serial: str, fate: BadBatch | None) -> Batch:
    """The batch that is asked for; what is wrong with its rows shows when it is validated, as at OpenAI."""
    request = checked(BatchRequest, body)
    file = files.get(request.input_file_id)
    if file.purpose != "batch":
        raise Refused("invalid", "The input file's purpose is not `batch`.", param="input_file_id")
    rows, faults = read_rows(file.data, request.endpoint)
    metadata: Json | None = None if request.metadata is None else dict(request.metadata)
    return Batch(f"batch_{serial}", "openai", rows, faults, fate, request.endpoint, file.id, metadata)


def read_rows(data: bytes, endpoint: str) -> tuple[list[Row], list[Fault]]:
    """The rows of an input file, and everything that is wrong with them."""
    rows, faults, seen = [], [], set()
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            item = orjson.loads(line)
        except orjson.JSONDecodeError:
            faults.append(Fault("invalid_json_line", "This line is not parseable as valid JSON.", number))
            continue
        custom_id, body = (item.get("custom_id"), item.get("body")) if isinstance(item, dict) else (None, None)
        if not isinstance(custom_id, str) or not isinstance(body, dict):
            faults.append(Fault("missing_required_parameter", "custom_id and body are required.", number))
        elif custom_id in seen:
            faults.append(Fault("duplicate_custom_id", f"The custom_id '{custom_id}' is there twice.", number))
        elif item.get("url") != endpoint or item.get("method") != "POST":
            faults.append(Fault("invalid_url", f"Method and URL must be POST {endpoint}.", number, "url"))
        else:
            seen.add(custom_id)
            rows.append(Row(custom_id, endpoint, body))
    if len({str(row.body.get("model")) for row in rows}) > 1:
        faults.append(Fault("mismatched_model", "All requests of a batch must use the same model.", None, "model"))
    if not rows and not faults:
        faults.append(Fault("empty_file", "The input file is empty.", None))
    if len(rows) > _ROWS:
        faults.append(Fault("too_many_tasks", f"A batch has at most {_ROWS} requests.", None))
    return rows, faults


def write_files(batch: Batch, files: Files, serials: Sequence[str]) -> None:
    """Output and error file of a batch that has ended; a file with nothing in it is not made."""
    done = [_line(result) for result in batch.results if result.kind == "succeeded"]
    rest = [_line(result) for result in batch.results if result.kind != "succeeded"]
    if done:
        batch.output_file = files.add(serials[0], f"{batch.id}_output.jsonl", "batch_output", b"".join(done)).id
    if rest:
        batch.error_file = files.add(serials[1], f"{batch.id}_error.jsonl", "batch_output", b"".join(rest)).id


def _line(result: Result) -> bytes:
    response: JsonValue = None
    error: JsonValue = None
    if result.kind in _LEFT:
        code, message = _LEFT[result.kind]
        error = {"code": code, "message": message}
    elif result.refused is not None:
        reply = render(result.refused, "openai", result.request_id)
        response = {"status_code": reply.status, "request_id": result.request_id, "body": orjson.loads(reply.body)}
    else:
        response = {"status_code": 200, "request_id": result.request_id, "body": result.body}
    line = {"id": f"batch_req_{result.custom_id}", "custom_id": result.custom_id, "response": response, "error": error}
    return orjson.dumps(line) + b"\n"


def as_json(batch: Batch) -> Json:
    """The batch object."""
    times: dict[str, JsonValue] = {name: int(at) for name, at in batch.times.items()}
    errors: JsonValue = None
    if batch.state == "failed":
        faults = batch.faults or [Fault("invalid_request", "The batch failed, as the schedule of faults says.", None)]
        errors = {"object": "list", "data": [fault._asdict() for fault in faults]}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": errors,
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": times["created"],
        "in_progress_at": times.get("in_progress"),
        "expires_at": int(batch.times["created"]) + _EXPIRES,
        "finalizing_at": times.get("completed"),
        "completed_at": times.get("completed"),
        "failed_at": times.get("failed"),
        "expired_at": times.get("expired"),
        "cancelling_at": times.get("cancelling"),
        "cancelled_at": times.get("cancelled"),
        "request_counts": {
            "total": len(batch.rows),
            "completed": batch.count("succeeded"),
            "failed": batch.count("errored", "expired"),
        },
        "metadata": batch.metadata,
    }


def page(items: Sequence[Json], after: str | None, limit: str | None) -> Json:
    """One page of a list. Raises `Refused` for a limit that is none, or a cursor that is not in the list."""
    count = int(limit) if limit and limit.isdecimal() else 20 if limit is None else 0
    if not 1 <= count <= 100:
        raise Refused("invalid", "limit is a number from 1 to 100", param="limit")
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise Refused("not_found", f"No object with id '{after}'.", param="after")
        start = ids.index(after) + 1
    shown: list[JsonValue] = [*items[start : start + count]]
    first, last = (items[start]["id"], items[start + len(shown) - 1]["id"]) if shown else (None, None)
    more = start + count < len(items)
    return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": more}
