"""Which code ran: version, git commit, and whether the files still were those of the commit."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import NamedTuple


class CodeVersion(NamedTuple):
    """Which code ran."""

    limbeck: str
    commit: str | None
    dirty: bool | None


@functools.cache
def code_version() -> CodeVersion:
    """Version of limbeck and, where it runs from a git checkout, commit and whether files of the package differ from
    it or were added: what else lies in the checkout does not run. Asked once a process: what was loaded then is what
    runs. Never fails.
    """
    from limbeck import __version__ as release

    package = Path(__file__).parents[1]
    # A virtual environment may lie in somebody else's checkout; only one that tracks this very file is ours.
    if _git(package, "ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return CodeVersion(release, None, None)
    commit = _git(package, "rev-parse", "--verify", "HEAD")
    status = _git(package, "status", "--porcelain", "--", ".")
    return CodeVersion(release, commit, None if status is None or commit is None else bool(status))


def _git(directory: Path, *words: str) -> str | None:
    """What git says, None where it is not there, refuses or takes too long. Variables such as GIT_DIR would
    point it at another repository.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", os.fspath(directory), *words],
            capture_output=True,
            text=True,
            timeout=20,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
