"""Refusals, in the words and shapes of each provider.

Checked against: the error types of the anthropic Python client 2.13 and Anthropic's page "Errors"
(`{"type": "error", "error": {"type", "message"}, "request_id"}`); the fields message, type, param and code of the
openai Python client 3.57. The texts of messages are ours, but for one: users report (anthropic-sdk-typescript#618,
claude-code#4207) that an exhausted Anthropic account is a 400 invalid_request_error which only its text tells from a
bad request, while the documentation has billing_error; `quota` is the one, `billing` the other. For the OpenAI API,
`billing` is the 402 of routers and of others who serve it. Not verified: HTML as the body of a gateway's 502 and 504.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import orjson

Provider = Literal["openai", "anthropic"]


class Refused(Exception):  # noqa: N818 - an answer that the server gives, not a failure of it
    """A request that is answered with an error."""

    def __init__(
        self, kind: str, message: str = "", *, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.kind, self.message, self.param, self.headers = kind, message, param, headers or {}


class _Words(NamedTuple):
    status: int
    type: str
    code: str | None
    message: str


_OPENAI = {
    "invalid": _Words(400, "invalid_request_error", None, "Invalid request."),
    "context": _Words(400, "invalid_request_error", "context_length_exceeded", "The context length was exceeded."),
    "unauthorized": _Words(401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "forbidden": _Words(403, "invalid_request_error", None, "You are not allowed to do that."),
    "model": _Words(404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "not_found": _Words(404, "invalid_request_error", None, "Not found."),
    "timeout": _Words(408, "server_error", None, "The request timed out."),
    "conflict": _Words(409, "invalid_request_error", None, "The request conflicts with another."),
    "requests": _Words(429, "requests", "rate_limit_exceeded", "Rate limit reached on requests per min (RPM)."),
    "tokens": _Words(429, "tokens", "rate_limit_exceeded", "Rate limit reached on tokens per min (TPM)."),
    "input-tokens": _Words(429, "tokens", "rate_limit_exceeded", "Rate limit reached on input tokens per min."),
    "output-tokens": _Words(429, "tokens", "rate_limit_exceeded", "Rate limit reached on output tokens per min."),
    "quota": _Words(429, "insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
    "billing": _Words(402, "insufficient_balance", None, "Insufficient balance."),
    "500": _Words(500, "server_error", None, "The server had an error while processing your request."),
    "502": _Words(502, "", None, "Bad gateway"),
    "503": _Words(503, "server_error", None, "The engine is currently overloaded, please try again later."),
    "504": _Words(504, "", None, "Gateway time-out"),
    "529": _Words(529, "server_error", None, "The server is overloaded."),
}

_ANTHROPIC = {
    "invalid": _Words(400, "invalid_request_error", None, "Invalid request."),
    "context": _Words(400, "invalid_request_error", None, "prompt is too long"),
    "unauthorized": _Words(401, "authentication_error", None, "invalid x-api-key"),
    "forbidden": _Words(403, "permission_error", None, "You are not allowed to do that."),
    "model": _Words(404, "not_found_error", None, "The model does not exist."),
    "not_found": _Words(404, "not_found_error", None, "Not found."),
    "timeout": _Words(408, "timeout_error", None, "The request timed out."),
    "conflict": _Words(409, "conflict_error", None, "The request conflicts with another."),
    "requests": _Words(429, "rate_limit_error", None, "This would exceed your rate limit of requests per minute."),
    "tokens": _Words(429, "rate_limit_error", None, "This would exceed your rate limit of tokens per minute."),
    "quota": _Words(400, "invalid_request_error", None, "Your credit balance is too low to access the Anthropic API."),
    "billing": _Words(402, "billing_error", None, "There is an issue with your billing or payment information."),
    "500": _Words(500, "api_error", None, "Internal server error"),
    "502": _Words(502, "", None, "Bad gateway"),
    "503": _Words(503, "api_error", None, "Service unavailable"),
    "504": _Words(504, "timeout_error", None, "The request timed out while processing."),
    "529": _Words(529, "overloaded_error", None, "Overloaded"),
}


class ErrorReply(NamedTuple):
    """A refusal as it goes out."""

    status: int
    body: bytes
    content_type: str


def render(refused: Refused, provider: Provider, request_id: str) -> ErrorReply:
    """A refusal in the provider's shape."""
    words = (_ANTHROPIC if provider == "anthropic" else _OPENAI)[refused.kind]
    message = refused.message or words.message
    if not words.type:
        page = f"<html><head><title>{words.status} {message}</title></head><body><h1>{message}</h1></body></html>"
        return ErrorReply(words.status, page.encode(), "text/html")
    if provider == "anthropic":
        shape = {"type": "error", "error": {"type": words.type, "message": message}, "request_id": request_id}
    else:
        error = {"message": message, "type": words.type, "param": refused.param, "code": words.code}
        shape = {"error": error}
    return ErrorReply(words.status, orjson.dumps(shape), "application/json")
