"""The public summary of training content that Article 53(1)(d) of Regulation (EU) 2024/1689 asks for.

It follows the AI Office's template of 24 July 2025 (C(2025) 5235; issued again on 5 December 2025 as C(2025) 8311).
Numbers and titles of sections and what each asks are held against summaries that providers filled in and published
(docs/export.md says which), not against the Commission's own file. What the ledger knows is filled in, above all
section 2.5 on synthetic data. What only the provider can know is not guessed at: it is marked, and listed at the top.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import NamedTuple

from limbeck import __version__
from limbeck.export.card import environment
from limbeck.export.evidence import PromptSource
from limbeck.export.facts import Facts, TeacherTold
from limbeck.export.licences import address
from limbeck.export.teachers import drawn, reached, source_name, written
from limbeck.export.words import percent, several
from limbeck.terms.gate import Outcome


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


_ORIGIN = "the files and data sets named under 2"


def eu_summary(facts: Facts) -> str:
    """The summary, as Markdown."""
    sections = _sections(facts)
    left = [(s.number, a.asked, a.open) for s in sections for a in s.answers if a.open]
    template = environment().get_template("eu-summary.md.jinja")
    return template.render(facts=facts, version=__version__, sections=sections, left=left)


def _sections(facts: Facts) -> list[Section]:
    taken = [source for source in facts.evidence.sources if source.writer is None]
    return [
        Section("1", "General information"),
        _provider(),
        _model(facts),
        _size(facts),
        Section("2", "List of data sources", _taken(facts, taken)),
        *_sources(bool(taken)),
        _synthetic(facts),
        Section("2.6", "Other sources of data", (Answer(
            "Data sources other than those of 2.1 to 2.5?",
            "None in the ledger: all that was trained on are prompts and answers.",
            f"whether any of {_ORIGIN} are from elsewhere than 2.1 to 2.5, and what they are" if taken else None,
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
    pruned = facts.evidence.recipe.student.kind == "pruned"
    began = source_name(facts.base)
    base = f"Its weights began as those of {began}, {'with parts removed' if pruned else 'whole'}. This summary is of "
    base += "what it was trained on after that."
    if facts.base_digest:
        base += f" Digest of that model: {facts.base_digest}."
    return Section("1.2", "Model identification", (
        Answer("Versioned model name(s)", f"{facts.name} {facts.version} (digest of the weights: {facts.weights})"),
        Answer("Model dependencies", base,
               f"the name of {began} as it was placed on the market, and the link to its summary, where there is "
               "one"),
        Answer("Date of placement of the model on the Union market", None, "the date"),
    ))  # fmt: skip


def _size(facts: Facts) -> Section:
    tokens = facts.tokens
    total = tokens.all + tokens.own
    band = "less than 1 billion tokens" if total < 10**9 else "1 billion to 10 trillion tokens"
    if total > 10**13:
        band = "more than 10 trillion tokens"
    counted = f"{several(total, 'token')} by the student's tokenizer, counted once however often they were seen; "
    counted += f"teachers wrote {tokens.supervised:,} of them"
    images = sum(source.images for source in facts.evidence.sources)
    shown = f" Teachers were shown {several(images, 'image')} with the prompts." if images else ""
    return Section("1.3", "Modalities, overall training data size and other characteristics", (
        Answer("Modality", f"Text.{shown}"),
        Answer("Training data size", f"Text: {band} ({counted})."),
        Answer("Types of content", "Text: prompts (chat messages) and answers that language models wrote.",
               "what the prompts are about"),
        Answer("Latest date of data acquisition/collection for model training",
               f"{facts.collected:%m/%Y}. As far as the ledger goes, the model is not trained on new data after that."),
        Answer("Linguistic characteristics of the overall training data", None,
               "the languages; they were not measured"),
        Answer("Other relevant characteristics of the overall training data",
               f"{several(tokens.examples, 'training example')}. {drawn(facts.evidence)}"),
    ))  # fmt: skip


def _taken(facts: Facts, taken: list[PromptSource]) -> tuple[Answer, ...]:
    """What came from outside, once; the sections ask where each is from."""
    if not taken:
        return ()
    digests = facts.evidence.entries[0].inputs if facts.evidence.entries else {}
    told = "; ".join(
        f"{source_name(s.source)} ({several(s.train, 'prompt')} to train on, licence {s.licence}"
        + (f", {digests[key]}" if (key := f"prompts:{s.source}") in digests else "") + ")"
        for s in taken
    )  # fmt: skip
    return (Answer("Files and data sets that prompts were taken from", f"{told}.",
                   "which of 2.1, 2.2, 2.3, 2.4 and 2.6 each belongs under; the ledger does not know"),)  # fmt: skip


def _sources(taken: bool) -> list[Section]:
    def asked(question: str, more: str) -> Answer:
        if not taken:
            return Answer(question, "No: models wrote all prompts (see 2.5).")
        return Answer(question, None, f"yes or no, for each of {_ORIGIN}; where yes, {more}")

    crawled = "limbeck crawls and scrapes nothing."
    return [
        Section("2.1", "Publicly available datasets", (asked(
            "Publicly available datasets used to train the model?",
            "modalities covered, a list of the large ones with links, a general description of the others"),)),
        Section("2.2", "Private non-publicly available datasets obtained from third parties"),
        Section("2.2.1", "Datasets commercially licensed by rightsholders or their representatives", (asked(
            "Commercial licensing agreements concluded with rightsholders or their representatives?",
            "modalities covered"),)),
        Section("2.2.2", "Private datasets obtained from other third parties", (asked(
            "Private datasets obtained from third parties, not licensed as in 2.2.1?",
            "modalities covered, a list of those that are publicly known, a general description of the others"),)),
        Section("2.3", "Data crawled and scraped from online sources", (Answer(
            "Crawlers used by the provider or on its behalf?", crawled if taken else f"No. {crawled}",
            f"whether any of {_ORIGIN} were crawled; where yes, names and purposes of the crawlers, their behaviour, "
            "the period, types of content and sources, modalities, and a summary of the most relevant domain names"
            if taken else None),)),
        Section("2.4", "User data", (
            asked("Data from user interactions with the AI model used to train it?", "modalities covered"),
            asked("Data from user interactions with other services or products of the provider used to train it?",
                  "a general description of those services, and modalities covered"),
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
    files = [PurePath(t.seen.file).name for t in facts.teachers if t.seen.file]
    made = (
        f"whether the answers of {' and '.join(files)} were made by the provider or on its behalf; a data set that a "
    )
    made += "third party made for itself belongs under 2.1 or 2.2.2"
    return Section("2.5", "Synthetic data", (
        Answer("Synthetic, AI-generated data created by the provider or on its behalf to train the model?",
               "Yes, by model distillation: the answers of language models are what the model learned from.",
               made if files else None),
        Answer("Modality of the synthetic data", "Text."),
        Answer("General-purpose AI models available on the market that generated it", market,
               f"whether {names} {'is' if len(others) == 1 else 'are'} available on the Union market, with links to "
               "the summaries" if others else None),
        Answer("Other AI models that generated it, the provider's own among them", "; ".join(rest) + "." if rest else
               "None, as far as the ledger knows.",
               "a general description of what these models were trained on, as far as it is known" if own else None),
        Answer("Prompts that models wrote", f"{prompts}." if prompts else "None, as far as recorded."),
    ))  # fmt: skip


def _generator(teacher: TeacherTold) -> str:
    """A teacher with all that the ledger and the register say of it."""
    seen, row = teacher.seen, teacher.terms
    told = (
        f"{seen.name}{f' (terms of {row.holder})' if row else ''}: {percent(teacher.share)} of the supervised tokens "
    )
    told += f"({several(teacher.tokens, 'token')} in {several(teacher.rows, 'example')}), written "
    told += f"{written(teacher.first, teacher.last)}; reached: {reached(seen)}; terms {seen.terms}"
    return told + (f", {address(row.address).removeprefix('https://')}" if row else "")


def _processing(facts: Facts) -> list[Section]:
    drops = ", ".join(f"{d.filter} ({several(d.answers, 'answer')})" for d in facts.evidence.dropped)
    ledger = facts.ledger
    return [
        Section("3.1", "Respect of reservation of rights from text and data mining exception or limitation", (
            Answer("Signatory to the Code of Practice for general-purpose AI models, with its commitments to respect "
                   "such reservations?", None, "yes or no"),
            Answer("Measures implemented before model training",
                   "limbeck crawls nothing, and looks for no reservation of rights in what it is given.",
                   "measures before and during data collection, by the provider or by whom its data are from, with the "
                   "opt-out protocols honoured"),
        )),
        Section("3.2", "Removal of illegal content", (Answer(
            "General description of measures taken",
            f"Filters dropped answers: {drops}. None of them looks for illegal content as such." if drops
            else "No filter dropped an answer, and none looks for illegal content as such.",
            "what was done to avoid or remove illegal content"),)),
        Section("3.3", "Other information (optional)", (
            Answer("Terms of the teachers' outputs", _terms(facts)),
            Answer("Evidence", f"Made from a ledger with root sha256:{ledger.root} over "
                   f"{several(ledger.size, 'leaf', 'leaves')} and head {ledger.head}; {ledger.trust}; "
                   f"signed by {', '.join(ledger.keys) or 'nobody'}."),
        )),
    ]  # fmt: skip


def _terms(facts: Facts) -> str:
    """What the gate said; a waiver's words once, and not in each teacher's reason again."""
    ruled = facts.evidence.rulings
    asked = "What the terms gate said before training" if ruled else "What the register of terms says"
    waived = bool(ruled and ruled.waivers)
    why = {t.seen.name: t.ruling.reason.rstrip(".") for t in facts.teachers}
    why |= {t.seen.name: "the waiver follows" for t in facts.teachers if waived and t.ruling.verdict is Outcome.WAIVED}
    rulings = "; ".join(f"{t.seen.name}: {t.ruling.verdict.value}, {why[t.seen.name]}" for t in facts.teachers)
    waivers = "".join(f" Waiver: {waiver.words.rstrip('.')}." for waiver in (ruled.waivers if ruled else ()))
    return f"{asked} of the declared use, by our reading and no legal advice: {rulings}.{waivers}"
