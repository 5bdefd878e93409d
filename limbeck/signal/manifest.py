"""What a store of signals was made from, what it holds, and the refusal of one made from something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.errors import Problem, StaleError
from limbeck.ledger.canonical import digest_bytes
from limbeck.records import Digest, Example
from limbeck.rundir import differences

MANIFEST = "manifest.json"
VERSION: Literal[2] = 2
"""Of the format. Signals can be made again, so a store of another version is refused and not read."""


class ServerIdentity(BaseModel):
    """A server that said what is stored, as far as it says who it is. Only its own word stands behind that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str
    model: str
    """The name it was asked for."""
    ask: str
    """How it was asked."""
    said: dict[str, str] | None = None
    """What `/v1/models` says of that model, but for what changes with every call; None where nobody asked."""
    answered: str | None = None
    """The `model` of its answers."""


class SignalKey(BaseModel):
    """Everything that changes a signal. Two stores with the same key hold the same signals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["sampled", "top_k", "text", "hidden"]
    tokenizer: Digest
    templates: dict[str, Digest]
    """Of the chat template of each teacher, by its name."""
    teachers: dict[str, Digest]
    """Of the weights of each teacher, by its name; empty where a server said what is stored."""
    examples: Digest
    """Of the ids of the training examples, in order."""
    vocab_size: int
    """Ids that teacher and student share: what the teacher's distributions are over."""
    seed: int
    """The run's seed; each example draws from a stream of its own."""
    tau: float | None = None
    k: int | None = None
    temperature: float | None = None
    precision: str | None = None
    """What the teacher computed in."""
    server: ServerIdentity | None = None
    """Who said what is stored, where it was no model on this machine."""
    source: Literal["answers"] | None = None
    """Where the teachers said it while they answered."""
    unmatched: Literal["text"] | None = None
    """Whether answers in other tokens are learned from their words."""
    answers: Digest | None = None
    """Of the raw answers of the examples, in their order, which said what is stored."""

    @staticmethod
    def digest_of(examples: Sequence[Example]) -> Digest:
        """The digest for `examples`. Ids are digests of tokens, mask and parent."""
        return digest_bytes("\n".join(e.id for e in examples).encode())


class Counts(BaseModel):
    """How much a store or a shard holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    positions: int
    entries: int
    """Token ids stored; one a position for text."""
    bytes: int
    """On disk; of a store, everything but the manifest."""


class Shard(Counts):
    """A file of the store."""

    file: str
    digest: Digest


class SignalManifest(BaseModel):
    """What a store holds, and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = VERSION
    key: SignalKey
    counts: Counts
    index: Digest | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def kind(self) -> Literal["sampled", "top_k", "text", "hidden"]:
        """Kind of the signals."""
        return self.key.kind


def remedy(root: Path) -> str:
    """What to do about a store that cannot be used."""
    return f"remove {root} and run again: signals are made from the examples and the teacher"


def read_manifest(root: Path) -> SignalManifest:
    """The manifest of a store. Raises `StaleError` where there is none, or one of another version."""
    path = root / MANIFEST
    try:
        return SignalManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        problem = Problem(str(path), "no such file", "signals that the annotate stage wrote", remedy(root))
        raise StaleError("there are no signals", [problem]) from None
    except ValidationError as error:
        raise StaleError(
            "the signals are of another format",
            [
                Problem(f"{path}: {'.'.join(map(str, e['loc']))}", repr(e["input"])[:80], e["msg"], remedy(root))
                for e in error.errors()
            ],
        ) from None


def refuse_stale(root: Path, there: SignalKey, expected: SignalKey) -> None:
    """Raise `StaleError` with every field in which the keys differ, and both values.

    What a server says of itself is compared only where `expected` has it: whoever reads a store need not ask again.
    """
    if there.server and expected.server and expected.server.answered is None:
        there = there.model_copy(update={"server": there.server.model_copy(update={"said": None, "answered": None})})
    if expected.answers is None:  # whoever reads a store need not read the answers again
        there = there.model_copy(update={"answers": None})
    problems = [
        Problem(f"{root / MANIFEST}: key.{name}", was, now, remedy(root))
        for name, was, now in differences(there.model_dump(mode="json"), expected.model_dump(mode="json"))
    ]
    if problems:
        raise StaleError("the signals were made from something else", problems)
