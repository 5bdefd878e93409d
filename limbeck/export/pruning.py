"""What a pruned student kept of its teacher, in words, as the ledger's entry of the student stage tells it."""

from __future__ import annotations

from typing import NamedTuple

from limbeck.export.evidence import Evidence

_IN_EACH_LAYER = (
    ("attention heads", "attention_heads"),
    ("key-value heads", "key_value_heads"),
    ("MLP neurons", "intermediate_size"),
)


class Part(NamedTuple):
    """How many of something each layer had, and how many stayed."""

    name: str
    kept: int
    there: int


def narrowed(evidence: Evidence) -> list[Part]:
    """Heads and neurons of which each layer lost some; empty where the layers are as wide as the teacher's."""
    parts = []
    for name, fact in _IN_EACH_LAYER:
        kept, there = evidence.count("student", fact), evidence.count("student", f"teacher_{fact}")
        if kept is not None and there is not None and kept < there:
            parts.append(Part(name, kept, there))
    return parts


def kept_of(evidence: Evidence, owner: str, layers: int | None, there: int | None) -> str:
    """`20 of its 30 layers, and in each 6 of 9 attention heads and 1,024 of 1,536 MLP neurons`. `owner` is whose
    they were: `its` or `the teacher's`. What was not recorded is left out.
    """
    if layers is None or layers == there:
        text = f"all {owner} layers" if there is None else f"all {owner} {there:,} layers"
    else:
        text = f"{layers:,} of {owner} layers" if there is None else f"{layers:,} of {owner} {there:,} layers"
    parts = [f"{part.kept:,} of {part.there:,} {part.name}" for part in narrowed(evidence)]
    if not parts:
        return text
    last = parts.pop()
    return f"{text}, and in each {', '.join(parts)} and {last}" if parts else f"{text}, and in each {last}"
