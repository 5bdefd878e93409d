"""The way of a request through the server: read, keyed, refused or admitted, answered, billed, sent.

An `Idempotency-Key` is honoured for the life of the server: a request under a key that was billed gets the same
bytes again and is not billed again; under the same key with another body it is refused; while the first is still
being answered, the second waits for it. Neither provider documents such a header for these endpoints, and neither
official client sends one by default, so a collector must not rely on it; `Settings.idempotency: false` ignores it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import orjson
from aiohttp import web

from limbeck.testing.answers import Json, Twist, body_digest, content_seed
from limbeck.testing.anthropic import messages
from limbeck.testing.batches import Row
from limbeck.testing.bill import Bill, Charge, price
from limbeck.testing.calls import Call, Desk, Reply, Usage
from limbeck.testing.errors import Provider, Refused, render
from limbeck.testing.faults import (
    Cut,
    Delay,
    Drip,
    Fault,
    Faults,
    Malformed,
    OffSchema,
    RateLimit,
    Refusal4xx,
    Sent,
    ServerError,
    Timeout,
    Truncated,
    Withheld,
    WrongType,
)
from limbeck.testing.limits import Limits, retry_headers
from limbeck.testing.openai_chat import chat
from limbeck.testing.openai_completions import completions
from limbeck.testing.openai_responses import responses
from limbeck.testing.settings import Settings
from limbeck.testing.vocabulary import Vocabulary

Endpoint = Callable[[Desk, Call], Reply]

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": chat,
    "/v1/responses": responses,
    "/v1/completions": completions,
    "/v1/messages": messages,
}
"""Paths that answer prompts."""

_JSON = "application/json"
_KEYS = ("authorization", "x-api-key")


class Made(NamedTuple):
    """An answer that was billed."""

    digest: str
    request_id: str
    body: bytes


@dataclass(slots=True)
class Asked:
    """One request, while it is being answered."""

    http: web.BaseRequest
    path: str
    provider: Provider
    raw: bytes
    body: Json
    digest: str
    number: int
    attempt: int
    serial: str

    @property
    def request_id(self) -> str:
        """As its answer's header names it."""
        return f"req_{self.serial}"


