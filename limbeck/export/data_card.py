"""Cards for the Hugging Face hub: the data set's, made here, and the model's, as the run made it."""

from __future__ import annotations

import yaml

from limbeck import __version__
from limbeck.export.card import HUB_LICENCES, FrontMatter, card_text, environment
from limbeck.export.facts import Facts
from limbeck.export.teachers import drawn, written

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def model_card(facts: Facts) -> str:
    """The card that the run made, which the ledger has the digest of; made now where the run did not come to it."""
    if facts.evidence.entry("card"):
        return (facts.run / "student" / "README.md").read_text(encoding="utf-8")
    return card_text(facts.evidence, facts.licence)


def data_card(facts: Facts) -> str:
    """The card of the training set."""
    return (
        environment()
        .get_template("data-card.md.jinja")
        .render(
            front_matter=FrontMatter(_front_matter(facts)),
            version=__version__,
            facts=facts,
            recipe=facts.evidence.recipe,
            drawn=drawn(facts.evidence),
            written=written,
            sources=facts.evidence.sources,
            dropped=facts.evidence.dropped,
            answers=sum(t.seen.answers for t in facts.teachers),
            kept=sum(t.seen.kept for t in facts.teachers),
        )
    )


def licence_of_data(facts: Facts) -> str | None:
    """The licence of the prompts, where there is only one and nobody else's terms apply to the answers; else None."""
    said = {source.licence.strip().lower() for source in facts.evidence.sources}
    return said.pop() if len(said) == 1 and facts.own and said <= HUB_LICENCES - {"unknown"} else None


def _front_matter(facts: Facts) -> str:
    """The card's YAML. Where several licences and terms come together, which one holds for the whole is not ours to
    say.
    """
    kept = sum(t.seen.kept for t in facts.teachers)
    size = next((name for below, name in _SIZES if kept < below), "n>1M")
    told = {
        "license": licence_of_data(facts) or "unknown",
        "pretty_name": f"Training set of {facts.name}",
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["synthetic", "distillation", "limbeck"],
        "configs": [
            {"config_name": name, "data_files": f"{name}.parquet"} for name in ("completions", "prompts", "verdicts")
        ],
    }
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)
