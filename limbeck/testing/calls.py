"""A request on its way through the server, and what the endpoints may use to answer it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from limbeck.testing.answers import Ask, Json, Twist
from limbeck.testing.errors import Refused
from limbeck.testing.settings import Model, Settings
from limbeck.testing.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Call:
    """One request for an answer."""

    path: str
    body: Json
    seed: bytes
    """Digest of the content, by which the answer is made."""
    serial: str
    """Part of every id in the answer."""
    time: float
    """Seconds since the epoch."""
    twist: Twist | None = None


class Usage(NamedTuple):
    """What an answer is billed for."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


class Reply(NamedTuple):
    """What an endpoint answers."""

    body: Json
    usage: Usage | None
    """None where it costs nothing."""


class Desk(NamedTuple):
    """What endpoints need to answer."""

    settings: Settings
    vocabulary: Vocabulary

    def admitted(self, ask: Ask, param: str) -> tuple[Model, int]:
        """The model and the number of prompt tokens. Raises `Refused` for a model that is not there and for a prompt
        that is too long.
        """
        model = self.settings.model(ask.model)
        if model is None:
            raise Refused("model", f"The model `{ask.model}` does not exist or you do not have access to it.")
        tokens = self.vocabulary.count(ask.prompt) + ask.extra_tokens
        if tokens + (ask.max_tokens or 0) > model.context:
            message = f"This model's maximum context length is {model.context} tokens. However, you requested "
            message += f"{tokens + (ask.max_tokens or 0)} tokens ({tokens} in the messages)."
            raise Refused("context", message, param=param)
        return model, tokens

    def top(self, logprobs: np.ndarray, count: int) -> list[int]:
        """Ids of the `count` most likely tokens, the likeliest first; ties by lower id."""
        return [int(number) for number in (-logprobs).argsort(kind="stable")[:count]]
