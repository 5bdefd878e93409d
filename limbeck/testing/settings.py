"""What a test server can be told: models with their prices, the shape of answers, keys and quota."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Form(BaseModel):
    """Settings of this package: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Form):
    """A model that the server serves. Prices are US dollars per million tokens."""

    input: Decimal = Field(default=Decimal("0.5"), ge=0)
    """Price of prompt tokens."""
    output: Decimal = Field(default=Decimal("2"), ge=0)
    """Price of completion tokens, reasoning included."""
    context: int = Field(default=131_072, ge=1)
    """Tokens of prompt and answer together; a longer prompt is refused with a 400."""
    reasoning: int = Field(default=0, ge=0)
    """Tokens that it thinks before it answers; they are billed, and count against the request's limit."""
    reasoning_key: Literal["reasoning_content", "reasoning", "none"] = "reasoning_content"
    """Where a chat completion shows the reasoning: `reasoning_content` (DeepSeek, older vLLM), `reasoning` (newer
    vLLM), or nowhere (OpenAI, which only counts it)."""


class Settings(Form):
    """How a test server answers when nothing goes wrong. Faults are apart: `limbeck.testing.Faults`."""

    models: dict[str, Model] = Field(
        default={"toy": Model(), "toy-reasoner": Model(reasoning=64), "*": Model()}, min_length=1
    )
    """By name; `*` stands for every other name. Without it, other names are refused with a 404."""
    words: int = Field(default=240, ge=1)
    """Length of an answer in words, which are 5 bytes and 1 token each. With 240, a chat completion has 1.7 kB."""
    spread: float = Field(default=0.0, ge=0, le=1)
    """An answer's length is drawn between `words * (1 - spread)` and `words * (1 + spread)`, by its request."""
    items: int = Field(default=0, ge=0)
    """With more than 0, an answer is a numbered list of so many items, each as long as an answer would be."""
    delay: float = Field(default=0.0, ge=0)
    """Seconds from a request to its answer."""
    vocabulary: int = Field(default=512, ge=256)
    """Tokens of the toy vocabulary: 256 bytes, then words, then fillers that only stand as ids."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most log-probabilities a token that /v1/completions gives."""
    token_ids: bool = False
    """Whether log-probabilities of chat completions have each token's `id` too, as those of llama.cpp's server do."""
    api_keys: tuple[str, ...] = ()
    """Keys that are let in; with none, every key is, and none is needed."""
    quota: Decimal | None = None
    """US dollars; when the bill has reached them, requests are refused as `insufficient_quota`."""
    idempotency: bool = True
    """Whether a request with the `Idempotency-Key` of an earlier one gets that one's answer and is not billed again."""
    batch_seconds: float = Field(default=0.2, ge=0)
    """How long a batch takes."""
    batch_price: Decimal = Field(default=Decimal("0.5"), ge=0)
    """Share of the price that rows of a batch cost."""

    def model(self, name: str) -> Model | None:
        """The model of this name, or the one that stands for every other; None where there is none."""
        return self.models.get(name) or self.models.get("*")
