"""The server: a socket on 127.0.0.1, a table of paths, a thread where one is wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Self

from aiohttp import web

from limbeck.testing.answers import Json, content_seed
from limbeck.testing.bill import Bill
from limbeck.testing.calls import Call
from limbeck.testing.errors import Refused
from limbeck.testing.faults import Faults, Limit
from limbeck.testing.openai_chat import ChatRequest
from limbeck.testing.requests import checked, render
from limbeck.testing.routes import Routes
from limbeck.testing.service import ENDPOINTS, Service, provider_of
from limbeck.testing.settings import Settings

_UPLOAD = 300 * 2**20
"""Bytes of the largest body that is read; a batch file may have 200 MB."""


class Server:
    """A test server, as an asynchronous context manager, or a plain one that runs it in a thread of its own.

        with Server(Settings(delay=0.05), Faults(faults=(ServerError(probability=0.1),))) as server:
            collect_from(server.url + "/v1")
            assert server.bill.doubled == {}

    Raises `OSError` where the port is taken.
    """

    def __init__(
        self, settings: Settings | None = None, faults: Faults | None = None, *, host: str = "127.0.0.1", port: int = 0
    ):
        self.service = Service(settings or Settings(), faults or Faults())
        self._routes = Routes(self.service)
        self._host, self._port = host, port
        self._runner: web.ServerRunner | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    @property
    def bill(self) -> Bill:
        """What was charged. Read from another thread, it holds all that was sent before."""
        self._on_loop(lambda: None)
        return self.service.bill

    @property
    def settings(self) -> Settings:
        """What the server was told."""
        return self.service.settings

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`: Anthropic's base URL; OpenAI's is this with `/v1`."""
        return f"http://{self._host}:{self._port}"

    def distribution(self, context: list[int]) -> list[float]:
        """Log-probabilities, in nats, of every token after these: what `logprobs` and `prompt_logprobs` show."""
        return self.service.desk.vocabulary.logprobs(context).tolist()

    def expected(self, path: str, body: Json) -> Json:
        """What a request would be answered with, were nothing to go wrong; not billed. Ids and times differ, all else
        is the same. Raises `KeyError` for a path that answers no prompts, `limbeck.testing.Refused` for a body that
        would be refused.
        """
        call = Call(path, body, content_seed(body), "expected", time.time())
        return ENDPOINTS[path](self.service.desk, call).body

    def context(self, body: Json) -> list[int]:
        """The tokens after which the first token of a chat's answer comes: what `logprobs` of chat completions are
        conditioned on. Raises `limbeck.testing.Refused` for a body that is no chat.
        """
        text = render(checked(ChatRequest, body).messages).text
        return self.service.desk.vocabulary.encode(text)

    def set_faults(self, faults: Faults) -> None:
        """Start another schedule of faults and limits; its clock begins now."""
        self._on_loop(self.service.begin, faults)

    def set_limit(self, limit: Limit) -> None:
        """Change the rate limits at once; what is in the buckets stays, as far as it fits."""
        self._on_loop(lambda: self.service.limits.set(limit, self.service.now))

    def _on_loop(self, work, *arguments) -> None:
        """Do it between two requests, from whatever thread."""
        thread = self._thread
        if self._loop is None or thread is None or not thread.is_alive() or threading.current_thread() is thread:
            work(*arguments)
            return
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (work(*arguments), done.set()))
        done.wait()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        server = web.Server(self._handle, request_factory=self._request, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, backlog=4096).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._routes.batches.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def __enter__(self) -> Self:
        started: list[BaseException | None] = []
        ready = threading.Event()

        async def serve() -> None:
            try:
                await self.__aenter__()
            except OSError as error:
                started.append(error)
                return
            finally:
                ready.set()
            await self._stop.wait()
            await self.__aexit__(None, None, None)

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="limbeck-testing", daemon=True)
        self._thread.start()
        ready.wait()
        if started and started[0] is not None:
            raise started[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _request(self, message, payload, protocol, writer, task) -> web.BaseRequest:
        loop = self._loop or asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=_UPLOAD)

    async def _handle(self, http: web.BaseRequest) -> web.StreamResponse:
        if http.method == "POST" and (endpoint := ENDPOINTS.get(http.path)):
            return await self.service.answer(http, endpoint)
        try:
            return await self._routes.answer(http)
        except Refused as refused:
            return await self.service.refuse(http, refused, provider_of(http), f"req_{self.service.serial()}")
