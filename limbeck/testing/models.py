"""GET /v1/models, in the shape of whoever asks. Fields as in the openai (3.57) and anthropic (2.13) clients."""

from __future__ import annotations

from pydantic import JsonValue

from limbeck.testing.answers import Json
from limbeck.testing.errors import Provider, Refused
from limbeck.testing.settings import Settings

_CREATED, _CREATED_AT = 1_767_225_600, "2026-01-01T00:00:00Z"


def model_list(settings: Settings, provider: Provider) -> Json:
    """All named models."""
    names = [name for name in settings.models if name != "*"]
    data: list[JsonValue] = [_model(name, provider) for name in names]
    if provider == "openai":
        return {"object": "list", "data": data}
    first, last = (names[0], names[-1]) if names else (None, None)
    return {"data": data, "has_more": False, "first_id": first, "last_id": last}


def model(settings: Settings, provider: Provider, name: str) -> Json:
    """One model. Raises `Refused` where it is not there."""
    if settings.model(name) is None:
        raise Refused("model", f"The model `{name}` does not exist or you do not have access to it.")
    return _model(name, provider)


def _model(name: str, provider: Provider) -> Json:
    if provider == "openai":
        return {"id": name, "object": "model", "created": _CREATED, "owned_by": "limbeck"}
    return {"id": name, "type": "model", "display_name": name, "created_at": _CREATED_AT}
