"""The paths that do not answer prompts: models, files, batches, and the server's own bill and schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import orjson
from aiohttp import web
from pydantic import ValidationError

from limbeck.testing import anthropic_batches, models, openai_batches
from limbeck.testing.answers import Json
from limbeck.testing.batches import Batch, Batches, Biller, Row
from limbeck.testing.bill import Bill
from limbeck.testing.calls import Reply
from limbeck.testing.errors import Refused
from limbeck.testing.faults import BadBatch, Faults, Limit
from limbeck.testing.service import ENDPOINTS, Service, parsed, provider_of

_F = TypeVar("_F", Faults, Limit)


class Routes:
    """Answers every path but those of `ENDPOINTS`."""

    def __init__(self, service: Service):
        self._service = service
        self._files = openai_batches.Files()
        biller = Biller(service.desk, ENDPOINTS.get, service.serial, service.twist_row, self._charge)
        self.batches = Batches(biller)

    def _charge(self, reply: Reply, row: Row, digest: str, request_id: str, batch: str) -> None:
        self._service.charge(reply, row.path, digest, request_id, None, batch=batch, custom_id=row.custom_id)

    async def answer(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer a request. Raises `Refused` where the path is not there."""
        parts = http.path.strip("/").split("/")
        match http.method, parts:
            case _, ["bill" | "faults" | "limit"]:
                return await self._own(http)
            case "GET", ["v1", "models"]:
                return await self._act(http, lambda _: models.model_list(self._service.settings, provider_of(http)))
            case "GET", ["v1", "models", name]:
                return await self._act(http, lambda _: models.model(self._service.settings, provider_of(http), name))
            case _, ["v1", "files", *rest]:
                return await self._on_files(http, rest)
            case _, ["v1", "batches", *rest]:
                return await self._on_openai(http, rest)
            case _, ["v1", "messages", "batches", *rest]:
                return await self._on_anthropic(http, rest)
        raise self._nowhere(http)

    def _nowhere(self, http: web.BaseRequest) -> Refused:
        return Refused("not_found", f"Invalid URL ({http.method} {http.path})")

    async def _act(self, http: web.BaseRequest, work: Callable[[bytes], Json | bytes]) -> web.StreamResponse:
        raw = await http.read()
        return await self._service.act(http, raw, lambda: work(raw))

    async def _on_files(self, http: web.BaseRequest, rest: list[str]) -> web.StreamResponse:
        files = self._files
        match http.method, rest:
            case "POST", []:
                form = await http.post()
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, web.FileField) or not isinstance(purpose, str):
                    raise Refused("invalid", "A file and its purpose are required.", param="file")
                data, name, serial = file.file.read(), file.filename, self._service.serial()
                work = lambda: files.add(serial, name, purpose, data).as_json()  # noqa: E731
                return await self._service.act(http, data, work)
            case "GET", []:
                return await self._act(http, lambda _: self._page(http, [file.as_json() for file in files.listed()]))
            case "GET", [name]:
                return await self._act(http, lambda _: files.get(name).as_json())
            case "GET", [name, "content"]:
                return await self._act(http, lambda _: files.get(name).data)
            case "DELETE", [name]:
                return await self._act(http, lambda _: files.remove(name))
        raise self._nowhere(http)

    def _page(self, http: web.BaseRequest, items: list[Json]) -> Json:
        return openai_batches.page(items, http.query.get("after"), http.query.get("limit"))

    async def _on_openai(self, http: web.BaseRequest, rest: list[str]) -> web.StreamResponse:
        batches = self.batches
        match http.method, rest:
            case "POST", []:
                return await self._act(http, self._new_openai)
            case "GET", []:
                shown = lambda _: self._page(http, [openai_batches.as_json(b) for b in batches.listed("openai")])  # noqa: E731
                return await self._act(http, shown)
            case "GET", [name]:
                return await self._act(http, lambda _: openai_batches.as_json(batches.get(name, "openai")))
            case "POST", [name, "cancel"]:
                batch = batches.get(name, "openai")
                return await self._act(http, lambda _: batches.cancel(batch) or openai_batches.as_json(batch))
        raise self._nowhere(http)

    def _new_openai(self, raw: bytes) -> Json:
        serial = self._service.serial()
        batch = openai_batches.new_batch(parsed(raw), self._files, serial, self._fate("/v1/batches", raw))
        names = (self._service.serial(), self._service.serial())
        self.batches.add(batch, lambda ended: openai_batches.write_files(ended, self._files, names))
        return openai_batches.as_json(batch)

    async def _on_anthropic(self, http: web.BaseRequest, rest: list[str]) -> web.StreamResponse:
        batches, url = self.batches, f"{http.scheme}://{http.host}"
        match http.method, rest:
            case "POST", []:
                return await self._act(http, lambda raw: self._new_anthropic(raw, url))
            case "GET", []:
                return await self._act(http, lambda _: self._anthropic_page(http, url))
            case "GET", [name]:
                return await self._act(http, lambda _: anthropic_batches.as_json(batches.get(name, "anthropic"), url))
            case "GET", [name, "results"]:
                return await self._act(http, lambda _: anthropic_batches.results(batches.get(name, "anthropic")))
            case "POST", [name, "cancel"]:
                batch = batches.get(name, "anthropic")
                return await self._act(http, lambda _: batches.cancel(batch) or anthropic_batches.as_json(batch, url))
            case "DELETE", [name]:
                return await self._act(http, lambda _: self._delete(batches.get(name, "anthropic")))
        raise self._nowhere(http)

    def _new_anthropic(self, raw: bytes, url: str) -> Json:
        fate = self._fate("/v1/messages/batches", raw)
        batch = anthropic_batches.new_batch(parsed(raw), self._service.serial(), fate)
        self.batches.add(batch, lambda _: None)
        return anthropic_batches.as_json(batch, url)

    def _anthropic_page(self, http: web.BaseRequest, url: str) -> Json:
        items = [anthropic_batches.as_json(batch, url) for batch in self.batches.listed("anthropic")]
        query = http.query
        return anthropic_batches.page(items, query.get("after_id"), query.get("before_id"), query.get("limit"))

    def _delete(self, batch: Batch) -> Json:
        if not batch.ended:
            raise Refused("invalid", "A batch that has not ended cannot be deleted.")
        self.batches.remove(batch)
        return {"id": batch.id, "type": "message_batch_deleted"}

    def _fate(self, path: str, raw: bytes) -> BadBatch | None:
        """What the schedule has in store for a new batch."""
        provider = "anthropic" if path.startswith("/v1/messages") else "openai"
        fate = self._service.sent.draw(path=path, answers=False, number=len(self.batches.listed(provider)) + 1,
                                       attempt=1, digest=hashlib.sha256(raw).hexdigest(), raw=raw,
                                       now=self._service.now, batch=True)  # fmt: skip
        return fate if isinstance(fate, BadBatch) else None

    async def _own(self, http: web.BaseRequest) -> web.StreamResponse:
        """The bill, and the schedule; not asked for any key, and no fault meets them."""
        service = self._service
        match http.method, http.path:
            case "GET", "/bill":
                since = http.query.get("since", "0")
                return _json(service.bill.as_json(int(since) if since.isdecimal() else 0))
            case "DELETE", "/bill":
                service.bill = Bill()
                return _json({})
            case "GET", "/faults":
                return _json(service.faults.model_dump(mode="json"))
            case "PUT", "/faults":
                service.begin(await _read(http, Faults))
                return _json({})
            case "PUT", "/limit":
                service.limits.set(await _read(http, Limit), service.now)
                return _json({})
        raise self._nowhere(http)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


async def _read(http: web.BaseRequest, form: type[_F]) -> _F:
    try:
        return form.model_validate_json(await http.read())
    except ValidationError as error:
        raise Refused("invalid", str(error)) from None
