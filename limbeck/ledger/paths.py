"""Paths that stand in a ledger are somebody's claim: none is read before it is sure that it lies in RUN."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from limbeck.errors import Problem, RunDirError


def refuse_other_than_run(root: Path) -> None:
    """Raises `RunDirError` where `root` is no RUN directory."""
    if not (root / "recipe.yaml").is_file():
        found = "no recipe.yaml" if root.is_dir() else "no such directory"
        expected = "a directory that `limbeck run ... --out` made"
        raise RunDirError("not a RUN directory", [Problem(str(root), found, expected, "check the path")])


class OutsideError(RunDirError):
    """A path that leads out of RUN."""


def safe_path(root: Path, name: str) -> Path:
    """`root / name`, once it is sure that it and all under it lie in RUN, symbolic links followed. Raises
    `OutsideError`: it is then not read.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise OutsideError("a path that leads out of RUN", [_astray(name or "(no name)", "a path")])
    path = root / name
    if not _within(path, root):
        raise OutsideError("a symbolic link that leads out of RUN", [_astray(name, "a symbolic link")])
    under = [Path(folder) / x for folder, folders, files in os.walk(path) for x in (*folders, *files)]
    if links := [link.relative_to(root).as_posix() for link in under if link.is_symlink() and not _within(link, root)]:
        raise OutsideError("symbolic links that lead out of RUN", [_astray(link, "a symbolic link") for link in links])
    return path


def _astray(name: str, what: str) -> Problem:
    return Problem(
        name,
        f"{what} that leads out of RUN; not read",
        "a path within RUN",
        "a run writes only into its own directory; look at what made this",
    )


def _within(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False
