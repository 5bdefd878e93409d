"""What differs between the providers' batch APIs. Nothing here waits, retries or journals.

OpenAI: a file of JSON lines is uploaded, then a batch is created from it, with metadata that names it; at most 50,000
requests and 200 MB. Anthropic: all requests are in the body of the one request that creates the batch; at most 100,000
and 256 MB, and nothing but the rows' custom ids names it. Rows that failed, expired or were cancelled are not billed by
either. (developers.openai.com/api/reference: batches, and the Batch API FAQ; platform.claude.com/docs: batch
processing; read in November 2026.)
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import quote, urlencode

import orjson
from pydantic import JsonValue

from limbeck.collect.endpoints.batch_http import BatchHttp
from limbeck.collect.endpoints.reply import count, document, items, mapping, text
from limbeck.collect.endpoints.teacher import Endpoint
from limbeck.collect.endpoints.transport import Reply

_METADATA = "limbeck"
"""Key of a batch's metadata that holds our token."""

_ERROR_STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "api_error": 500, "timeout_error": 504,
    "overloaded_error": 529,
}  # fmt: skip
"""The status that Anthropic's errors have where they are no row of a batch."""


class Job(NamedTuple):
    """A batch, as the provider tells of it."""

    name: str
    state: str
    """The provider's word."""
    ended: bool
    """Whether nothing more will happen to it."""
    failed: bool
    """Whether none of its rows was worked on: it was refused as a whole."""
    total: int
    """Rows; 0 where the provider has not counted them yet."""
    done: int
    token: str | None
    """Our name of it, where the provider keeps one."""
    created: datetime
    results: tuple[str, ...]
    """Where its results are."""
    faults: tuple[str, ...] = ()
    """Why it failed."""


class Result(NamedTuple):
    """What one line of results says of a row."""

    custom_id: str
    status: int | None
    """As HTTP has it; None where the row was never worked on, and was not billed."""
    left: str
    """`expired` or `cancelled` then."""
    body: JsonValue


class BatchApi(Protocol):
    """One provider's batches."""

    most_rows: int
    most_bytes: int
    keeps_token: bool
    """Whether the provider's list tells our name of a batch; else only the custom ids in its results do."""
    head: bytes
    """What a batch's content begins with, has between rows, and ends with."""
    between: bytes
    tail: bytes

    def row(self, name: str, wire: bytes) -> bytes:
        """One row of the content."""
        ...

    async def upload(self, http: BatchHttp, content: BinaryIO, token: str) -> Reply | None:
        """What comes before the batch is created, and costs nothing; None where nothing does."""
        ...

    async def create(self, http: BatchHttp, content: BinaryIO, token: str, uploaded: Reply | None) -> Reply:
        """Create the batch."""
        ...

    def job(self, found: Mapping[str, JsonValue]) -> Job | None:
        """A batch; None where the object is none."""
        ...

    def address(self, name: str) -> str:
        """Where a batch is asked after."""
        ...

    def page(self, after: str | None) -> str:
        """Where the list of batches is, the newest first, from the one after `after` on."""
        ...

    def result(self, name: str, found: Mapping[str, JsonValue]) -> Result | None:
        """What a line of results says of the row of this custom id; None where it is none."""
        ...


def make_api(teacher: Endpoint) -> BatchApi:
    """The batch API beside the API that a teacher is asked over."""
    if teacher.settings.kind == "anthropic":
        return AnthropicBatches(teacher.address)
    path = "/v1/responses" if teacher.settings.api == "responses" else "/v1/chat/completions"
    return OpenAIBatches(teacher.settings.base_url, path)


def read_job(api: BatchApi, raw: bytes) -> Job | None:
    """A batch; None where the bytes are none."""
    found = document(raw)
    return api.job(found) if found is not None else None


def read_list(api: BatchApi, raw: bytes) -> tuple[list[Job], str | None] | None:
    """A page of the list of batches, and after which batch the next one begins; None where the bytes are none."""
    found = document(raw)
    if found is None or not isinstance(found.get("data"), list):
        return None
    jobs = [made for one in items(found.get("data")) if (made := api.job(mapping(one))) is not None]
    last = text(found.get("last_id"))
    return jobs, last if found.get("has_more") is True and last else None


def read_result(api: BatchApi, line: bytes) -> Result | None:
    """A line of results; None where it is none."""
    found = document(line)
    name = text(found.get("custom_id")) if found is not None else ""
    return api.result(name, found) if found is not None and name else None


