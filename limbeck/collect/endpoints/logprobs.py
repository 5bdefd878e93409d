"""Log-probabilities that came with an answer, as they lie in the journal.

    chat completions   choices[0].logprobs.content     OpenAI, vLLM, Ollama; llama.cpp's server adds each token's `id`
    responses          output[].content[].logprobs     OpenAI

Each token has its text, its bytes, its log-probability, and the same of the likeliest ones at its place. vLLM writes
`token_id:17` as the text where it was asked to (`return_tokens_as_token_ids`). Read in OpenAI's description of its API
and in llama.cpp's `server-task.cpp` (2026). All three are of the model itself, before temperature and top_p, unless a
server was told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from limbeck.collect.endpoints.reply import count, document, items, mapping, text

_BY_ID = "token_id:"


class Piece(NamedTuple):
    """A token as an endpoint shows it."""

    id: int | None
    data: bytes | None
    """Its bytes, where they are known."""
    text: str
    logprob: float
    """Nats."""


class Told(NamedTuple):
    """A token of an answer, and the likeliest at its place."""

    own: Piece
    top: tuple[Piece, ...]


def read_logprobs(raw: bytes) -> tuple[Told, ...] | None:
    """What an answer says of its tokens; None where it says nothing, or not what the API promises."""
    found = document(raw) or {}
    listed = mapping(mapping(next(iter(items(found.get("choices"))), None)).get("logprobs")).get("content")
    if not isinstance(listed, list):
        parts = [part for item in items(found.get("output")) for part in items(mapping(item).get("content"))]
        listed = [token for part in parts for token in items(mapping(part).get("logprobs"))]
    told = [_told(mapping(token)) for token in listed]
    whole = tuple(one for one in told if one is not None)
    return whole if whole and len(whole) == len(told) else None


def _told(token: Mapping[str, JsonValue]) -> Told | None:
    own, top = _piece(token), [_piece(mapping(one)) for one in items(token.get("top_logprobs"))]
    good = tuple(one for one in top if one is not None)
    return Told(own, good) if own is not None and len(good) == len(top) else None


def _piece(token: Mapping[str, JsonValue]) -> Piece | None:
    said, value, id_ = text(token.get("token")), token.get("logprob"), count(token.get("id"))
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if said.startswith(_BY_ID) and said.removeprefix(_BY_ID).isdecimal():
        return Piece(int(said.removeprefix(_BY_ID)), None, said, float(value))
    return Piece(id_, _bytes(said, token.get("bytes")), said, float(value))


def _bytes(said: str, listed: JsonValue) -> bytes | None:
    if isinstance(listed, list):
        return _of_numbers(listed)
    # A piece of a character shows as U+FFFD, or as an escape: then its bytes are not known.
    return None if "\ufffd" in said or said.startswith("bytes:") or not said else said.encode("utf-8", "surrogatepass")


def _of_numbers(listed: Sequence[JsonValue]) -> bytes | None:
    numbers = [one for one in listed if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 256]
    return bytes(numbers) if len(numbers) == len(listed) and numbers else None
