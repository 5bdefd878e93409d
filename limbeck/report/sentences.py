"""The run in plain words: sentences computed from its figures, each with the ledger entry it rests on.

A sentence whose figure is missing says that it is missing. No sentence judges whether a figure is good.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from limbeck.export.evidence import Evidence
from limbeck.export.pruning import kept_of
from limbeck.export.words import from_the_words, one_line, percent, several
from limbeck.recipe import PrunedStudent
from limbeck.records import Score


class Sentence(NamedTuple):
    """One claim, and the stage whose ledger entry it rests on (empty for what rests on none)."""

    text: str
    stage: str = ""


def in_plain_words(evidence: Evidence) -> list[list[Sentence]]:
    """Eight claims for somebody who never trained a model, in paragraphs, and one more each where a server said the
    probabilities, where answers were learned from their words, and where the loss was biased.
    """
    return [
        [_what(evidence), _size(evidence)],
        [_data(evidence), _lessons(evidence), *_server(evidence), *_words(evidence), *_bias(evidence)],
        [_agreement(evidence), _distance(evidence), _surprise(evidence)],
        [_limits(evidence)],
    ]


def names(evidence: Evidence) -> str:
    """The teachers, as a list in words."""
    told = [one_line(teacher.name, 120) for teacher in evidence.recipe.teachers]
    return told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"


def keeps(evidence: Evidence) -> list[Sentence]:
    """What of the teacher is in the student, and how much of the way there it was trained."""
    now, before = (evidence.score("agreement_top1", subject) for subject in ("student", "before"))
    if now is None or now.value is None:
        told = [_missing("What the student keeps of the teacher's choices", now)]
    else:
        text = f"Of the teacher's choices of the next token the student keeps {percent(now.value)}"
        if before is not None and before.value is not None:
            text += f"; when training began it was {percent(before.value)}"
        told = [Sentence(f"{text}.", "evaluate")]
    far, near = (evidence.score("kl_forward", subject) for subject in ("before", "student"))
    if far is not None and far.value and near is not None and near.value is not None:
        gap = f"Of the {rough(far.value)} nats a token that lay between them at the beginning"
        left = f"{rough(near.value)} are left, which is {percent(near.value / far.value)}"
        told.append(Sentence(f"{gap}, {left}.", "evaluate"))
    return told


def rough(value: float) -> str:
    """Two digits that mean something: 3.4, 42, 4,200."""
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def of_hundred(share: float) -> str:
    """`54 of 100`; never 0 or 100 for what is not."""
    whole = round(100 * share)
    if whole == 0 and share > 0:
        return "fewer than 1 of 100"
    return "more than 99 of 100" if whole == 100 and share < 1 else f"{whole} of 100"


def _what(evidence: Evidence) -> Sentence:
    many = "teachers" if len(evidence.recipe.teachers) > 1 else "teacher"
    text = (
        "A language model, the student, was trained to answer as another one, the teacher, answers: "
        f"it learned from what its {many} {names(evidence)} wrote."
    )
    return Sentence(text, "train")


def _size(evidence: Evidence) -> Sentence:
    own = evidence.sizes.get("student")
    whole = evidence.sizes.get(f"teacher:{evidence.recipe.teachers[0].name}")
    if own is None:
        return Sentence("How large the student is was not recorded.")
    if whole is None:
        return Sentence(f"The student has {own.layers} layers and {own.parameters:,} weights.", "evaluate")
    share = percent(own.parameters / whole.parameters)
    if isinstance(evidence.recipe.student, PrunedStudent):
        kept = kept_of(evidence, "the teacher's", own.layers, whole.layers)
        text = f"The student kept {kept}; that is {share} of the teacher's weights, and the rest is gone."
        return Sentence(text, "student")
    text = f"The student has {own.parameters:,} weights, {share} of the teacher's {whole.parameters:,}."
    return Sentence(text, "evaluate")


def _data(evidence: Evidence) -> Sentence:
    answers, kept = sum(t.answers for t in evidence.teachers), sum(t.kept for t in evidence.teachers)
    train, held_out = evidence.prompts
    dropped = "all were kept" if kept == answers else f"{answers - kept:,} of them were dropped by filters"
    text = (
        f"The teacher gave {several(answers, 'answer')} to {several(train + held_out, 'question')}; {dropped}"
        f", and the answers to {several(held_out, 'question')} were held back, so that the student could be "
        "examined on what it never saw."
    )
    return Sentence(text, "curate")


def _lessons(evidence: Evidence) -> Sentence:
    seen, passes = evidence.training.tokens, evidence.recipe.train.epochs
    once = f"{several(evidence.supervised, 'token')} of the teacher's text"
    if seen is None:
        return Sentence(f"It learned from {once}.", "render")
    times = "once" if passes == 1 else f"{passes:g} times"
    text = f"The student went through {once} {times}, {several(seen, 'token')} in all"
    return Sentence(f"{text}; a token is a word or a piece of one.", "train")


def _server(evidence: Evidence) -> list[Sentence]:
    """One sentence where a server said the probabilities that the student learned from."""
    server = evidence.facts("annotate").get("server")
    if not isinstance(server, dict):
        return []
    who = f"{one_line(str(server.get('model')), 120)} at {one_line(str(server.get('base_url')), 120)}"
    text = f"How likely each next token is was said by a server, {who}; who answers there, it alone says."
    return [Sentence(text, "annotate")]


def _words(evidence: Evidence) -> list[Sentence]:
    """One sentence where answers were learned without the teacher's probabilities."""
    told = from_the_words(evidence.facts("annotate"))
    return [Sentence(told, "annotate")] if told else []