class OpenAIBatches:
    """A `BatchApi`."""

    most_rows, most_bytes = 50_000, 200_000_000
    keeps_token = True
    head, between, tail = b"", b"\n", b"\n"

    def __init__(self, base_url: str, path: str):
        self._base, self._path = base_url, path

    def row(self, name: str, wire: bytes) -> bytes:
        """See `BatchApi.row`."""
        line = {"custom_id": name, "method": "POST", "url": self._path, "body": orjson.Fragment(wire)}
        return orjson.dumps(line)

    async def upload(self, http: BatchHttp, content: BinaryIO, token: str) -> Reply | None:
        """See `BatchApi.upload`."""
        return await http.upload(f"{self._base}/files", content, f"{token}.jsonl", {"purpose": "batch"})

    async def create(self, http: BatchHttp, content: BinaryIO, token: str, uploaded: Reply | None) -> Reply:
        """See `BatchApi.create`."""
        file = (document(uploaded.body) if uploaded else None) or {}
        asked = {
            "input_file_id": text(file.get("id")),
            "endpoint": self._path,
            "completion_window": "24h",
            "metadata": {_METADATA: token},
        }
        return await http.post(f"{self._base}/batches", orjson.dumps(asked), token)

    def address(self, name: str) -> str:
        """See `BatchApi.address`."""
        return f"{self._base}/batches/{quote(name, safe='')}"

    def page(self, after: str | None) -> str:
        """See `BatchApi.page`."""
        return f"{self._base}/batches?{urlencode({'limit': 100} | ({'after': after} if after else {}))}"

    def job(self, found: Mapping[str, JsonValue]) -> Job | None:
        """See `BatchApi.job`."""
        name, state, created = text(found.get("id")), text(found.get("status")), count(found.get("created_at"))
        if not name or not state or created is None:
            return None
        counts = mapping(found.get("request_counts"))
        done = sum(count(counts.get(kind)) or 0 for kind in ("completed", "failed"))
        files = [text(found.get(f"{kind}_file_id")) for kind in ("output", "error")]
        return Job(
            name=name,
            state=state,
            ended=state in ("completed", "failed", "expired", "cancelled"),
            failed=state == "failed",
            total=count(counts.get("total")) or 0,
            done=done,
            token=text(mapping(found.get("metadata")).get(_METADATA)) or None,
            created=datetime.fromtimestamp(created, UTC),
            results=tuple(f"{self._base}/files/{quote(file, safe='')}/content" for file in files if file),
            faults=tuple(_fault(mapping(one)) for one in items(mapping(found.get("errors")).get("data"))),
        )

    def result(self, name: str, found: Mapping[str, JsonValue]) -> Result | None:
        """See `BatchApi.result`."""
        response, error = found.get("response"), mapping(found.get("error"))
        if isinstance(response, dict):
            return Result(name, count(response.get("status_code")) or 200, "", response.get("body"))
        code = text(error.get("code"))
        if code in ("batch_expired", "batch_cancelled"):
            return Result(name, None, code.removeprefix("batch_"), None)
        return Result(name, 500, "", found.get("error"))


class AnthropicBatches:
    """A `BatchApi`."""

    most_rows, most_bytes = 100_000, 256_000_000
    keeps_token = False
    head, between, tail = b'{"requests":[', b",", b"]}"

    def __init__(self, address: str):
        self._batches = f"{address}/batches"

    def row(self, name: str, wire: bytes) -> bytes:
        """See `BatchApi.row`."""
        return orjson.dumps({"custom_id": name, "params": orjson.Fragment(wire)})

    async def upload(self, http: BatchHttp, content: BinaryIO, token: str) -> Reply | None:
        """See `BatchApi.upload`."""
        return None

    async def create(self, http: BatchHttp, content: BinaryIO, token: str, uploaded: Reply | None) -> Reply:
        """See `BatchApi.create`."""
        return await http.post(self._batches, content, token)

    def address(self, name: str) -> str:
        """See `BatchApi.address`."""
        return f"{self._batches}/{quote(name, safe='')}"

    def page(self, after: str | None) -> str:
        """See `BatchApi.page`."""
        return f"{self._batches}?{urlencode({'limit': 100} | ({'after_id': after} if after else {}))}"

    def job(self, found: Mapping[str, JsonValue]) -> Job | None:
        """See `BatchApi.job`."""
        name, state = text(found.get("id")), text(found.get("processing_status"))
        created = _time(found.get("created_at"))
        if not name or not state or created is None:
            return None
        counts = {kind: count(number) or 0 for kind, number in mapping(found.get("request_counts")).items()}
        total = sum(counts.values())
        there = bool(text(found.get("results_url")))
        return Job(
            name=name,
            state="archived" if found.get("archived_at") else state,
            ended=state == "ended",
            failed=False,
            total=total,
            done=total - counts.get("processing", 0),
            token=None,
            created=created,
            results=(f"{self.address(name)}/results",) if there else (),
        )

    def result(self, name: str, found: Mapping[str, JsonValue]) -> Result | None:
        """See `BatchApi.result`."""
        result = mapping(found.get("result"))
        match result.get("type"):
            case "succeeded":
                return Result(name, 200, "", result.get("message"))
            case "errored":
                error = mapping(mapping(result.get("error")).get("error"))
                return Result(name, _ERROR_STATUS.get(text(error.get("type")), 500), "", result.get("error"))
            case "expired":
                return Result(name, None, "expired", None)
            case "canceled":
                return Result(name, None, "cancelled", None)
        return None


def _fault(error: Mapping[str, JsonValue]) -> str:
    line = f" (row {error['line']})" if isinstance(error.get("line"), int) else ""
    return f"{text(error.get('code'))}: {text(error.get('message'))}{line}"


def _time(value: JsonValue) -> datetime | None:
    try:
        made = datetime.fromisoformat(text(value))
    except ValueError:
        return None
    return made if made.tzinfo else made.replace(tzinfo=UTC)
