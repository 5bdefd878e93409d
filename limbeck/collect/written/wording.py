"""What teachers are told: templates beside this file, whose digests are recorded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from limbeck.ledger.canonical import digest_file
from limbeck.records import Digest, Message

_PLACE = Path(__file__).parent / "wording"


@cache
def _environment() -> Environment:
    # What is filled in is text for a model, not for a browser.
    return Environment(loader=FileSystemLoader(_PLACE), undefined=StrictUndefined, autoescape=False)


def told(name: str, **values: object) -> tuple[Message, ...]:
    """The instruction `name`, filled in."""
    text = _environment().get_template(f"{name}.jinja").render(values).strip()
    return (Message(role="user", content=text),)


def wording_digest(name: str) -> Digest:
    """Digest of an instruction before it is filled in."""
    return digest_file(_PLACE / f"{name}.jinja")
