"""What messages, tools and stop sequences of the providers' bodies have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from limbeck.testing.answers import Json, Tool
from limbeck.testing.errors import Refused

IMAGE_TOKENS = 85
"""Tokens that an image costs."""


class Body(BaseModel):
    """A request body. Keys that the server does not know are let through, as the providers' own grow."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


_B = TypeVar("_B", bound=Body)


class Message(Body):
    """One message of a chat."""

    role: str
    content: JsonValue = None


class Rendered(NamedTuple):
    """A chat as text, and the tokens of its images."""

    text: str
    image_tokens: int


def render(messages: Sequence[Message], before: str = "") -> Rendered:
    """A chat as the toy models read it: a line `role: content` for each message."""
    images, lines = 0, [before] if before else []
    for message in messages:
        text, count = text_of(message.content)
        images += count
        lines.append(f"{message.role}: {text}")
    return Rendered("\n".join(lines), images * IMAGE_TOKENS)


def text_of(content: JsonValue) -> tuple[str, int]:
    """The text of a message's content, and how many images it has."""
    if isinstance(content, str):
        return content, 0
    texts, images = [], 0
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict):
            continue
        if isinstance(text := part.get("text"), str):
            texts.append(text)
        elif part.get("type") in ("image_url", "image", "input_image"):
            images += 1
        elif "content" in part:
            inner, more = text_of(part["content"])
            texts.append(inner)
            images += more
    return "\n".join(texts), images


def checked(form: type[_B], body: Json) -> _B:
    """The body as a form. Raises `Refused` where it does not fit."""
    try:
        return form.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise Refused("invalid", f"{place}: {first['msg']}", param=place) from None


def stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop sequences as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def chosen(tools: Sequence[Tool], choice: str | None, name: str | None, *, answered: bool) -> Tool | None:
    """The tool that will be called: the named one; the first where one must be, or where one may be and the
    last message is not already a tool's result.
    """
    if name is not None:
        named = [tool for tool in tools if tool.name == name]
        if not named:
            raise Refused("invalid", f"tool_choice names {name}, which is not among the tools.", param="tool_choice")
        return named[0]
    if not tools or choice == "none" or (choice in (None, "auto") and answered):
        return None
    return tools[0]
