"""recipe.yaml as a verifier reads it: the YAML that docs/ledger-format.md allows there, and its value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from limbeck.ledger.canonical import refuse_deep

LONGEST = 2**18
"""Bytes."""
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_PLAIN = {
    "null": re.compile(r"|~|null|Null|NULL"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII),
    "float": re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?", re.ASCII),
    "str": re.compile(r".*", re.DOTALL),
}
"""Forms of plain scalars, by the last word of their tag. YAML 1.1 has more, such as `yes`, that readers disagree on."""


def read_recipe_text(data: bytes) -> Any:
    """The value of recipe.yaml. Raises `ValueError` and `yaml.YAMLError`, `RecursionError` for deep nesting."""
    text = data.decode()
    if found := _CONTROLS.search(text):
        raise ValueError(f"the character {found[0]!a}, expected no control character, tab or carriage return")
    documents = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if why := "a second document" if documents > 1 else _strange(event):
            raise ValueError(f"line {event.start_mark.line + 1}: {why}")
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        for key in _keys(root):
            raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} twice, or no text")
        value = loader.construct_document(root) if root is not None else None
    finally:
        loader.dispose()
    refuse_deep(value)
    return value


def _strange(event: yaml.Event) -> str:
    """What an event has that no run writes; empty where it has nothing."""
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        return "YAML anchors or aliases"
    if isinstance(event, yaml.DocumentStartEvent | yaml.DocumentEndEvent):
        return "a document marker" if event.explicit else ""
    if getattr(event, "tag", None) is not None:
        return "a YAML tag"
    if isinstance(event, yaml.ScalarEvent):
        if event.style in ("|", ">"):
            return "a block scalar"
        if event.style is None:
            return _strange_scalar(event.value)
    return ""


def _strange_scalar(text: str) -> str:
    resolver = yaml.SafeLoader("")
    tag = resolver.resolve(yaml.ScalarNode, text, (True, False))
    allowed = _PLAIN.get(str(tag).rpartition(":")[2])
    return "" if allowed and allowed.fullmatch(text) else f"{text[:40]!r} without quotes"


def _keys(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Keys that are no text, or not the first of their name; collections in flow style that hold something."""
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str") or key.value in names:
                yield key
            names.add(str(key.value))
            yield from _keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _keys(value)
    if isinstance(node, yaml.CollectionNode) and node.flow_style and node.value:
        yield node
