"""Where errors become messages and exit codes. Errors raised on purpose show no traceback; all others keep
theirs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from limbeck.errors import InputError, LimbeckError, Problem, RunDirError, as_disk_full

_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EEXIST,
}


class Edge(TyperGroup):
    """The outermost command group."""

    def invoke(self, ctx: Any) -> object:  # releases of typer differ in the Context they declare here
        """Run a command; the errors of `limbeck.errors`, a missing extra and Ctrl-C end it with a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again to go on", err=True)
            raise typer.Exit(130) from None
        except (LimbeckError, ImportError) as error:
            ours = error if isinstance(error, LimbeckError) else _missing_extra(error)
            if ours is None:
                raise
            typer.echo(f"limbeck: {printable(str(ours))}", err=True)
            raise typer.Exit(ours.exit_code) from None


def _missing_extra(error: ImportError) -> InputError | None:
    """The error for a package that belongs to an extra that is not installed, or None. transformers reports a
    missing torch in words of its own, without the module's name.
    """
    from limbeck.doctor import extras

    module = (error.name or "").partition(".")[0].replace("_", "-")
    text = str(error).lower().replace("pytorch", "torch")
    for extra in extras():
        absent = [
            p.name
            for p in extra.packages
            if p.name == module or (p.installed is None and p.name in text and not module)
        ]
        if absent:
            return InputError(
                "this command needs what is not installed",
                [
                    Problem(", ".join(absent), "not installed", f"the extra [{extra.name}]", extra.remedy),
                ],
            )
    return None


@contextmanager
def writing(
    root: str | os.PathLike[str], remedy: str = "use another --out, or change its permissions"
) -> Iterator[None]:
    """Turns the many ways in which writers report a full disk into one `DiskFullError`, and a place that may
    not be written into a `RunDirError` with this remedy; every other error passes.
    """
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        if full := as_disk_full(error, root):
            raise full from error
        if isinstance(error, OSError) and (error.errno in _NOT_WRITABLE or _no_place(error, root)):
            raise RunDirError(
                "cannot write",
                [
                    Problem(
                        os.fspath(error.filename or root),
                        error.strerror or str(error),
                        "a place that may be written",
                        remedy,
                    ),
                ],
            ) from error
        raise


def _no_place(error: OSError, root: str | os.PathLike[str]) -> bool:
    """Whether the place itself, or a directory above it, could not be made, as under /proc; a file that is missing
    below it is another matter.
    """
    whole = os.path.abspath(root)
    named = error.filename if isinstance(error.filename, str | os.PathLike) else None
    return error.errno == errno.ENOENT and named is not None and Path(whole).is_relative_to(os.path.abspath(named))


def printable(text: str) -> str:
    """Text without control characters: what a model or a file wrote must not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def in_line(value: object) -> str:
    """A stranger's text, or a value as JSON, in one line: with a line feed in it, it could say a line of its own."""
    import json

    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
