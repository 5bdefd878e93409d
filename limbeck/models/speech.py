"""What a chat template can say beyond text: tools, calls of them, and their results; found by letting it say them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from limbeck.records import Message, Tool, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = tuple(f"limbeckmark{letter}" for letter in "abcd")


def as_chat(
    messages: Sequence[Message], answer: str | None = None, calls: Sequence[ToolCall] = ()
) -> list[dict[str, Any]]:
    """Messages as chat templates take them: text, and calls with their arguments as an object.

    Raises `ValueError` for a call whose arguments are none.
    """
    chat = [_said(m.role, m.content, m.tool_calls or (), m.tool_call_id) for m in messages]
    return chat if answer is None else [*chat, _said("assistant", answer, calls, None)]


def _said(role: str, content: str, calls: Sequence[ToolCall], answers: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"role": role, "content": content}
    if calls:
        said["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.values()}}
            for call in calls
        ]
    return said if answers is None else said | {"tool_call_id": answers}


def as_tools(tools: Sequence[Tool] | None) -> dict[str, Any]:
    """The argument of `apply_chat_template` that names these tools; none where there are none."""
    if not tools:
        return {}
    return {"tools": [{"type": "function", "function": tool.model_dump(exclude_none=True)} for tool in tools]}


def cannot_call(words: PreTrainedTokenizerBase) -> str | None:
    """Why this chat template is nothing for examples with tools; None where it says tools, calls and results."""
    name, key, value, result = _MARKS
    tool = Tool(name=name, parameters={"type": "object", "properties": {key: {"type": "string"}}})
    user, call = (
        Message(role="user", content="a"),
        ToolCall(name=name, arguments=f'{{"{key}": "{value}"}}', id="c1234567"),
    )
    asked = Message(role="assistant", content="", tool_calls=(call,))
    told = Message(role="tool", content=result, tool_call_id="c1234567")
    probes = (
        ("no tools", [user], as_tools([tool]), (name, key)),
        ("no calls of tools", [user, asked], {}, (name, key, value)),
        ("no results of tools", [user, asked, told], {}, (result,)),
    )
    for lacking, messages, more, marks in probes:
        try:
            text = str(words.apply_chat_template(as_chat(messages), tokenize=False, **more))
        except TemplateError as error:
            return f"the student's chat template says {lacking} ({error})"
        if not all(mark in text for mark in marks):
            return f"the student's chat template says {lacking}"
    return None
