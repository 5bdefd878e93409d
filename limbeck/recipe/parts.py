"""What every part of a recipe is made of: the base of its models, and its kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError


class Part(BaseModel):
    """Frozen, with no keys but its own."""

    # An infinite or undefined number has no canonical JSON, so a recipe with one would have no digest.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _no_truth(error: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Refuses true and false where a number is due: pydantic would take them for 1 and 0."""

    def refuse(value: object) -> object:
        if isinstance(value, bool):
            raise PydanticKnownError(error)
        return value

    return BeforeValidator(refuse)


# Part of the types, because pydantic allows no validator for every key of `Part`: none may stand before the `kind`
# that tells variants apart. Last in them, because otherwise the JSON Schema would lose the limits.
WHOLE = _no_truth("int_type")
NUMBER = _no_truth("float_type")

# Integers from 2^53 on have no exact JSON, and so no digest.
PositiveInt = Annotated[int, Field(gt=0, lt=2**53), WHOLE]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**53), WHOLE]
PositiveFloat = Annotated[float, Field(gt=0), NUMBER]
NonNegativeFloat = Annotated[float, Field(ge=0), NUMBER]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Probability = Annotated[float, Field(gt=0, le=1), NUMBER]
