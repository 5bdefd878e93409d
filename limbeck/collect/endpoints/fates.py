"""What becomes of a reply: an answer, to be sent again, or a reason to stop.

Only what says of itself that it may go better next time is sent again: 408, 429 and 5xx. A request that is wrong stays
wrong, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from limbeck.collect.endpoints.reply import document, error_of, text
from limbeck.collect.journal_sums import NO_QUOTA
from limbeck.collect.rows import shown

_ABOUT_PROMPT = frozenset({400, 403, 409, 413, 422, 451})
"""Statuses that can be about one prompt: its content, its length, its roles."""
_QUOTA = (
    "insufficient_quota",
    "billing_hard_limit",
    "billing_error",
    "billing_not_active",
    "credit balance is too low",
)


class Fate(Enum):
    """What is done with a reply."""

    ANSWER = "answered"
    """Data, whatever it says."""
    ABOUT_PROMPT = "refused"
    """Data too, unless everything is refused: then it is the settings that are wrong."""
    TOO_MANY = "too many"
    """To be sent again, slower."""
    FAILED = "failed"
    """To be sent again."""
    NO_QUOTA = "no quota"
    """The money is gone."""
    STOP = "stop"
    """Every other request would fare the same: a wrong key, model or address."""


def fate(status: int, body: bytes) -> Fate:
    """What is done with a reply of this status."""
    if 200 <= status < 300:
        return Fate.ANSWER
    if status == 402 or (status in (400, 403, 429) and _no_quota(body)):
        return Fate.NO_QUOTA
    if status == 429:
        return Fate.TOO_MANY
    if status == 408 or status >= 500:
        return Fate.FAILED
    return Fate.ABOUT_PROMPT if status in _ABOUT_PROMPT else Fate.STOP


def outcome(status: int, found: Fate) -> str:
    """What the journal calls a reply that is no answer."""
    return f"http {status}{NO_QUOTA if found is Fate.NO_QUOTA else ''}"


def _no_quota(body: bytes) -> bool:
    error = _error(body)
    said = " ".join(text(error.get(key)).lower() for key in ("code", "type", "message"))
    return any(sign in said for sign in _QUOTA)


def message(body: bytes, limit: int = 300) -> str:
    """What an error says, in one line."""
    said = text(_error(body).get("message"))
    return shown(said or body[: 4 * limit].decode(errors="replace") or "nothing", limit)


def _error(body: bytes) -> Mapping:
    found = document(body)
    return (error_of(found) or {}) if found is not None else {}
