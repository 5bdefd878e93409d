"""docs/cli.md: every command's `--help`, so the page cannot say anything else.

`python -m limbeck.cli.reference` writes it to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer
from typer.main import get_command

_WIDTH = 100

_HEAD = """# Commands

Made from the commands' own `--help` by `make docs`; do not edit.

Exit codes: 0 done; 1 a check failed, or the gate refused; 2 something given is wrong, or the disk is full;
130 interrupted. Errors name the place, what was found, what was expected, and the remedy.
"""


def reference() -> str:
    """The page."""
    parts = [f"## `{c.command_path}`\n\n```text\n{c.get_help().rstrip()}\n```\n" for c in contexts()]
    return "\n".join([_HEAD, *parts])


def contexts() -> Iterator[typer.Context]:
    """Every command, each as it is when its help is asked for."""
    from limbeck.cli import HELP_OPTIONS, app

    root = typer.Context(
        get_command(app),
        info_name="limbeck",
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        help_option_names=HELP_OPTIONS,
    )
    yield from _below(root)


def _below(context: typer.Context) -> Iterator[typer.Context]:
    yield context
    for name, command in getattr(context.command, "commands", {}).items():
        yield from _below(typer.Context(command, info_name=name, parent=context))


if __name__ == "__main__":
    sys.stdout.write(reference())
