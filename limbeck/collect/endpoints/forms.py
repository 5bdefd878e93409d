"""Messages, tools and schemas in the words of each API. What is plain text is sent as it always was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from limbeck.records import Message, Part, Tool, ToolCall

Json = dict[str, JsonValue]

SCHEMA_NAME = "answer"
"""What a schema is called where an API wants a name."""


def chat_message(message: Message) -> Json:
    """A message of OpenAI's chat completions."""
    if message.parts is None and message.tool_calls is None and message.tool_call_id is None:
        return {"role": message.role, "content": message.content}
    said: Json = {"role": message.role, "content": message.content}
    if message.parts is not None:
        said["content"] = [_chat_part(part) for part in message.parts]
    if message.tool_calls is not None:
        said |= {"content": message.content or None, "tool_calls": [_chat_call(call) for call in message.tool_calls]}
    return said if message.tool_call_id is None else said | {"tool_call_id": message.tool_call_id}


def _chat_part(part: Part) -> JsonValue:
    if part.image is None:
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": part.image}}


def _chat_call(call: ToolCall) -> JsonValue:
    function: JsonValue = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_tool(tool: Tool) -> Json:
    """A tool of OpenAI's chat completions, which chat templates take too."""
    return {"type": "function", "function": tool.model_dump(mode="json", exclude_none=True)}


def strict(schema: JsonValue) -> bool:
    """Whether OpenAI can hold an answer to this schema by itself: every object closed, every property required."""
    if isinstance(schema, list):
        return all(map(strict, schema))
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if properties is not None or schema.get("type") == "object":
        required = schema.get("required")
        names = set(properties) if isinstance(properties, dict) else set()
        if schema.get("additionalProperties") is not False or not isinstance(required, list) or names != set(required):
            return False
    return all(map(strict, schema.values()))


def response_format(schema: Json) -> JsonValue:
    """`response_format` of chat completions."""
    return {"type": "json_schema", "json_schema": {"name": SCHEMA_NAME, "schema": schema, "strict": strict(schema)}}


def response_items(messages: Iterable[Message]) -> list[JsonValue]:
    """`input` of OpenAI's responses. Raises `ValueError` for a result of no call."""
    items: list[JsonValue] = []
    for message in messages:
        if message.role == "tool":
            if message.tool_call_id is None:
                raise ValueError("a message of role tool without the tool_call_id of a call")
            items.append({"type": "function_call_output", "call_id": message.tool_call_id, "output": message.content})
            continue
        if message.parts is not None:
            content: JsonValue = [_response_part(part) for part in message.parts]
            items.append({"role": message.role, "content": content})
        elif message.content or not message.tool_calls:
            items.append({"role": message.role, "content": message.content})
        for call in message.tool_calls or ():
            items.append({"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments})
    return items


def _response_part(part: Part) -> JsonValue:
    if part.image is None:
        return {"type": "input_text", "text": part.text}
    return {"type": "input_image", "image_url": part.image, "detail": "auto"}


def response_tool(tool: Tool) -> JsonValue:
    """A tool of OpenAI's responses, which are strict unless told otherwise."""
    told = {"description": tool.description} if tool.description is not None else {}
    return {"type": "function", "name": tool.name, "parameters": tool.parameters, "strict": False, **told}


def text_format(schema: Json) -> JsonValue:
    """`text` of OpenAI's responses."""
    return {"format": {"type": "json_schema", "name": SCHEMA_NAME, "schema": schema, "strict": strict(schema)}}


def anthropic_turns(messages: Sequence[Message]) -> list[JsonValue]:
    """`messages` of Anthropic's API; results of calls are the user's, those that follow each other in one turn.

    Raises `ValueError` for a result of no call.
    """
    turns: list[Json] = []
    for message in messages:
        if message.role == "system":
            continue
        if message.role == "tool":
            if message.tool_call_id is None:
                raise ValueError("a message of role tool without the tool_call_id of a call")
            block: Json = {"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}
            last = turns[-1]["content"] if turns and turns[-1]["role"] == "user" else None
            if isinstance(last, list) and all(isinstance(b, dict) and b.get("type") == "tool_result" for b in last):
                last.append(block)
            else:
                turns.append({"role": "user", "content": [block]})
        elif message.parts is None and message.tool_calls is None:
            turns.append({"role": message.role, "content": message.content})
        else:
            turns.append({"role": message.role, "content": _anthropic_blocks(message)})
    return list(turns)


def _anthropic_blocks(message: Message) -> list[JsonValue]:
    blocks = [_anthropic_part(part) for part in message.parts or ()]
    if message.parts is None and message.content:
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls or ():
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.values()})
    return blocks


def _anthropic_part(part: Part) -> JsonValue:
    if part.image is None:
        return {"type": "text", "text": part.text}
    if not part.image.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": part.image}}
    head, _, data = part.image.partition(",")
    media = head.removeprefix("data:").removesuffix(";base64")
    return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}


def anthropic_tool(tool: Tool) -> JsonValue:
    """A tool of Anthropic's API."""
    told = {"description": tool.description} if tool.description is not None else {}
    return {"name": tool.name, "input_schema": tool.parameters, **told}


def read_chat_calls(value: JsonValue) -> tuple[ToolCall, ...]:
    """The calls in a chat completion's message; what is no call is left out."""
    found = []
    for item in value if isinstance(value, list) else ():
        function = item.get("function") if isinstance(item, dict) else None
        if isinstance(item, dict) and isinstance(function, dict):
            found += _call(item.get("id"), function.get("name"), function.get("arguments"))
    return tuple(found)


def read_items(blocks: Iterable[JsonValue], kind: str, id_key: str, arguments: str) -> tuple[ToolCall, ...]:
    """The calls among output items or content blocks of a type."""
    found = []
    for item in blocks:
        if isinstance(item, Mapping) and item.get("type") == kind:
            found += _call(item.get(id_key), item.get("name"), item.get(arguments))
    return tuple(found)


def _call(id_: JsonValue, name: JsonValue, given: JsonValue) -> list[ToolCall]:
    """A call, if it has a name; arguments that came as an object are written as text."""
    import orjson

    if not isinstance(name, str):
        return []
    text = given if isinstance(given, str) else orjson.dumps({} if given is None else given).decode()
    return [ToolCall(name=name, arguments=text, id=id_ if isinstance(id_, str) else None)]
