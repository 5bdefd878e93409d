"""A server that costs as little as can be: `python benchmarks/answering.py --core 0`, then its address is printed.

It answers every POST after 50 ms with the same 1.7 kB chat completion, and does nothing else: what is measured against
it is the client. It reads requests no further than their length, which is enough for clients that send one at a time
over a connection. benchmarks/collecting.py says how busy its core was.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket

import orjson

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WORDS = "one answer is as good as another when only its length counts and nobody reads it "


def reply(size: int) -> bytes:
    """A chat completion as bytes of HTTP; its body has `size` bytes."""
    body = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "toy",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 300, "total_tokens": 320},
    }
    lacking = size - len(orjson.dumps(body))
    body["choices"][0]["message"]["content"] = (_WORDS * (1 + lacking // len(_WORDS)))[:lacking]
    raw = orjson.dumps(body)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


class Answering(asyncio.Protocol):
    """One connection."""

    def __init__(self, answer: bytes, delay: float):
        self._answer, self._delay = answer, delay
        self._loop = asyncio.get_running_loop()
        self._read, self._wanted = b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._read += data
        if not self._wanted:
            end = self._read.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._read, 0, end + 4)
            self._wanted = end + 4 + (int(length[1]) if length else 0)
        if len(self._read) >= self._wanted:
            self._read, self._wanted = b"", 0
            self._loop.call_later(self._delay, self._transport.write, self._answer)


async def _serve(size: int, delay: float) -> None:
    loop, answer = asyncio.get_running_loop(), reply(size)
    place = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = await loop.create_server(lambda: Answering(answer, delay), sock=place, backlog=4096)
    print(f"http://127.0.0.1:{place.getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--core", type=int, help="the one core to run on")
    parser.add_argument("--bytes", type=int, default=1700, help="of an answer's body")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before each answer")
    given = parser.parse_args()
    if given.core is not None:
        os.sched_setaffinity(0, {given.core})
    asyncio.run(_serve(given.bytes, given.delay))


if __name__ == "__main__":
    main()