def _bias(evidence: Evidence) -> list[Sentence]:
    """One sentence where the loss was not the one it is named after, none where it was."""
    if not (told := evidence.training.biased):
        return []
    why = "; and ".join(one_line(str(term), 300) for term in told)
    text = f"What it was trained towards is not exactly the loss that is named, which the recipe allowed ({why})."
    return [Sentence(text, "train")]


def _agreement(evidence: Evidence) -> Sentence:
    now, before = (evidence.score("agreement_top1", subject) for subject in ("student", "before"))
    if now is None or now.value is None:
        return _missing("How often the student picks the teacher's next token", now)
    text = (
        f"On {several(now.n, 'held-back question')}, at each place of the teacher's answers, the student's "
        f"first choice for the next token is also the teacher's in {of_hundred(now.value)} places"
    )
    if before is not None and before.value is not None:
        text += f"; before training it was {of_hundred(before.value)}"
    return Sentence(f"{text}. {_chance(now)}", "evaluate")


def _distance(evidence: Evidence) -> Sentence:
    now, before = (evidence.score("kl_forward", subject) for subject in ("student", "before"))
    if now is None or now.value is None:
        return _missing("How far the student's probabilities stray from the teacher's", now)
    text = (
        f"What the teacher would say, the student holds to be {_times(now.value)} times less likely than the "
        "teacher does, on average"
    )
    if before is not None and before.value is not None:
        text += f"; before training, {_times(before.value)} times"
    return Sentence(f"{text}. That is {rough(now.value)} nats a token, and 0 would be no difference.", "evaluate")


def _surprise(evidence: Evidence) -> Sentence:
    now, own = (evidence.score("perplexity_on_teacher", subject) for subject in ("student", "teacher"))
    if now is None or now.value is None:
        return _missing("How surprised the student is by the teacher's answers", now)
    text = (
        "Reading the teacher's answers, the student is as unsure of each next token as if it chose among "
        f"{rough(now.value)} equally likely ones"
    )
    if own is not None and own.value is not None:
        text += f"; the teacher itself, among {rough(own.value)}"
    return Sentence(f"{text}.", "evaluate")


def _limits(evidence: Evidence) -> Sentence:
    n = max((score.n for score in evidence.scores), default=0)
    if not n:
        return Sentence("How closely the student follows its teacher was not measured at all.")
    return Sentence(
        f"These figures say how closely the student follows its teacher on {several(n, 'question')} like "
        "those it learned from. They do not say whether its answers are true, safe or useful: nothing here "
        "was tested for that."
    )


def _missing(what: str, score: Score | None) -> Sentence:
    unscored = score.unscored if score else "no such score was recorded"
    return Sentence(f"{what} was not measured: {one_line(unscored or 'no reason was recorded')}.", "evaluate")


def _chance(score: Score) -> str:
    """How much chance is in an agreement, in a sentence."""
    if score.low is None or score.high is None:
        return "That rests on a single question, so nobody can say how much chance is in it."
    return (
        f"Give or take the choice of questions, it lies between {of_hundred(score.low)} and {of_hundred(score.high)}."
    )


def _times(nats: float) -> str:
    """How much less probable, by geometric mean, something is held to be: e to the power of the nats."""
    return rough(math.exp(min(nats, 700)))
