"""Processes of their own without the seconds of their imports: forked from one server that has imported already.

They are killed with -9 as any are. What a test says of the command as it is started stays with `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "asking",
        "pytest",
        "limbeck.collect.endpoints.stage",
        "limbeck.collect.local",
        "limbeck.collect.self_prompt",
        "limbeck.evaluate.evaluate",
        "limbeck.report.report",
        "limbeck.train.stage",
        "transformers.models.llama.modeling_llama",
    ]
)


def start(work: Callable[..., object], *given: object) -> BaseProcess:
    """A process that calls the function `work` of a module; its exit code is not 0 where that raises."""
    process = _CONTEXT.Process(target=_told, args=(dict(os.environ), work, *given))
    process.start()
    return process


def _told(environment: dict[str, str], work: Callable[..., object], *given: object) -> None:
    """The server has the environment of its own start, whatever a test has changed since."""
    os.environ.clear()
    os.environ.update(environment)
    work(*given)


def learn(root: str | Path) -> None:
    """The stage train alone, of the recipe that lies in RUN."""
    from limbeck.rundir import RunDir
    from limbeck.train.stage import train

    run = RunDir(root)
    train(run.recipe(), run)


def command(environment: dict[str, str], *words: str) -> None:
    """`python -m limbeck WORDS`, told so much by the environment."""
    from limbeck.cli import main

    os.environ.update(environment)
    sys.argv = ["limbeck", *words]
    main()
