"""HTTP for batches: small questions, one large upload, results read line by line."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import BinaryIO

import aiohttp

from limbeck.collect.endpoints.transport import NoReplyError, Reply, proxy_of, why_unconnected

_CONNECT = 30.0
_CONNECTIONS = 8
_PIECE = 1 << 18
_WHOLE = 6 * 3600.0
"""Seconds in which the largest upload or download must end; a silence ends it much earlier."""


class BadStatusError(Exception):
    """An answer that is no success where results were to be read."""

    def __init__(self, reply: Reply):
        super().__init__(reply.status)
        self.reply = reply


class BatchHttp:
    """Connections to one provider. An async context manager. Every method raises `NoReplyError`."""

    def __init__(self, headers: Mapping[str, str], timeout: float):
        self._headers = {"Accept": "*/*", **headers}
        self._timeout = aiohttp.ClientTimeout(total=_WHOLE, sock_connect=_CONNECT, sock_read=timeout)
        self.reached = False
        """Whether anything that was sent has come to the provider."""

    async def __aenter__(self) -> BatchHttp:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=15),
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> Reply:
        """Ask for a document."""
        return await self._whole("GET", url)

    async def post(self, url: str, body: bytes | BinaryIO, idempotency_key: str) -> Reply:
        """Send JSON, from memory or from an open file. Sent once, never again by itself."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        return await self._whole("POST", url, data=body, headers=headers)

    async def upload(self, url: str, content: BinaryIO, name: str, fields: Mapping[str, str]) -> Reply:
        """Send a file, as a form."""
        form = aiohttp.FormData()
        for key, value in fields.items():
            form.add_field(key, value)
        form.add_field("file", content, filename=name, content_type="application/jsonl")
        return await self._whole("POST", url, data=form)

    async def _whole(self, method: str, url: str, **more) -> Reply:  # what aiohttp takes
        try:
            async with self._session.request(
                method, url, allow_redirects=False, proxy=proxy_of(url), **more
            ) as response:
                self.reached = True
                return Reply(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, OSError) as error:
            raise self._told(error) from error

    async def lines(self, url: str) -> AsyncGenerator[bytes]:
        """The lines of a document, without their ends, as they come in. Raises `BadStatusError` too."""
        try:
            async with self._session.get(url, allow_redirects=False, proxy=proxy_of(url)) as response:
                self.reached = True
                if response.status != 200:
                    raise BadStatusError(Reply(response.status, response.headers, await response.read()))
                rest = b""
                async for piece in response.content.iter_chunked(_PIECE):
                    *whole, rest = (rest + piece).split(b"\n")
                    for line in whole:
                        if line.strip():
                            yield line
                if rest.strip():
                    yield rest
        except (aiohttp.ClientError, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> NoReplyError:
        told = _no_reply(error)
        self.reached |= told.kind != "connect"
        return told


def _no_reply(error: Exception) -> NoReplyError:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return NoReplyError("connect", f"no connection within {_CONNECT:.0f} s")
    if isinstance(error, TimeoutError):
        return NoReplyError("timeout")
    if isinstance(error, aiohttp.ClientConnectorError):
        return NoReplyError("connect", why_unconnected(error))
    return NoReplyError("cut")
