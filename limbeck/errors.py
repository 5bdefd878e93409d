"""Every error limbeck raises on purpose, in one tree.

    LimbeckError                    exit code
    ├── InputError (ValueError)     2   something the user gave is wrong
    │   ├── RecipeError             2   a key or value of the recipe
    │   ├── PromptError             2   a row of a prompt source
    │   ├── ModelError              2   a model that cannot be had, or does not fit the others
    │   ├── RunDirError             2   a RUN directory that another recipe made, or that is in use
    │   └── StaleError              2   a cache that no longer belongs to its inputs
    ├── EndpointError               2   an endpoint that refuses, fails or is out of quota; what was answered stays
    ├── DiskFullError (OSError)     2   no room; what was finished stays, the run resumes
    ├── RefusedError                1   a check by the user's own rules, such as a cap, said no
    └── VerificationError           1   the evidence does not match the files

An error carries every problem found, not the first. A problem says where it is (file and key or row), what was
found, what was expected, and what to do about it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong: where, both values, and the remedy."""

    where: str
    found: str
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [self.where, f"    found:    {self.found}", f"    expected: {self.expected}"]
        if self.remedy:
            lines.append(f"    remedy:   {self.remedy}")
        return "\n".join(lines)


class LimbeckError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, summary: str, problems: Sequence[Problem] = ()):
        super().__init__(summary, tuple(problems))
        self.summary = summary
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {line}" for p in self.problems for line in str(p).split("\n"))])


class InputError(LimbeckError, ValueError):
    """Something the user gave is wrong."""


class RecipeError(InputError):
    """A key or value of the recipe is wrong, or two of them cannot go together."""


class PromptError(InputError):
    """A prompt source cannot be read, is empty, or has rows of the wrong shape."""


class ModelError(InputError):
    """A model cannot be had, has the wrong digest, or does not fit the others."""


class RunDirError(InputError):
    """The RUN directory was made by another recipe, is in use, or is not a RUN directory."""


class StaleError(InputError):
    """A cache (examples, signals) no longer belongs to what it was made from."""


class EndpointError(LimbeckError):
    """An endpoint refuses, fails, or has no quota left. What was answered is journaled; the run goes on from there."""


class RefusedError(LimbeckError):
    """Something was refused that is not wrong in itself."""

    exit_code = 1


class VerificationError(LimbeckError):
    """The evidence does not match the files."""

    exit_code = 1


class DiskFullError(LimbeckError, OSError):
    """There is no room left for what has to be written."""


_TORCH_WRITER = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")
"""What torch.save says when its writer fails: it keeps neither the errno nor the operating system's words. Its source
file, inline_container.cc, is no sign of it: torch also names that file when it reads a damaged checkpoint.
"""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def as_disk_full(error: BaseException, root: str | os.PathLike[str]) -> DiskFullError | None:
    """The `DiskFullError` that `error` amounts to, or None.

    Libraries report a full disk in their own ways: the operating system by errno, SQLite by a message, and
    safetensors (whose writer is Rust) by the operating system's text inside its own exception; torch names its writer.
    """
    text = str(error)
    if not (
        (isinstance(error, OSError) and error.errno in _NO_ROOM)
        or (isinstance(error, sqlite3.Error) and ("disk is full" in text or "disk I/O error" in text))
        or any(f"os error {code}" in text or os.strerror(code) in text for code in _NO_ROOM)
        or any(sign in text for sign in _TORCH_WRITER)
    ):
        return None
    place = os.fspath(getattr(error, "filename", None) or root)
    try:
        stat = os.statvfs(root)
        # Asked after what was half written has been removed: this much was too little.
        free = f"{stat.f_bavail * stat.f_frsize:,} bytes free under {os.fspath(root)} were too few"
    except OSError:
        free = f"free space under {os.fspath(root)} unknown"
    problem = Problem(
        place,
        f"no room to write ({free})",
        "room for the next file of the run",
        "free some space or raise the quota, then run the same command again: what was finished is kept",
    )
    return DiskFullError("the disk is full", [problem])
