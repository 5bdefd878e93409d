"""Asking a completions server, with bounded retries. Keys come from the environment and are written nowhere."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import NamedTuple, Self

import aiohttp
import orjson

from limbeck.errors import EndpointError, Problem
from limbeck.recipe import SignalServer

_TRIES = 8
"""Times that a request is sent before its stage gives up."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try; it doubles with every try up to the longest."""
_PATIENCE = 600.0
"""Seconds that a server may tell us to wait; one that says more is asked again when the user runs again."""
_AGAIN = frozenset({408, 425, 429})
"""Statuses below 500 after which the same request may go through."""
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=600)
_STABLE = ("id", "root", "parent", "owned_by", "max_model_len")
"""What of a model's description does not change with every call, as vLLM's `created` and `permission` do."""


class Refusal(NamedTuple):
    """An answer that is none."""

    status: int
    words: str
    """The server's own, without the key."""
    wait: float | None
    """Seconds that it says to wait."""
    final: bool


class Endpoint:
    """A server, as an asynchronous context manager.

    Raises `EndpointError` where the environment holds no key, and `problem_of_key` says so before anything runs.
    """

    def __init__(self, settings: SignalServer):
        if problem := problem_of_key(settings):
            raise EndpointError("the server cannot be asked", [problem])
        self._settings, self._base = settings, settings.base_url.rstrip("/")
        self._key = os.environ[settings.api_key_env].strip() if settings.api_key_env else ""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(headers=headers, timeout=_TIMEOUT, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session
        await self._session.close()

    async def identity(self) -> dict[str, str]:
        """What `/models` says of the model; empty where it does not list it, or there is no such page."""
        found = await self._send("GET", "/models", None, "its list of models", absent=(404, 405))
        try:
            listed = orjson.loads(found).get("data", []) if found else []
            mine = next((m for m in listed if m.get("id") == self._settings.model), {})
        except (orjson.JSONDecodeError, AttributeError) as error:
            problem = Problem(f"{self._base}/models", repr(found[:80]), "a list of models as JSON", str(error))
            raise EndpointError("the server does not say what it serves", [problem]) from None
        return {name: str(mine[name]) for name in _STABLE if mine.get(name) is not None}

    async def complete(self, body: bytes, what: str) -> bytes:
        """The raw answer to a completion request. Raises `EndpointError` where the server refuses it."""
        return await self._send("POST", "/completions", body, what)

    async def _send(self, method: str, path: str, body: bytes | None, what: str, absent: tuple[int, ...] = ()) -> bytes:
        refusal = Refusal(0, "nothing was sent", None, final=False)
        for number in range(_TRIES):
            if number:
                backoff = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (number - 1)) * random.uniform(0.5, 1)
                # A little later than told, and not all at the same moment.
                await asyncio.sleep(refusal.wait * random.uniform(1, 1.1) if refusal.wait else backoff)
            answer = await self._once(method, path, body)
            if isinstance(answer, bytes):
                return answer
            refusal = answer
            if refusal.status in absent:
                return b""
            if refusal.final or (refusal.wait or 0) > _PATIENCE:
                break
        said = f"{refusal.status}: {refusal.words}" if refusal.status else refusal.words
        remedy = "run again: what was answered is kept" if not refusal.final else "the server's own words say why"
        problem = Problem(f"{self._base}{path}, {what}", said, "an answer", remedy)
        raise EndpointError("the server refuses" if refusal.final else "the server does not answer", [problem])

    async def _once(self, method: str, path: str, body: bytes | None) -> bytes | Refusal:
        assert self._session
        headers = {"content-type": "application/json"} if body else {}
        try:
            # A redirect would carry the key to whoever it names.
            sent = self._session.request(method, self._base + path, data=body, headers=headers, allow_redirects=False)
            async with sent as response:
                raw = await response.read()
                if response.status == 200:
                    return raw
                return self._refusal(response.status, response.headers, raw)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Refusal(0, self._clean(f"{type(error).__name__}: {error}"), None, final=False)

    def _refusal(self, status: int, headers: Mapping[str, str], raw: bytes) -> Refusal:
        words, code = raw.decode(errors="replace"), None
        try:
            told = orjson.loads(raw)
            error = told.get("error", told)
            words, code = error.get("message") or words, error.get("code")
        except (orjson.JSONDecodeError, AttributeError):
            pass  # a gateway's page
        # An exhausted account is a 429 too, and no waiting helps.
        final = (status < 500 and status not in _AGAIN) or code == "insufficient_quota"
        return Refusal(status, self._clean(str(words)), wait_of(headers), final)

    def _clean(self, words: str) -> str:
        short = " ".join(words.split())[:400]
        return short.replace(self._key, "(the key)") if self._key else short


def problem_of_key(settings: SignalServer) -> Problem | None:
    """What is wrong with the key's place, if anything."""
    name = settings.api_key_env
    if name is None or os.environ.get(name, "").strip():
        return None
    return Problem("signal.server.api_key_env", f"{name} is not set", "a key in that variable", f"export {name}=...")


def wait_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After says, as a number or a date (RFC 9110, section 10.2.3), or retry-after-ms."""
    try:
        if (told := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(told) / 1000)
        if (told := headers.get("retry-after")) is None:
            return None
        if told.strip().replace(".", "", 1).isdigit():
            return float(told)
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
