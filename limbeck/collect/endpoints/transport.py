"""One request over HTTP: bytes out, bytes back, or the way in which none came back."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp

_CONNECT = 30.0
"""Seconds to wait for a connection."""


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """Case does not matter."""
    body: bytes


class NoReplyError(Exception):
    """Nothing, or not all of it, came back.

    `kind` is `connect` (there was no connection, so nothing was sent), `cut` (it ended too early) or `timeout`; after
    the last two the request may have been billed.
    """

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind

    @property
    def maybe_billed(self) -> bool:
        """Whether the endpoint may have worked on it."""
        return self.kind != "connect"


class Transport:
    """Connections to one address. An async context manager."""

    def __init__(self, address: str, headers: Mapping[str, str], connections: int, timeout: float):
        self._address, self._connections = address, connections
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT)
        self._proxy = proxy_of(address)

    async def __aenter__(self) -> Transport:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=30),
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(self, body: bytes, idempotency_key: str) -> Reply:
        """Send one request. Redirects are not followed: the key is for this address alone. Raises `NoReplyError`."""
        try:
            async with self._session.post(
                self._address,
                data=body,
                headers={"Idempotency-Key": idempotency_key},
                allow_redirects=False,
                proxy=self._proxy,
            ) as response:
                return Reply(response.status, response.headers, await response.read())
        except aiohttp.ConnectionTimeoutError as error:
            raise NoReplyError("connect") from error
        except TimeoutError as error:
            raise NoReplyError("timeout") from error
        except aiohttp.ClientConnectorError as error:
            raise NoReplyError("connect") from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoReplyError("cut") from error


def proxy_of(address: str) -> str | None:
    """The proxy that the environment names for this address, asked once: aiohttp would ask for every request, and read
    ~/.netrc too.
    """
    parts = urlsplit(address)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)
