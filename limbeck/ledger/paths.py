"""Paths that stand in a ledger are somebody's claim: none is read before it is sure that it lies in RUN."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from limbeck.errors import Problem, RunDirError

MOST_FILES = 200_000
"""Of one directory."""


def read_bounded(path: Path, longest: int) -> bytes:
    """The bytes of a file that is held whole. Raises `ValueError` where it is longer."""
    with open(path, "rb") as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise ValueError(f"more than {longest} bytes")
    return data


def refuse_other_than_run(root: Path) -> None:
    """Raises `RunDirError` where `root` is no RUN directory."""
    if not (root / "recipe.yaml").is_file():
        found = "no recipe.yaml" if root.is_dir() else "no such directory"
        expected = "a directory that `limbeck run ... --out` made"
        raise RunDirError("not a RUN directory", [Problem(str(root), found, expected, "check the path")])


class OutsideError(RunDirError):
    """A path that leads out of RUN."""


def safe_path(root: Path, name: str) -> Path:
    """`root / name`, once it is sure that it and all under it lie in RUN: no link is followed, not even one that stays
    within, and nothing is opened that is neither file nor directory. Raises `OutsideError`: it is then not read.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in name or "\\" in name:
        raise OutsideError(
            "a path that leads out of RUN", [_astray(name or "(no name)", "a path that leads out of RUN")]
        )
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise OutsideError("a symbolic link", [_astray(name, _link(path, root))])
    if strange := list(_strange(root, path)):
        raise OutsideError("what is neither a file nor a directory", strange)
    return path


def _strange(root: Path, path: Path) -> Iterator[Problem]:
    """Everything under a directory that is a link, a pipe or a device."""
    seen = 0
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            seen += 1
            here = os.path.join(folder, name)
            kind = os.lstat(here).st_mode
            where = Path(here).relative_to(root).as_posix()
            if stat.S_ISLNK(kind):
                yield _astray(where, _link(Path(here), root))
            elif not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                expected = "a file or a directory"
                yield Problem(where, "neither a file nor a directory; not read", expected, "look at what made this")
            if seen > MOST_FILES:
                yield Problem(where, f"more than {MOST_FILES} files", "fewer", "look at what made this")
                return


def _astray(name: str, what: str) -> Problem:
    return Problem(
        name,
        f"{what}; not read",
        "a file or directory of RUN itself, by its plain path",
        "a run writes only into its own directory; look at what made this",
    )


def _link(path: Path, root: Path) -> str:
    try:
        within = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a loop of links
        within = False
    return "a symbolic link" if within else "a symbolic link that leads out of RUN"
