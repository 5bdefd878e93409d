"""The public summary of training content that Article 53(1)(d) of Regulation (EU) 2024/1689 asks for.

It follows the AI Office's template of 24 July 2025 (C(2025) 5235; issued again on 5 December 2025 as C(2025) 8311).
What the ledger knows is filled in, above all section 2.5 on synthetic data. What only the provider can know is not
guessed at: it is marked, and listed at the top.
"""

from __future__ import annotations

from typing import NamedTuple

from limbeck import __version__
from limbeck.export.card import environment
from limbeck.export.facts import Facts, TeacherTold
from limbeck.export.licences import address
from limbeck.export.words import percent, several


class Answer(NamedTuple):
    """One field of the template."""

    asked: str
    said: str | None
    """What the ledger knows of it, or None."""
    open: str | None = None
    """What is left for the provider to say, or None."""


class Section(NamedTuple):
    """A section of the template."""

    number: str
    title: str
    answers: tuple[Answer, ...] = ()


_YES_NO = "yes or no, and where yes the details that the template asks for"


def eu_summary(facts: Facts) -> str:
    """The summary, as Markdown."""
    sections = _sections(facts)
    left = [(s.number, a.asked, a.open) for s in sections for a in s.answers if a.open]
    template = environment().get_template("eu-summary.md.jinja")
    return template.render(facts=facts, version=__version__, sections=sections, left=left)


def _sections(facts: Facts) -> list[Section]:
    return [
        Section("1", "General information"),
        _provider(),
        _model(facts),
        _size(facts),
        Section("2", "List of data sources"),
        *_sources(facts),
        _synthetic(facts),
        Section("2.6", "Other sources of data", (Answer(
            "Were other sources used than those of 2.1 to 2.5?",
            "The ledger has none: all that was trained on are prompts and answers.",
        ),)),
        Section("3", "Data processing aspects"),
        *_processing(facts),
    ]  # fmt: skip


def _provider() -> Section:
    return Section("1.1", "Provider identification", (
        Answer("Provider name and contact details", None, "name and contact details"),
        Answer("Authorised representative name and contact details", None, "the same, or not applicable"),
    ))  # fmt: skip


def _model(facts: Facts) -> Section:
    pruned = "parts of it were removed before training" if facts.evidence.recipe.student.kind == "pruned" else "whole"
    base = f"Its weights began as those of {facts.base} ({pruned})."
    if facts.base_digest:
        base += f" Digest of that model: {facts.base_digest}."
    return Section("1.2", "Model identification", (
        Answer("Versioned model name", f"{facts.name} {facts.version} (digest of the weights: {facts.weights})"),
        Answer("Model dependencies", base, f"the link to the summary of {facts.base}, where there is one"),
        Answer("Date of placement on the Union market", None, "the date"),
    ))  # fmt: skip


def _size(facts: Facts) -> Section:
    tokens = facts.tokens
    total = tokens.all + tokens.own
    band = "Less than 1 billion tokens" if total < 10**9 else "1 billion to 10 trillion tokens"
    if total > 10**13:
        band = "More than 10 trillion tokens"
    counted = f"{several(total, 'token')} by the student's tokenizer, counted once however often they were seen"
    counted += f"; teachers wrote {tokens.supervised:,} of them"
    last = max(t.last for t in facts.teachers)
    return Section("1.3", "Modalities, overall training data size and other characteristics", (
        Answer("Modality", "Text."),
        Answer("Training data size", f"{band}: {counted}. Of this training only, not of what the weights it began with "
               "were trained on."),
        Answer("Types of content", "Prompts (chat messages) and answers written by language models.",
               "what the prompts are about"),
        Answer("Latest date of data acquisition or collection",
               f"{last:%m/%Y}. As far as the ledger goes, the model is not trained on after that."),
        Answer("Linguistic characteristics", None, "the languages; they were not measured"),
        Answer("Other relevant characteristics", f"{several(tokens.examples, 'training example')}."),
    ))  # fmt: skip