class Service:
    """Everything of a test server but its socket."""

    def __init__(self, settings: Settings, faults: Faults):
        self.settings = settings
        self.bill = Bill()
        self.desk = Desk(settings, Vocabulary(settings.vocabulary))
        self.attempts: Counter[str] = Counter()
        self._serials, self._acts, self._rows = itertools.count(1), itertools.count(1), itertools.count(1)
        self._boot = secrets.token_hex(4)
        self._keys: dict[str, asyncio.Future[Made]] = {}
        self.begin(faults)

    def begin(self, faults: Faults) -> None:
        """Start a schedule: its clock begins now."""
        self.faults, self.sent, self.limits = faults, Sent(faults), Limits(faults.limits)
        self.started = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the schedule began."""
        return time.monotonic() - self.started

    def serial(self) -> str:
        """Part of ids, never the same twice, not even from two servers."""
        return f"{self._boot}{next(self._serials):08x}"

    async def answer(self, http: web.BaseRequest, endpoint: Endpoint) -> web.StreamResponse:
        """Answer a request for an answer, whatever goes wrong on the way."""
        bill = self.bill  # another may be begun before this request ends
        bill.received += 1
        bill.in_flight += 1
        try:
            return await self._answer(http, endpoint)
        finally:
            bill.in_flight -= 1

    async def _answer(self, http: web.BaseRequest, endpoint: Endpoint) -> web.StreamResponse:
        number, serial = self.bill.received, self.serial()
        raw = await http.read()
        path, provider = http.path, provider_of(http)
        try:
            self.check_key(http)
            body = parsed(raw)
            digest = body_digest(body)
            self.attempts[digest] += 1
            asked = Asked(http, path, provider, raw, body, digest, number, self.attempts[digest], serial)
            fault = self.draw(asked, answers=True)
            refuse(fault)
            made = await self._made(asked, endpoint, fault)
        except Refused as refused:
            return await self.refuse(http, refused, provider, f"req_{serial}")
        if made is None:
            return self.cut(http, reset=isinstance(fault, Cut) and fault.reset)
        return await self._deliver(asked, made, fault)

    async def act(self, http: web.BaseRequest, raw: bytes, work: Callable[[], Json | bytes]) -> web.StreamResponse:
        """Do what is no answer to a prompt, such as creating a batch; faults meet it only where they name its path.
        Connections are cut before or after the work has been done.
        """
        serial, provider = self.serial(), provider_of(http)
        digest = hashlib.sha256(f"{http.method} {http.path_qs} ".encode() + raw).hexdigest()
        self.attempts[digest] += 1
        asked = Asked(http, http.path, provider, raw, {}, digest, next(self._acts), self.attempts[digest], serial)
        try:
            self.check_key(http)
            fault = self.draw(asked, answers=False)
            refuse(fault)
            if isinstance(fault, Delay):
                await asyncio.sleep(fault.seconds)
            if isinstance(fault, Cut) and fault.when == "before_billing":
                return self.cut(http, reset=fault.reset)
            done = work()
        except Refused as refused:
            return await self.refuse(http, refused, provider, asked.request_id)
        body = done if isinstance(done, bytes) else orjson.dumps(done)
        return await self._deliver(asked, Made(digest, asked.request_id, body), fault)

    def draw(self, asked: Asked, *, answers: bool) -> Fault | None:
        """The fault for a request, counted."""
        fault = self.sent.draw(path=asked.path, answers=answers, number=asked.number, attempt=asked.attempt,
                               digest=asked.digest, raw=asked.raw, now=self.now)  # fmt: skip
        if fault is not None:
            self.bill.faults[fault.kind] += 1
        return fault

    def twist_row(self, row: Row) -> Twist | None:
        """What a fault changes in the answer to a row of a batch."""
        digest, raw = body_digest(row.body), orjson.dumps(row.body)
        self.attempts[digest] += 1
        fault = self.sent.draw(path=row.path, answers=True, number=next(self._rows), attempt=self.attempts[digest],
                               digest=digest, raw=raw, now=self.now, row=True)  # fmt: skip
        if fault is not None:
            self.bill.faults[fault.kind] += 1
        return twist_of(fault)

    async def _made(self, asked: Asked, endpoint: Endpoint, fault: Fault | None) -> Made | None:
        """The billed answer, made now or earlier; None where the connection is cut before anything is billed."""
        key = asked.http.headers.get("idempotency-key") if self.settings.idempotency else None
        if key is None:
            return await self._make(asked, endpoint, fault, None)
        while (earlier := self._keys.get(key)) is not None:
            await asyncio.wait([earlier])
            if not earlier.cancelled():
                made = earlier.result()
                if made.digest != asked.digest:
                    raise Refused("invalid", "This Idempotency-Key was used with another request body.")
                self.bill.outcomes["replayed"] += 1
                return made
        future = self._keys[key] = asyncio.get_running_loop().create_future()
        made = None
        try:
            made = await self._make(asked, endpoint, fault, key)
            return made
        finally:  # refused, or cut before it was billed: the key is free again, and who waits on it tries for itself
            if made is None:
                del self._keys[key]
                future.cancel()
            else:
                future.set_result(made)

    async def _make(self, asked: Asked, endpoint: Endpoint, fault: Fault | None, key: str | None) -> Made | None:
        if self.settings.quota is not None and self.bill.money >= self.settings.quota:
            raise Refused("quota")
        call = Call(asked.path, asked.body, content_seed(asked.body), asked.serial, time.time(), twist_of(fault))
        reply = endpoint(self.desk, call)
        if reply.usage is not None:
            self.limits.admit(reply.usage.prompt_tokens, _most(asked.body, reply.usage), self.now)
        delay = self.settings.delay + (fault.seconds if isinstance(fault, Delay) else 0)
        if delay:
            await asyncio.sleep(delay)
        if isinstance(fault, Cut) and fault.when == "before_billing":
            return None
        if reply.usage is not None:
            self.charge(reply, asked.path, asked.digest, asked.request_id, key)
        return Made(asked.digest, asked.request_id, orjson.dumps(reply.body))

    def charge(self, reply: Reply, path: str, digest: str, request_id: str, key: str | None, *,
               batch: str | None = None, custom_id: str | None = None) -> None:  # fmt: skip
        """Put an answer on the bill."""
        usage = reply.usage
        model = None if usage is None else self.settings.model(usage.model)
        if usage is None or model is None:
            return
        dollars = price(usage.prompt_tokens, model.input) + price(usage.completion_tokens, model.output)
        if batch is not None:
            dollars *= self.settings.batch_price
        self.bill.add(
            Charge(time.time(), request_id, str(reply.body.get("id")), key, digest, path, usage.model,
                   usage.prompt_tokens, usage.completion_tokens, dollars, batch, custom_id)
        )  # fmt: skip

    async def _deliver(self, asked: Asked, made: Made, fault: Fault | None) -> web.StreamResponse:
        """Send an answer, or what a fault leaves of it."""
        http, body, content_type = asked.http, made.body, _JSON
        if isinstance(fault, Cut) and fault.when == "after_billing":
            return self.cut(http, reset=fault.reset)
        if isinstance(fault, Malformed):
            body = body[: len(body) * 2 // 3]
        if isinstance(fault, WrongType):
            content_type = fault.content_type
            body = b"<html><body>Welcome</body></html>" if fault.page else body
        headers = {"content-type": content_type, id_header(asked.provider): made.request_id}
        headers |= self.limits.headers(asked.provider)
        if isinstance(fault, Drip | Cut):
            return await self._send_slowly(http, body, headers, fault)
        return await self.send(http, 200, body, headers)

    async def send(self, http: web.BaseRequest, status: int, body: bytes, headers: dict[str, str]) -> web.Response:
        """Send a response and note how that ended."""
        response = web.Response(status=status, body=body, headers=headers)
        if gone(http):
            self.bill.outcomes["gone"] += 1
            return response
        try:
            await response.prepare(http)
            await response.write_eof()
            self.bill.outcomes[str(status)] += 1
        except ConnectionError:
            self.bill.outcomes["gone"] += 1
        return response

    async def _send_slowly(
        self, http: web.BaseRequest, body: bytes, headers: dict[str, str], fault: Drip | Cut
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=200, headers={**headers, "content-length": str(len(body))})
        try:
            await response.prepare(http)
            if isinstance(fault, Cut):
                await response.write(body[: len(body) // 2])
                self.cut(http, reset=fault.reset)
                return response
            for start in range(0, len(body), fault.piece):
                await response.write(body[start : start + fault.piece])
                await asyncio.sleep(fault.pause)
            await response.write_eof()
            self.bill.outcomes["200"] += 1
        except ConnectionError:
            self.bill.outcomes["gone"] += 1
        return response

    async def refuse(
        self, http: web.BaseRequest, refused: Refused, provider: Provider, request_id: str
    ) -> web.StreamResponse:
        """Send an error in the provider's shape."""
        reply = render(refused, provider, request_id)
        headers = {"content-type": reply.content_type, id_header(provider): request_id, **refused.headers}
        return await self.send(http, reply.status, reply.body, headers | self.limits.headers(provider))

    def cut(self, http: web.BaseRequest, *, reset: bool) -> web.StreamResponse:
        """Break the connection."""
        self.bill.outcomes["cut"] += 1
        if http.transport is not None:
            http.transport.abort() if reset else http.transport.close()
        return web.Response()

    def check_key(self, http: web.BaseRequest) -> None:
        """Raises `Refused` where keys are asked for and none of them was given."""
        if not self.settings.api_keys:
            return
        given = {http.headers.get(name, "").removeprefix("Bearer ") for name in _KEYS}
        if not given & set(self.settings.api_keys):
            raise Refused("unauthorized")


