"""`python -m limbeck.testing`: a test server until it is interrupted."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from limbeck.errors import InputError, LimbeckError, Problem
from limbeck.testing.faults import Faults, read_form
from limbeck.testing.server import Server
from limbeck.testing.settings import Settings


def main(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8000,
    faults: Annotated[Path | None, typer.Option(help="YAML file with faults and rate limits.")] = None,
    settings: Annotated[Path | None, typer.Option(help="YAML file with models, prices, keys, quota.")] = None,
    delay: Annotated[float | None, typer.Option(min=0, help="Seconds from a request to its answer.")] = None,
    words: Annotated[int | None, typer.Option(min=1, help="Words of an answer; a word is a token.")] = None,
) -> None:
    """Serve the OpenAI and Anthropic APIs on 127.0.0.1, with a bill at /bill, until interrupted.

    Prints the address on one line when it is ready. Nothing leaves this machine, and nothing costs money.
    """
    try:
        told = read_form(settings, Settings) if settings else Settings()
        changes = {"delay": delay, "words": words}
        given = {key: value for key, value in changes.items() if value is not None}
        told = Settings.model_validate(told.model_dump() | given) if given else told
        schedule = read_form(faults, Faults) if faults else Faults()
        asyncio.run(_serve(Server(told, schedule, port=port), port))
    except LimbeckError as error:
        print(f"limbeck.testing: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _serve(server: Server, port: int) -> None:
    try:
        async with server:
            print(f"listening on {server.url} (bill: {server.url}/bill)", flush=True)
            await asyncio.Event().wait()
    except OSError as error:
        problem = Problem(f"port {port}", str(error), "a free port", "choose another with --port, or 0")
        raise InputError("the test server cannot listen", [problem]) from error


if __name__ == "__main__":
    typer.run(main)
