"""What an entry says of the code that ran: a commit, and whether the package's own files still are those of it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from limbeck.ledger import code


def git(directory: Path, *words: str) -> None:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", directory, *who, *words], check=True, capture_output=True)


def asked(package: Path) -> code.CodeVersion:
    """What the module says of the package it lies in, read anew."""
    spec = importlib.util.spec_from_file_location("code_there", package / "ledger" / "code.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.code_version()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_only_files_of_the_package_make_it_another_than_its_commit(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "limbeck"
    (package / "ledger").mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(code.__file__, package / "ledger" / "code.py")
    assert asked(package).commit is None  # no checkout yet
    git(package.parent, "init", "-q")
    (package.parent / ".gitignore").write_text("__pycache__\n")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "begin")
    assert asked(package).dirty is False
    assert len(str(asked(package).commit)) >= 40
    (package.parent / "recipe.yaml").write_text("name: mine\n")
    assert asked(package).dirty is False
    (package / "added.py").write_text("x = 1\n")
    assert asked(package).dirty is True
    (package / "added.py").unlink()
    (package / "__init__.py").write_text("x = 2\n")
    assert asked(package).dirty is True