def _sources(facts: Facts) -> list[Section]:
    files = [s for s in facts.evidence.sources if s.writer is None]
    told = "; ".join(f"{s.source} ({several(s.train, 'prompt')} to train on, licence {s.licence})" for s in files)
    none = "No: models wrote all prompts (see 2.5)."
    open_ = f"{_YES_NO}, of: {told}"
    crawled = "limbeck crawls nothing."

    def asked(question: str) -> Answer:
        return Answer(question, f"Prompts came from: {told}.", open_) if files else Answer(question, none)

    return [
        Section("2.1", "Publicly available datasets", (asked("Were publicly available datasets used?"),)),
        Section("2.2", "Private non-publicly available datasets obtained from third parties"),
        Section("2.2.1", "Datasets commercially licensed by rightsholders or their representatives",
                (asked("Were licensing agreements concluded?"),)),
        Section("2.2.2", "Private datasets obtained from other third parties",
                (asked("Were private datasets obtained from third parties?"),)),
        Section("2.3", "Data crawled and scraped from online sources", (Answer(
            "Were crawlers used by the provider or on its behalf?", crawled if files else f"No. {crawled}",
            f"whether the prompts were crawled: {_YES_NO}" if files else None),)),
        Section("2.4", "User data", (
            asked("Was data from user interactions with the AI model used?"),
            asked("Was data from user interactions with other services of the provider used?"),
        )),
    ]  # fmt: skip


def _synthetic(facts: Facts) -> Section:
    own = [t for t in facts.teachers if t.seen.terms in ("own-model", "unknown")]
    others = [t for t in facts.teachers if t not in own]
    names = " and ".join(t.seen.name for t in others)
    market = "; ".join(map(_generator, others)) + "." if others else "None, as far as the ledger knows."
    rest = [_generator(t) for t in own]
    if facts.tokens.rollouts:
        rest.append(f"the model itself while it was trained: {several(facts.tokens.rollouts, 'answer')}, "
                    f"{several(facts.tokens.own, 'token')}")  # fmt: skip
    writers = [s for s in facts.evidence.sources if s.writer]
    prompts = "; ".join(f"{several(s.train, 'prompt')} by {s.writer}" for s in writers)
    return Section("2.5", "Synthetic data", (
        Answer("Was synthetic data created by the provider or on its behalf to train the model?",
               "Yes, by model distillation: the answers of language models are what the model learned from."),
        Answer("Modality of the synthetic data", "Text."),
        Answer("General-purpose AI models on the market that generated it", market,
               f"whether {names} is on the Union market, and the link to its summary" if others else None),
        Answer("Other AI models that generated it, also one's own", "; ".join(rest) + "." if rest else "None.",
               "what the provider's own models, or those of unknown terms, were trained on" if own else None),
        Answer("Prompts that models wrote", f"{prompts}." if prompts else "None, as far as recorded."),
    ))  # fmt: skip


def _generator(teacher: TeacherTold) -> str:
    """A teacher with all that the ledger and the register say of it."""
    seen, row = teacher.seen, teacher.terms
    told = f"{seen.name}{f' of {row.holder}' if row else ''}: {percent(teacher.share)} of the supervised tokens "
    told += f"({several(teacher.tokens, 'token')} in {several(teacher.rows, 'example')}), written {teacher.first} to "
    told += f"{teacher.last}, reached by {seen.provider} ({seen.route}), terms {seen.terms}"
    return told + (f" ({address(row.address).removeprefix('https://')})" if row else "")


def _processing(facts: Facts) -> list[Section]:
    drops = ", ".join(f"{d.filter} ({several(d.answers, 'answer')})" for d in facts.evidence.dropped) or "none"
    rulings = "; ".join(f"{t.seen.name}: {t.ruling.verdict.value}: {t.ruling.reason}" for t in facts.teachers)
    ledger, ruled = facts.ledger, facts.evidence.rulings
    asked = "What the terms gate said before training" if ruled else "What the register of terms says"
    waivers = "".join(f" Waiver: {waiver.words}." for waiver in (ruled.waivers if ruled else ()))
    return [
        Section("3.1", "Respect of reservation of rights from text and data mining exception or limitation", (
            Answer("Signatory to the Code of Practice for general-purpose AI models?", None, "yes or no"),
            Answer("Measures before model training",
                   f"{asked} of the teachers' outputs for the declared use: {rulings}.{waivers}",
                   "measures for the sources of the prompts"),
        )),
        Section("3.2", "Removal of illegal content", (Answer(
            "General description of measures taken", f"Filters that dropped answers: {drops}.",
            "what was done against illegal content; the filters named here do not look for it"),)),
        Section("3.3", "Other information", (Answer(
            "Evidence", f"Made from a ledger with root sha256:{ledger.root} over "
            f"{several(ledger.size, 'leaf', 'leaves')} and head {ledger.head}; {ledger.trust}; "
            f"signed by {', '.join(ledger.keys) or 'nobody'}."),)),
    ]  # fmt: skip
