"""The key that opens an endpoint: from the environment or a file into a header, and nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path

from limbeck.errors import InputError, Problem
from limbeck.recipe import EndpointTeacher

_HIDDEN = b"[key]"


def read_key(settings: EndpointTeacher) -> str | None:
    """The key of an endpoint; None where the recipe names no place for one.

    Raises `InputError` where the place that the recipe names holds none. No message repeats what was found there.
    """
    if settings.api_key_env is not None:
        value, where = os.environ.get(settings.api_key_env, ""), f"the environment variable {settings.api_key_env}"
        remedy = f"set it before the run: export {settings.api_key_env}=..."
    elif settings.api_key_file is not None:
        where, remedy = "the file that api_key_file names", "write the key into it, on one line and nothing else"
        try:
            value = Path(settings.api_key_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text"
            raise _no_key(where, f"cannot be read: {why}", remedy) from None
    else:
        return None
    key = value.strip()
    if not key:
        raise _no_key(where, "empty, or not there", remedy)
    if not key.isascii() or not key.isprintable() or " " in key:
        raise _no_key(where, "white space or characters that no key has (not shown)", remedy)
    return key


def _no_key(where: str, found: str, remedy: str) -> InputError:
    return InputError("the endpoint's key cannot be read", [Problem(where, found, "a key", remedy)])


def scrub(raw: bytes, key: str | None) -> bytes:
    """The bytes without the key: a server may repeat what it was sent, in an error above all."""
    if not key:
        return raw
    plain = key.encode()
    for form in {plain, json.dumps(key)[1:-1].encode()}:
        raw = raw.replace(form, _HIDDEN)
    return raw
