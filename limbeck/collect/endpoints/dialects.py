"""What differs between the APIs: how a question is put and how an answer is read. Nothing here sends anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from limbeck import recipe
from limbeck.collect.contents import Wanted
from limbeck.collect.endpoints.reply import MALFORMED, Usage, document, text
from limbeck.collect.teachers import Parsed
from limbeck.records import Message

Body = Mapping[str, JsonValue]

NOTHING = Wanted()
"""Neither tools nor a schema."""


class Read(NamedTuple):
    """An answer, read."""

    parsed: Parsed
    usage: Usage | None
    """None where the provider did not say: then the bill is not known."""


def nothing(reason: str, model: str = "") -> Read:
    """What there is to say of an answer without words, and the reason."""
    return Read(Parsed("", None, reason, model, 0, 0), None)


class Dialect(Protocol):
    """One API. Laws: `body` is a function of its arguments; `read` of the answer, and never raises."""

    form: str
    """Names the API and the version of what lies in the journal."""

    def address(self, base_url: str) -> str:
        """Where requests go."""
        ...

    def headers(self, key: str | None) -> dict[str, str]:
        """Headers beside the content type; the key goes here and nowhere else."""
        ...

    def body(
        self, model: str, messages: Sequence[Message], settings: recipe.Collect, seed: int, wanted: Wanted = NOTHING
    ) -> Body:
        """What is sent; `wanted` are tools and schema. Raises `ValueError` with what it cannot ask."""
        ...

    def read(self, found: Mapping[str, JsonValue]) -> Read:
        """Text, counts and finish reason of an answer. What the API does not promise is `malformed`, and kept."""
        ...


def read_raw(dialect: Dialect, raw: bytes) -> Read:
    """The same of its bytes, and how the provider names it, which all APIs do alike."""
    found = document(raw)
    if found is None:
        return nothing(MALFORMED)
    read = dialect.read(found)
    answer_id, fingerprint = text(found.get("id")) or None, text(found.get("system_fingerprint")) or None
    return Read(read.parsed._replace(answer_id=answer_id, fingerprint=fingerprint), read.usage)
