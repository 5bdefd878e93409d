"""Anthropic's /v1/messages/batches.

Fields of the batch and of its results as in the anthropic Python client 2.13: counts stay `processing` until the
whole batch has ended; results are JSON lines in an order of their own, each `succeeded`, `errored`, `canceled` or
`expired`. The API has no metadata: who looks for a lost batch has only times, counts and the results' custom ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import orjson
from pydantic import Field, JsonValue

from limbeck.testing.answers import Json
from limbeck.testing.batches import Batch, Result, Row
from limbeck.testing.errors import Refused, render
from limbeck.testing.faults import BadBatch
from limbeck.testing.requests import Body, checked

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MOST = 100_000


class _Item(Body):
    custom_id: str
    params: Json


class BatchRequest(Body):
    """The body of POST /v1/messages/batches."""

    requests: list[_Item] = Field(min_length=1, max_length=_MOST)


def new_batch(body: Json, serial: str, fate: BadBatch | None) -> Batch:
    """The batch that is asked for. Raises `Refused` for custom ids that are doubled or have other letters."""
    request = checked(BatchRequest, body)
    seen: set[str] = set()
    for number, item in enumerate(request.requests):
        if not _CUSTOM_ID.fullmatch(item.custom_id):
            raise Refused("invalid", f"requests.{number}.custom_id: String should match pattern '{_CUSTOM_ID.pattern}'")
        if item.custom_id in seen:
            raise Refused("invalid", f"requests.{number}.custom_id: '{item.custom_id}' is there twice")
        seen.add(item.custom_id)
    rows = [Row(item.custom_id, "/v1/messages", item.params) for item in request.requests]
    return Batch(f"msgbatch_{serial}", "anthropic", rows, (), fate)


def as_json(batch: Batch, url: str) -> Json:
    """The batch object; `url` is the server's own."""
    ended = batch.ended
    created = datetime.fromtimestamp(batch.times["created"], UTC)
    status = "ended" if ended else "canceling" if batch.state == "cancelling" else "in_progress"
    kinds = ("succeeded", "errored", "canceled", "expired")
    counts: Json = {kind: batch.count(kind) if ended else 0 for kind in kinds}
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {"processing": 0 if ended else len(batch.rows), **counts},
        "created_at": _time(created),
        "expires_at": _time(created + timedelta(hours=24)),
        "ended_at": _time(datetime.fromtimestamp(batch.times[batch.state], UTC)) if ended else None,
        "cancel_initiated_at": _time(datetime.fromtimestamp(batch.times["cancelling"], UTC))
        if "cancelling" in batch.times
        else None,
        "archived_at": None,
        "results_url": f"{url}/v1/messages/batches/{batch.id}/results" if ended else None,
    }


def results(batch: Batch) -> bytes:
    """The results as JSON lines. Raises `Refused` before the batch has ended."""
    if not batch.ended:
        raise Refused("invalid", "The batch has not ended: its results are not there yet.")
    return b"".join(_line(result) for result in batch.results)


def _line(result: Result) -> bytes:
    found: Json = {"type": result.kind}
    if result.kind == "succeeded":
        found["message"] = result.body
    elif result.refused is not None:
        found["error"] = orjson.loads(render(result.refused, "anthropic", result.request_id).body)
    return orjson.dumps({"custom_id": result.custom_id, "result": found}) + b"\n"


def page(items: Sequence[Json], after: str | None, before: str | None, limit: str | None) -> Json:
    """One page of a list: what follows `after`, or what comes just before `before`."""
    count = int(limit) if limit and limit.isdecimal() else 20 if limit is None else 0
    if not 1 <= count <= 1000:
        raise Refused("invalid", "limit: Input should be from 1 to 1000")
    ids = [item["id"] for item in items]
    for cursor in (after, before):
        if cursor is not None and cursor not in ids:
            raise Refused("not_found", f"No batch found with id '{cursor}'.")
    if before is not None:
        end = ids.index(before)
        shown, more = items[max(0, end - count) : end], end > count
    else:
        start = 0 if after is None else ids.index(after) + 1
        shown, more = items[start : start + count], start + count < len(items)
    data: list[JsonValue] = [*shown]
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return {"data": data, "has_more": more, "first_id": first, "last_id": last}


def _time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
