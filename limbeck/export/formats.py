"""The formats in which a run is handed to others: a table that names them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from limbeck.export.facts import Facts


class Format(NamedTuple):
    """A document made from the facts of a run."""

    name: str
    says: str
    """What it is, in a line."""
    work: str
    """`make(facts) -> text`."""

    def make(self, facts: Facts) -> str:
        """The document."""
        made: Callable[[Facts], str] = pkgutil.resolve_name(self.work)
        return made(facts)


DOCUMENTS = (
    Format("card", "Hugging Face model card (Markdown)", "limbeck.export.data_card:model_card"),
    Format("data-card", "Hugging Face card of the training set (Markdown)", "limbeck.export.data_card:data_card"),
    Format("spdx", "SPDX 3.0.1, AI and Dataset profiles (JSON-LD)", "limbeck.export.spdx:spdx"),
    Format("cyclonedx", "CycloneDX 1.7 ML-BOM (JSON)", "limbeck.export.cyclonedx:cyclonedx"),
    Format("croissant", "Croissant 1.1 with RAI and PROV fields (JSON-LD)", "limbeck.export.croissant:croissant"),
    Format("eu-summary", "EU Article 53(1)(d) summary of training content (Markdown)",
           "limbeck.export.eu_summary:eu_summary"),
)  # fmt: skip
GGUF = "gguf"
"""The one that is no text: `limbeck.export.gguf_file`."""
