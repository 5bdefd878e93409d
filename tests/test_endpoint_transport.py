"""What goes over the wire is what aiohttp's own session sends, and what comes back is read as its session reads it."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from limbeck.collect.endpoints.transport import NoReplyError, Transport

HEADERS = {"Authorization": "Bearer key"}
BODY = b'{"answer": "yes"}' * 40
Script = Callable[[str], Awaitable[object]]


class Scripted:
    """A server that reads requests and answers each with the same bytes; `closing` says to hang up after them. `later`
    comes a little after each answer, unasked. For `asleep` seconds after an answer nobody in this thread does anything.
    """

    def __init__(self, answer: bytes, *, closing: bool = False, later: bytes = b"", asleep: float = 0.0):
        self.answer, self.closing, self.later, self.asleep = answer, closing, later, asleep
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(dict(_fields(head))[b"content-length"])
                self.requests.append((head, await reader.readexactly(length)))
                writer.write(self.answer)
                time.sleep(self.asleep)
                await writer.drain()
                if self.closing:
                    return
                if self.later:
                    await asyncio.sleep(0.02)
                    writer.write(self.later)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def _fields(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = [line.split(b":", 1) for line in head.split(b"\r\n")[1:] if line]
    return [(name.lower(), value.strip()) for name, value in lines]


def asked(server: Scripted, script: Script) -> object:
    async def work() -> object:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listening:
            return await script(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/chat?x=1")

    return asyncio.run(work())


async def by_session(address: str) -> tuple[int, bytes] | str:
    headers = {"Content-Type": "application/json", "Accept": "application/json", **HEADERS, "Idempotency-Key": "k"}
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(address, data=BODY, headers=headers, timeout=aiohttp.ClientTimeout(total=5)) as response,
        ):
            return response.status, await response.read()
    except aiohttp.ClientError:
        return "cut"


async def by_transport(address: str) -> tuple[int, bytes] | str:
    async with Transport(address, HEADERS, 4, 5.0) as transport:
        try:
            reply = await transport.post(BODY, "k")
        except NoReplyError as error:
            return error.kind
        return reply.status, reply.body


def _said(head: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {head}\r\n\r\n".encode() + body


WHOLE = _said(f"200 OK\r\nContent-Length: {len(BODY)}", BODY)
LARGE = BODY * 3000  # of 2 MB, more than is read or kept at a time
PACKED = gzip.compress(LARGE, mtime=0)
ANSWERS = {
    "whole": (WHOLE, False),
    "whole, then hung up": (_said(f"200 OK\r\nConnection: close\r\nContent-Length: {len(BODY)}", BODY), True),
    "chunked": (_said("200 OK\r\nTransfer-Encoding: chunked", b"5\r\n01234\r\n3\r\nabc\r\n0\r\n\r\n"), False),
    "packed": (
        _said(f"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(gzip.compress(BODY, mtime=0))}",
              gzip.compress(BODY, mtime=0)), False),
    "large": (_said(f"200 OK\r\nContent-Length: {len(LARGE)}", LARGE), False),
    "large and chunked": (
        _said("200 OK\r\nTransfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(LARGE), LARGE) + b"0\r\n\r\n"), False),
    "large and packed": (
        _said(f"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(PACKED)}", PACKED), False),
    "large and cut": (_said(f"200 OK\r\nContent-Length: {len(LARGE) + 1}", LARGE), True),
    "until the end": (_said("200 OK", BODY), True),
    "after a 100": (_said("100 Continue", b"") + WHOLE, False),
    "nothing in it": (_said("204 No Content", b""), False),
    "an error": (_said("429 Too Many Requests\r\nContent-Length: 2", b"{}"), False),
    "a redirect is not followed": (_said("500 Oops\r\nLocation: /other\r\nContent-Length: 0", b""), False),
    "cut in the body": (_said("200 OK\r\nContent-Length: 999", BODY), True),
    "cut in the head": (b"HTTP/1.1 200 OK\r\nContent-Le", True),
    "nothing at all": (b"", True),
    "not HTTP": (b"what do you want?\r\n\r\n", True),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_replies_are_read_as_aiohttp_reads_them(name: str):
    answer, closing = ANSWERS[name]
    assert asked(Scripted(answer, closing=closing), by_transport) == asked(
        Scripted(answer, closing=closing), by_session
    )


def test_the_same_is_sent_as_by_aiohttp():
    ours, theirs = Scripted(WHOLE), Scripted(WHOLE)
    asked(ours, by_transport)
    asked(theirs, by_session)
    (head, body), (other_head, other_body) = ours.requests[0], theirs.requests[0]
    assert body == other_body == BODY
    assert head.split(b"\r\n")[0] == other_head.split(b"\r\n")[0]
    fields, others = ([f for f in _fields(h) if f[0] != b"host"] for h in (head, other_head))
    assert sorted(fields) == sorted(others)


def test_connections_are_used_again_and_those_that_were_closed_are_not():
    async def several(address: str) -> list[int]:
        async with Transport(address, HEADERS, 4, 5.0) as transport:
            counts = []
            for _ in range(3):
                await asyncio.gather(*(transport.post(BODY, str(n)) for n in range(4)))
                await asyncio.sleep(0.05)
                counts.append(server.connections)
            return counts

    server = Scripted(WHOLE)
    assert asked(server, several) == [4, 4, 4]
    assert len(server.requests) == 12
    server = Scripted(WHOLE, closing=True)  # without a word of it in the answer
    assert asked(server, several) == [4, 8, 12]


def test_a_request_that_takes_too_long_is_given_up_and_its_connection_is_not_used_again():
    async def late(address: str) -> object:
        async with Transport(address, HEADERS, 1, 0.1) as transport:
            kinds = []
            for _ in range(2):
                with pytest.raises(NoReplyError) as error:
                    await transport.post(BODY, "k")
                kinds.append(error.value.kind)
            return kinds

    server = Scripted(b"")
    assert asked(server, late) == ["timeout", "timeout"]
    assert server.connections == 2


def test_answers_of_every_kind_come_over_one_connection_one_after_another():
    kept = [answer for answer, closing in ANSWERS.values() if not closing]

    async def in_turn(address: str) -> list[tuple[int, bytes]]:
        async with Transport(address, HEADERS, 1, 5.0) as transport:
            found = []
            for server.answer in kept * 3:
                reply = await transport.post(BODY, "k")
                found.append((reply.status, reply.body))
            return found

    server = Scripted(b"")
    found = asked(server, in_turn)
    assert server.connections == 1
    assert found == [asked(Scripted(answer), by_session) for answer in kept] * 3


@pytest.mark.parametrize("begun", [b"", WHOLE[:30], WHOLE[:-5]], ids=["nothing", "half a head", "half a body"])
def test_who_waits_too_long_on_a_used_connection_is_given_up_and_nobody_else(begun: bytes):
    async def some_late(address: str) -> tuple[list[object], float]:
        async with Transport(address, HEADERS, 8, 0.3) as transport:
            await asyncio.gather(*(transport.post(BODY, "k") for _ in range(4)))
            server.answer, started = begun, asyncio.get_running_loop().time()
            late = [asyncio.create_task(transport.post(BODY, "k")) for _ in range(3)]
            await asyncio.sleep(0.15)
            server.answer = WHOLE
            quick = [await transport.post(BODY, "k") for _ in range(5)]
            ended = await asyncio.gather(*late, return_exceptions=True)
            took = asyncio.get_running_loop().time() - started
            quick += [await transport.post(BODY, "k") for _ in range(2)]
            assert {reply.body for reply in quick} == {BODY}
            return [getattr(error, "kind", error) for error in ended], took

    server = Scripted(WHOLE)
    kinds, took = asked(server, some_late)  # type: ignore[misc]
    assert kinds == ["timeout"] * 3
    assert 0.29 < took < 2
    assert server.connections == 4


@pytest.mark.parametrize("later", [WHOLE, WHOLE[:30]], ids=["an answer", "half a head"])
def test_what_nobody_asked_for_is_no_answer_to_the_next_request(later: bytes):
    """A server may say 408 over a connection that nobody uses, or answer twice."""

    async def in_turn(address: str) -> list[bytes]:
        async with Transport(address, HEADERS, 1, 5.0) as transport:
            found = []
            for server.answer in (_said(f"200 OK\r\nContent-Length: {n}", b"x" * n) for n in (1, 2, 3)):
                try:
                    found.append((await transport.post(BODY, "k")).body)
                except NoReplyError as error:
                    found.append(error.kind.encode())
                await asyncio.sleep(0.1)
            return found

    server = Scripted(b"", later=later)
    found = asked(server, in_turn)
    if later == WHOLE:
        assert found == [b"x", b"xx", b"xxx"]
        assert server.connections == 3
    else:  # of which nothing is known until more has come
        assert found == [b"x", b"cut", b"xxx"]


def test_an_answer_that_is_here_when_its_time_is_over_is_taken():
    """It is paid for. Where the process did not get to run for a while, all that came meanwhile is late."""

    async def twice(address: str) -> list[bytes]:
        async with Transport(address, HEADERS, 1, 0.2) as transport:
            return [(await transport.post(BODY, "k")).body for _ in range(2)]

    assert asked(Scripted(WHOLE, asleep=0.3), twice) == [BODY, BODY]


def test_nobody_there_is_told_as_no_connection():
    assert asyncio.run(by_transport("http://127.0.0.1:9/v1")) == "connect"
