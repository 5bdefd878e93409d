"""Calling the command line, here and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from limbeck.cli import app

ROOT = Path(__file__).resolve().parents[1]

MAIN = "from limbeck.cli import main; main()"

DECLARED = [
    "pydantic>=2.11",
    "torch>=2.9; extra == 'train'",
    'huggingface-hub>=1.0 ; extra == "train"',
    "nothing-such; extra == 'dev'",
]
"""Requirements as the metadata of an installed package holds them."""


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def python(code: str, *words: object, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )
