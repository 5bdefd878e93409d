"""One request over HTTP: bytes out, bytes back, or the way in which none came back."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from yarl import URL

_CONNECT = 30.0
"""Seconds to wait for a connection."""
_IDLE = 30.0
"""Seconds that an unused connection is kept."""


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Case does not matter."""
    body: bytes


_KNOWN = aiohttp.__version__.startswith("3.")
"""Whether connections and parser are of the versions whose methods, which no documentation names, are used here. With
others the session is."""


class NoReplyError(Exception):
    """Nothing, or not all of it, came back.

    `kind` is `connect` (there was no connection, so nothing was sent), `cut` (it ended too early) or `timeout`; after
    the last two the request may have been billed. `why` says why there was no connection.
    """

    def __init__(self, kind: str, why: str = ""):
        super().__init__(kind)
        self.kind, self.why = kind, why

    @property
    def maybe_billed(self) -> bool:
        """Whether the endpoint may have worked on it."""
        return self.kind != "connect"


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request that was sent and not answered."""

    due: float
    protocol: ResponseHandler
    content: aiohttp.StreamReader | None = None

    def give_up(self) -> None:
        """Have whoever waits for it get a `TimeoutError`, unless all of it is here and only waits to be read."""
        if self.content is None:
            self.protocol.set_exception(TimeoutError())
        elif not self.content.is_eof():
            self.content.set_exception(TimeoutError())


class Transport:
    """Connections to one address. An async context manager.

    aiohttp opens the connections, writes the head once and parses what comes back; of the rest of what its session does
    for a request (redirects, cookies, uploads, tracing) nothing is wanted here, and it took a third of the processor's
    time. Through a proxy the session is used as it is.
    """

    def __init__(self, address: str, headers: Mapping[str, str], connections: int, timeout: float):
        self._address, self._connections, self._seconds = address, connections, timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT)
        self._proxy = proxy_of(address)
        self._kept: list[tuple[Connection, float]] = []
        """Open and unused, with the time since when; the last is used first."""
        self._waiting: set[_Waiting] = set()
        """Requests without an answer."""
        self._timer: asyncio.TimerHandle | None = None
        """One for all, set for the first that is due: each has the same time, and most of them never need it."""

    async def __aenter__(self) -> Transport:
        self._loop = asyncio.get_running_loop()
        self._connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_IDLE)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
        )
        self._asked = aiohttp.ClientRequest(
            "POST", URL(self._address), headers=self._headers, data=b"", loop=self._loop, response_class=None
        )
        self._head = _head(self._asked)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for connection, _since in self._kept:
            connection.close()
        await self._session.close()

    async def post(self, body: bytes, idempotency_key: str) -> Reply:
        """Send one request. Redirects are not followed: the key is for this address alone. Raises `NoReplyError`."""
        try:
            if self._proxy is not None or not _KNOWN:
                return await self._through_session(body, idempotency_key)
            due = self._loop.time() + self._seconds
            if (connection := self._unused()) is None:
                async with asyncio.timeout_at(due):
                    connection = await self._connect()
            return await self._over(connection, body, idempotency_key, due)
        except aiohttp.ConnectionTimeoutError as error:
            raise NoReplyError("connect", f"no connection within {_CONNECT:.0f} s") from error
        except TimeoutError as error:
            raise NoReplyError("timeout") from error
        except aiohttp.ClientConnectorError as error:
            raise NoReplyError("connect", why_unconnected(error)) from error
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise NoReplyError("cut") from error

    async def _connect(self) -> Connection:
        try:
            connection = await self._connector.connect(self._asked, [], self._timeout)
        except aiohttp.ClientError:
            raise
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError from error
        if connection.protocol is not None:  # one parser for all answers that come over it
            connection.protocol.set_response_params(read_until_eof=True)
        return connection

    def _unused(self) -> Connection | None:
        """An open connection, if there is one. Those that the other side closed or may be about to are let go, as are
        those over which something came that nobody asked for: the next request would take it for its answer.
        """
        while self._kept:
            connection, since = self._kept.pop()
            protocol = connection.protocol
            usable = protocol is not None and protocol.is_connected() and not protocol.should_close
            if usable and self._loop.time() - since < _IDLE:
                return connection
            connection.close()
        return None

    async def _over(self, connection: Connection, body: bytes, idempotency_key: str, due: float) -> Reply:
        protocol, wire = connection.protocol, connection.transport
        if protocol is None or wire is None:
            connection.close()
            raise aiohttp.ServerDisconnectedError
        whole, waiting = False, _Waiting(due, protocol)
        self._waiting.add(waiting)
        if self._timer is None or due < self._timer.when():
            self._set_timer(due)
        try:
            wire.write(
                b"%b%d\r\nIdempotency-Key: %b\r\n\r\n%b" % (self._head, len(body), idempotency_key.encode(), body)
            )
            message, content = await protocol.read()
            while message.code < 200:  # 1xx: the answer is yet to come
                message, content = await protocol.read()
            waiting.content = content
            if waiting not in self._waiting:  # given up while its head was on the way to us
                waiting.give_up()
            reply = Reply(message.code, message.headers, await content.read())
            whole = not protocol.should_close
            return reply
        finally:
            self._waiting.discard(waiting)
            if whole:
                self._kept.append((connection, self._loop.time()))
            else:
                connection.close()

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._end_overdue)

    def _end_overdue(self) -> None:
        """Give up those who waited too long, and come back when the next one will have."""
        now, self._timer = self._loop.time(), None
        for waiting in [one for one in self._waiting if one.due <= now]:
            self._waiting.discard(waiting)
            waiting.give_up()
        if self._waiting:
            self._set_timer(min(one.due for one in self._waiting))

    async def _through_session(self, body: bytes, idempotency_key: str) -> Reply:
        async with self._session.post(
            self._address,
            data=body,
            headers={"Idempotency-Key": idempotency_key},
            allow_redirects=False,
            proxy=self._proxy,
        ) as response:
            return Reply(response.status, response.headers, await response.read())


def why_unconnected(error: aiohttp.ClientConnectorError) -> str:
    """Why there was no connection, in a line. Addresses of proxies, which may hold passwords, are not in it."""
    proxied = isinstance(error, aiohttp.ClientProxyConnectionError)
    # Not all of aiohttp's errors of this kind have one: that of a certificate has another.
    cause = getattr(error, "certificate_error", None) or error.os_error
    if isinstance(cause, ssl.SSLError | ssl.CertificateError):
        said = getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or type(cause).__name__
        why = f"TLS failed: {said}"
    elif isinstance(error, aiohttp.ClientConnectorDNSError) or isinstance(cause, socket.gaierror):
        why = f"the name is not found ({cause.strerror or cause})"
    else:
        why = os.strerror(cause.errno).lower() if cause.errno else str(cause)
    return f"{why}, at the proxy that the environment names" if proxied else why


def _head(request: aiohttp.ClientRequest) -> bytes:
    """The head of a request as aiohttp would write it, up to the value of `Content-Length`, which comes last."""
    lines = [f"POST {request.url.raw_path_qs} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items() if name.lower() != "content-length"]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header of two lines")
    return "\r\n".join([*lines, "Content-Length: "]).encode()


def proxy_of(address: str) -> str | None:
    """The proxy that the environment names for this address, asked once: aiohttp would ask for every request, and read
    ~/.netrc too.
    """
    parts = urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
