"""Staleness: which stages rest on something that has been made anew since. Asked of the ledger alone: no file is read,
so a file that changed on disk is found by `limbeck.ledger.verification`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from limbeck.records import Digest, Entry


class Overtaken(NamedTuple):
    """A stage's latest entry, and a later entry that wrote something else under the name of one of its inputs."""

    entry: Entry
    name: str
    """The input; `entry.inputs[name]` was read, `writer.outputs[name]` is written now."""
    writer: Entry


def inside_run(inputs: Mapping[str, Digest]) -> dict[str, Digest]:
    """Inputs that lie in RUN. Names such as `teacher:NAME` say what lies outside."""
    return {name: digest for name, digest in inputs.items() if ":" not in name}


def overtaken(entries: Sequence[Entry]) -> list[Overtaken]:
    """Every input of a stage's latest entry of which a later entry wrote another version. `entries` are oldest first.

    What was made anew and came out the same overtakes nothing.
    """
    writers = _latest_writers(entries)
    return [
        Overtaken(entry, name, writer)
        for entry in _latest_entries(entries).values()
        for name, digest in inside_run(entry.inputs).items()
        if (writer := writers.get(name)) and writer.index > entry.index and writer.outputs[name] != digest
    ]


def stale_stages(entries: Sequence[Entry]) -> frozenset[str]:
    """Names of the stages whose latest entry is overtaken, or that read what such a stage wrote, at any remove.

    A stage of the second kind may prove to be done after all, if what it read comes out the same again; until then
    nothing shows that what it wrote still holds.
    """
    latest, writers = _latest_entries(entries), _latest_writers(entries)
    sources = {
        stage: {writers[name].stage for name in inside_run(entry.inputs) if name in writers}
        for stage, entry in latest.items()
    }
    stale = {found.entry.stage for found in overtaken(entries)}
    while readers := {stage for stage, read in sources.items() if read & stale} - stale:
        stale |= readers
    return frozenset(stale)


def _latest_entries(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The last entry of each stage."""
    return {entry.stage: entry for entry in entries}


def _latest_writers(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The last entry that wrote each file or directory."""
    return {name: entry for entry in entries for name in entry.outputs}
