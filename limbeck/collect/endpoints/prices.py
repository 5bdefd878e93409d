"""What an endpoint charges: what the recipe says, or else what the snapshot of prices in genai-prices says.

Money is counted in whole picodollars (10**-12 US dollars), so that nothing is rounded while it is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

from limbeck import recipe

PICO = 10**12
"""Picodollars in a US dollar."""


class Prices(NamedTuple):
    """What a model charges."""

    source: str
    """Who says so: `recipe`, or genai-prices with its version and its name of the model."""
    cost: Callable[[int, int], int]
    """Picodollars for so many tokens of the prompt and of the answer, rounded up."""


def prices_of(settings: recipe.EndpointTeacher) -> Prices | None:
    """What this teacher charges; None where nobody says. Asks no network.

    Cached prompt tokens are counted at the full price: that errs on the safe side of a cap.
    """
    if settings.price is not None:
        prompt, completion = settings.price.picodollars()
        return Prices("recipe", lambda read, written: read * prompt + written * completion)
    return _listed(settings.model, settings.base_url)


def batch_prices_of(settings: recipe.EndpointTeacher, share: float) -> Prices | None:
    """What this teacher charges for a row of a batch; None where nobody says.

    What genai-prices lists for batches, or else `share` of the price for a request that is asked alone.
    """
    if settings.price is None:
        listed = _listed(settings.model, settings.base_url, batch=True)
        if listed is not None:
            return listed
    whole, part = prices_of(settings), Fraction(str(share))
    if whole is None:
        return None
    return Prices(
        f"{whole.source}, {share:g} of it in a batch", lambda read, written: math.ceil(part * whole.cost(read, written))
    )


def cap_words(dollars: float) -> str:
    """A cap in words, to the cent, or with as many digits as it has: one of less than a cent is not $0.00."""
    exact = Decimal(str(dollars)).normalize().as_tuple().exponent
    return f"${dollars:,.{max(2, -int(exact))}f}"


def dollars(picodollars: int) -> float:
    """US dollars, for people and for the ledger."""
    return picodollars / PICO


def picodollars(amount: float) -> int:
    """Whole picodollars in an amount as a recipe writes it, rounded down: the cap is never passed."""
    return int(Decimal(str(amount)) * PICO)


def _listed(model: str, base_url: str, *, batch: bool = False) -> Prices | None:
    from genai_prices import Usage
    from genai_prices.data_snapshot import get_snapshot

    try:
        provider, found = get_snapshot().find_provider_model(model, None, None, base_url)
        found.calc_price(Usage(input_tokens=1, output_tokens=1), provider)
    except (LookupError, ValueError):
        return None
    context = {"processing": "batch"} if batch else None
    if batch and not any(variant.when == context for variant in found.price_variants or ()):
        return None

    @lru_cache(maxsize=65536)
    def cost(read: int, written: int) -> int:
        usage = Usage(input_tokens=read, output_tokens=written)
        total = found.calc_price(usage, provider, price_context=context).total_price
        return int((total * PICO).to_integral_value(ROUND_CEILING))

    return Prices(f"genai-prices {version('genai-prices')}: {provider.id}/{found.id}{', batch' if batch else ''}", cost)