def provider_of(http: web.BaseRequest) -> Provider:
    """Whose API a request is for: Anthropic's clients send `anthropic-version`."""
    return "anthropic" if http.path.startswith("/v1/messages") or "anthropic-version" in http.headers else "openai"


def id_header(provider: Provider) -> str:
    """The header in which the provider names the request."""
    return "request-id" if provider == "anthropic" else "x-request-id"


def parsed(raw: bytes) -> Json:
    """A request body. Raises `Refused` where it is no JSON object."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused("invalid", f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise Refused("invalid", "The body of a request is a JSON object.")
    return body


def gone(http: web.BaseRequest) -> bool:
    """Whether the client has left."""
    return http.transport is None or http.transport.is_closing()


def refuse(fault: Fault | None) -> None:
    """Raises `Refused` for a fault that is a refusal."""
    if isinstance(fault, RateLimit):
        raise Refused("requests", headers=retry_headers(fault.retry_after, fault.wait))
    if isinstance(fault, ServerError):
        raise Refused(str(fault.status), headers=retry_headers(fault.retry_after, fault.wait))
    if isinstance(fault, Refusal4xx | Timeout):
        raise Refused(fault.kind)


def twist_of(fault: Fault | None) -> Twist | None:
    """What a fault changes in what the model writes."""
    if isinstance(fault, Truncated):
        return Twist("truncated", fault.share)
    if isinstance(fault, OffSchema):
        return Twist("prose" if fault.prose else "off_schema")
    return Twist(fault.kind) if isinstance(fault, Withheld) else None


def _most(body: Json, usage: Usage) -> int:
    """The most tokens that a request may be answered with: its limit, or without one what it is answered with."""
    limits = (body.get(key) for key in ("max_completion_tokens", "max_tokens", "max_output_tokens"))
    return next((limit for limit in limits if isinstance(limit, int)), usage.completion_tokens)
