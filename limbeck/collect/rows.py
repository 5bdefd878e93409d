"""One row of a prompt file to chat messages, or what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from pydantic import JsonValue

from limbeck.collect.contents import NotThis, message_of
from limbeck.records import Message

_ROLES = get_args(Message.model_fields["role"].annotation)
_SURROGATE = re.compile("[\ud800-\udfff]")


class Wrong(NamedTuple):
    """What is wrong with a row: the last three fields of a `Problem`."""

    found: str
    expected: str
    remedy: str


def shown(value: object, limit: int = 72) -> str:
    """A value for an error message: in one line, what does not print escaped, no longer than `limit`
    characters.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def messages_of(row: dict[str, JsonValue], column: str | None, base: Path = Path()) -> tuple[Message, ...] | Wrong:
    """The messages of a row: from the named column, or from `messages` or `prompt`, whichever it has. Paths of images
    start at `base`.
    """
    names = [column] if column else ["messages", "prompt"]
    there = [name for name in names if row.get(name) not in (None, "")]
    if not there:
        empty = [name for name in names if name in row]
        found = f"{empty[0]}: {shown(row[empty[0]]) or 'empty'}" if empty else f"keys {shown(', '.join(row) or 'none')}"
        return Wrong(found, f"{' or '.join(names)} with a prompt in it", "fill it in, or remove the row")
    if len(there) > 1:
        return Wrong(
            "both messages and prompt",
            "one of them",
            "name the one to use with `column:`, or remove the other",
        )
    name, value = there[0], row[there[0]]
    if isinstance(value, str) and name == "messages":
        value = _from_json(value)
    if isinstance(value, Wrong):
        return value
    if isinstance(value, str):
        asked: JsonValue = {"role": "user", "content": value}
        value = [asked]
    if not isinstance(value, list):
        return Wrong(f"{name}: {shown(value)}", "text, or a list of messages", "write the prompt as text in quotes")
    return chat_of(name, value, base)


def _from_json(text: str) -> list[JsonValue] | Wrong:
    """A list of messages that a table holds as JSON text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return value
    return Wrong(
        f"messages: {shown(text)}",
        "a list of messages, or one as JSON text",
        "name a column of plain text with `column:`",
    )


def chat_of(name: str, value: Sequence[JsonValue], base: Path = Path()) -> tuple[Message, ...] | Wrong:
    """Messages that a teacher can be asked, or what is wrong with them; `name` is the key they stood under. Paths of
    images start at `base`.
    """
    messages, open_calls = [], set[str | None]()
    for index, item in enumerate(value):
        message = _message(f"{name}[{index}]", item, base)
        if isinstance(message, Wrong):
            return message
        if message.tool_call_id is not None and message.tool_call_id not in open_calls:
            found = f"{name}[{index}].tool_call_id: {shown(message.tool_call_id)}"
            return Wrong(found, "the id of a call before it", "correct the id, or give the call")
        open_calls |= {call.id for call in message.tool_calls or ()}
        messages.append(message)
    if messages and messages[-1].tool_call_id is not None:
        return tuple(messages)
    if not messages:
        return Wrong(f"{name}: []", "at least the user's message", "fill it in, or remove the row")
    if messages[-1].role != "user":
        return Wrong(
            f"{name} ends with a message of {messages[-1].role}",
            "a last message of the user, for the teacher to answer",
            "remove what follows the user's message",
        )
    if not messages[-1].content.strip() and not messages[-1].images:
        return Wrong(
            f"{name}: the user's message is {shown(messages[-1].content) or 'empty'}",
            "some text",
            "fill it in, or remove the row",
        )
    return tuple(messages)


def _message(where: str, item: JsonValue, base: Path) -> Message | Wrong:
    expected = '{"role": "user", "content": "..."}'
    if not isinstance(item, dict):
        return Wrong(f"{where}: {shown(item)}", expected, "write each message as an object")
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        return Wrong(f"{where}.role: {shown(role)}", f"one of {', '.join(_ROLES)}", "correct the role")
    more = any(value is not None for key, value in item.items() if key not in ("role", "content"))
    if lone := not_utf8(content if isinstance(content, str) and not more else json.dumps(item, ensure_ascii=False)):
        remedy = "replace it, or remove the row"
        return Wrong(f"{where}.content: {lone}: {shown(content)}", "text that UTF-8 can hold", remedy)
    if more or isinstance(content, list):
        try:
            return message_of(where, item, base)
        except NotThis as error:
            return Wrong(*map(shown, error.told))
    if not isinstance(content, str):
        return Wrong(f"{where}.content: {shown(content)}", "text", "write the content as text in quotes")
    return Message.model_validate({"role": role, "content": content})


def not_utf8(text: str) -> str | None:
    """The first thing in a text that UTF-8 cannot hold, in words; None where there is none.

    A byte that was not UTF-8 and went through decoding with `surrogateescape` is told as that byte.
    """
    lone = _SURROGATE.search(text)
    if lone is None:
        return None
    code = ord(lone[0])
    byte = 0xDC80 <= code <= 0xDCFF
    return f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if byte else f"half of a character, \\u{code:04x}"
