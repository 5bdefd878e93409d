"""What can go wrong on purpose: a schedule of faults and rate limits, as YAML or as objects.

    seed: 7
    faults:
      - {kind: server_error, status: 503, probability: 0.02}
      - {kind: rate_limit, window: [10, 20], retry_after: date}
      - {kind: cut, when: after_billing, attempts: 1}
    limits:
      - {requests_per_minute: 6000}
      - {after: 20, requests_per_minute: 3000}
      - {after: 40, requests_per_minute: 1500}

Of the faults that apply to a request, the first is sent, and only that one. What is drawn depends on the seed, the
fault, the request's body and which attempt of this body it is, not on the order of arrival: the same requests meet
the same faults however many run at once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from limbeck.errors import InputError, Problem
from limbeck.testing.settings import Form

_F = TypeVar("_F", bound=Form)


class _When(Form):
    """To which requests a fault applies: those that meet every condition that is given."""

    probability: float = Field(default=1.0, ge=0, le=1)
    window: tuple[float, float] | None = None
    """From and to, in seconds since the server started."""
    requests: tuple[int, int] | None = None
    """First and last number of the request, counted from 1 over all requests for an answer."""
    every: int | None = Field(default=None, ge=1)
    """Each so-manyth request."""
    attempts: int | None = Field(default=None, ge=1)
    """Only the first so many times that a body is sent: what a collector tries again then goes through."""
    endpoints: tuple[str, ...] = ()
    """Paths, such as /v1/batches, or beginnings of paths, such as /v1/batches/*. With none, all that answer prompts
    (for the `batch_...` faults: all that create batches)."""
    contains: str | None = None
    """Only bodies in which this text occurs."""


class RateLimit(_When):
    """A 429 although the limits would allow the request."""

    kind: Literal["rate_limit"] = "rate_limit"
    retry_after: Literal["none", "seconds", "date", "ms"] = "seconds"
    """`seconds` and `date` (an HTTP date) in Retry-After, `ms` in retry-after-ms."""
    wait: float = Field(default=1.0, ge=0)
    """Seconds that it says."""


class ServerError(_When):
    """A 5xx; 502 and 504 as a gateway's HTML page."""

    kind: Literal["server_error"] = "server_error"
    status: Literal[500, 502, 503, 504, 529] = 500
    retry_after: Literal["none", "seconds", "date", "ms"] = "none"
    wait: float = Field(default=1.0, ge=0)
    """Seconds that Retry-After says, where it is sent."""


class Refusal4xx(_When):
    """A request refused for good: what must not be tried again, although OpenAI's `quota` is a 429."""

    kind: Literal["context", "unauthorized", "forbidden", "quota", "billing", "invalid"]


class Timeout(_When):
    """A 408."""

    kind: Literal["timeout"] = "timeout"


class Delay(_When):
    """An answer that comes late, and is billed."""

    kind: Literal["delay"] = "delay"
    seconds: float = Field(ge=0)


class Drip(_When):
    """An answer that comes in small pieces."""

    kind: Literal["drip"] = "drip"
    piece: int = Field(default=64, ge=1)
    """Bytes."""
    pause: float = Field(default=0.05, ge=0)
    """Seconds between pieces."""


class Cut(_When):
    """A connection that breaks. After billing, the answer was paid for and is lost on the wire."""

    kind: Literal["cut"] = "cut"
    when: Literal["before_billing", "after_billing", "mid_body"]
    reset: bool = False
    """With a TCP reset, not a close."""


class Truncated(_When):
    """An answer that ends at its length limit, too early."""

    kind: Literal["truncated"] = "truncated"
    share: float = Field(default=0.5, ge=0, lt=1)
    """Of its tokens, what is kept."""


class Withheld(_When):
    """A refusal by the model, a content filter's cut, or no choices at all. Billed, each of them."""

    kind: Literal["refusal", "filter", "empty"]


class Malformed(_When):
    """A body with status 200 that is no JSON: the answer, cut off. Billed."""

    kind: Literal["malformed"] = "malformed"


class OffSchema(_When):
    """JSON that is not what the request's schema asks for. Billed. A request without a schema gets its answer."""

    kind: Literal["off_schema"] = "off_schema"
    prose: bool = False
    """Words that are no JSON in its place."""


class WrongType(_When):
    """A body with status 200 under another content type. Billed."""

    kind: Literal["wrong_type"] = "wrong_type"
    content_type: str = "text/html"
    page: bool = False
    """An HTML page in place of the answer; else the answer itself."""


class BadBatch(_When):
    """What happens to a batch when it is created: it expires, fails, or some of its rows do."""

    kind: Literal["batch_expired", "batch_failed", "batch_rows"]
    share: float = Field(default=0.5, ge=0, le=1)
    """Of the rows: those that are done before the batch expires, or those that fail."""


Fault = Annotated[
    RateLimit | ServerError | Refusal4xx | Timeout | Delay | Drip | Cut | Truncated | Withheld | Malformed
    | OffSchema | WrongType | BadBatch,
    Field(discriminator="kind"),
]  # fmt: skip


TWISTS = (Truncated, Withheld, OffSchema)
"""Those that change what the model writes."""


class Limit(Form):
    """Rate limits from a moment on, until the next one."""

    after: float = Field(default=0.0, ge=0)
    """Seconds since the server started."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Prompt tokens and the most that may be answered (max_tokens), taken when a request is let in."""
    input_tokens_per_minute: float | None = Field(default=None, gt=0)
    """Prompt tokens alone, as Anthropic counts."""
    output_tokens_per_minute: float | None = Field(default=None, gt=0)
    """The most that may be answered, alone."""
    burst: float = Field(default=60.0, gt=0)
    """The buckets hold what flows in within so many seconds. Providers allow a minute's worth, or a second's."""
    retry_after: Literal["none", "seconds", "date", "ms"] = "seconds"
    headers: bool = True
    """Whether answers say what is left: x-ratelimit-*, anthropic-ratelimit-*."""
    count_refused: bool = False
    """Whether a refused request takes from the bucket too, as OpenAI says of its own."""


class Faults(Form):
    """A schedule: what goes wrong, and how much is allowed when."""

    seed: int = 0
    faults: tuple[Fault, ...] = ()
    limits: tuple[Limit, ...] = ()


class Sent:
    """Draws faults for requests."""

    def __init__(self, faults: Faults):
        self.schedule = faults
        self._batch = tuple(
            (number, fault) for number, fault in enumerate(faults.faults) if isinstance(fault, BadBatch)
        )
        self._rest = tuple(
            (number, fault) for number, fault in enumerate(faults.faults) if not isinstance(fault, BadBatch)
        )
        self._twists = tuple((number, fault) for number, fault in self._rest if isinstance(fault, TWISTS))

    def draw(self, *, path: str, answers: bool, number: int, attempt: int, digest: str, raw: bytes, now: float,
             batch: bool = False, row: bool = False) -> Fault | None:  # fmt: skip
        """The fault for a request, or None. `now` in seconds since the start, `attempt` from 1; `batch` asks for what
        will happen to a batch, `row` for one of its rows, which nothing meets but what changes the model's words.
        """
        for index, fault in self._batch if batch else self._twists if row else self._rest:
            if fault.endpoints and not any(_names(pattern, path) for pattern in fault.endpoints):
                continue
            if not (fault.endpoints or answers or batch):
                continue
            if fault.window and not fault.window[0] <= now < fault.window[1]:
                continue
            if fault.requests and not fault.requests[0] <= number <= fault.requests[1]:
                continue
            if (fault.every and number % fault.every) or (fault.attempts and attempt > fault.attempts):
                continue
            if fault.contains is not None and fault.contains.encode() not in raw:
                continue
            if fault.probability < 1 and self._uniform(index, digest, attempt) >= fault.probability:
                continue
            return fault
        return None

    def _uniform(self, index: int, digest: str, attempt: int) -> float:
        """A number from 0 to 1 that depends on the seed and the request alone."""
        data = f"{self.schedule.seed}/{index}/{digest}/{attempt}".encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def _names(pattern: str, path: str) -> bool:
    return path.startswith(pattern[:-1]) if pattern.endswith("*") else path == pattern


def read_form(path: Path, form: type[_F]) -> _F:
    """A schedule, or settings, from a YAML file. Raises `InputError` with everything that is wrong with it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = Problem(str(path), str(error), "a YAML file", "see docs/testing.md for what may be in it")
        raise InputError("a file for the test server cannot be read", [problem]) from error
    try:
        return form.model_validate(data if data is not None else {})
    except ValidationError as error:
        found = [_problem(path, part["loc"], part["input"], part["msg"]) for part in error.errors(include_url=False)]
        raise InputError("a file for the test server has errors", found) from None


def _problem(path: Path, place: tuple[int | str, ...], value: object, message: str) -> Problem:
    where = f"{path}: {'.'.join(str(step) for step in place) or 'the whole file'}"
    return Problem(where, repr(value)[:120], message, "correct it; docs/testing.md lists every key")
