"""What the report's sections show, computed from the evidence; the templates only lay it out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from markupsafe import Markup
from pydantic import JsonValue

from limbeck.evaluate.scores import NAMES, SUBJECTS
from limbeck.export.evidence import Evidence, Size, Speed
from limbeck.export.pruning import kept_of, narrowed
from limbeck.export.words import interval, number, one_line, percent, several, size
from limbeck.ledger.merkle.fields import NOT_ASKED
from limbeck.recipe import PrunedStudent, Use
from limbeck.records import Digest, Entry, Score
from limbeck.report.figures import loss_curve, score_dots
from limbeck.terms.gate import rule_route, strictest

TITLES = {
    "agreement_top1": ("Agreement", "share of places with the teacher's next token; 1 is best"),
    "kl_forward": ("Distance from the teacher", "KL(teacher || subject), nats a token; 0 is best"),
    "perplexity_on_teacher": (
        "Perplexity on the teacher's answers",
        "logarithmic scale; 1 would be certainty",
    ),
}

_DISTRIBUTIONS = {
    "internal": "nobody outside gets the student",
    "hosted": "others use it as a service",
    "public-weights": "anyone can have its weights",
}


class Stat(NamedTuple):
    """One figure of the strip on top."""

    label: str
    value: str
    range: str
    stage: str


class SizeRow(NamedTuple):
    """One line of the comparison of teacher and student."""

    label: str
    note: str
    teacher: str
    student: str
    share: str
    teacher_range: str = ""
    student_range: str = ""


class Cost(NamedTuple):
    """What the run took."""

    money: str
    total: float
    stages: list[tuple[Entry, float]]


class Drawn(NamedTuple):
    """One figure with its caption."""

    title: str
    meaning: str
    svg: Markup


class Event(NamedTuple):
    """One entry of the timeline."""

    entry: Entry
    digest: Digest
    seconds: float
    latest: bool
    """Whether no later entry did the same stage again."""
    summary: str
    facts: str


class SpeedRow(NamedTuple):
    """How fast a subject reads."""

    subject: str
    speed: Speed


def strip(evidence: Evidence) -> list[Stat]:
    """The figures that a reader looks for first, as far as they were measured."""
    found = []
    for name, label in (
        ("agreement_top1", "of next tokens are the teacher's own choice"),
        ("kl_forward", "nats a token away from the teacher"),
    ):
        score = evidence.score(name, "student")
        if score is not None and score.value is not None:
            share = name == "agreement_top1"
            value = percent(score.value) if share else number(score.value)
            alone = score.low is None or score.high is None
            ends = "no interval: a single prompt" if alone else f"95 %: {interval(score)}"
            if share and score.low is not None and score.high is not None:
                ends = f"95 %: {100 * score.low:.1f} to {percent(score.high)}"
            found.append(Stat(label, value, ends, "evaluate"))
    own, whole = pair(evidence)
    if own and whole:
        counts = f"{own.parameters:,} of {whole.parameters:,}"
        found.append(
            Stat(
                "as many weights as the teacher",
                percent(own.parameters / whole.parameters),
                counts,
                "evaluate",
            )
        )
    if (tokens := evidence.training.tokens) is not None:
        found.append(Stat("supervised tokens seen in training", f"{tokens:,}", _passes(evidence), "train"))
    return found


def _passes(evidence: Evidence) -> str:
    epochs = evidence.recipe.train.epochs
    return f"{several(evidence.supervised, 'token')}, {epochs:g} {'time' if epochs == 1 else 'times'}"


def sizes(evidence: Evidence) -> list[SizeRow]:
    """Teacher and student side by side; of a teacher that is not here, what is known of the student alone."""
    own, whole = pair(evidence)
    rows = []
    if own:
        for label, shown, key in (
            ("Layers", "{:,}".format, "layers"),
            ("Parameters", "{:,}".format, "parameters"),
            ("Weights on disk", size, "bytes"),
        ):
            a, b = getattr(whole, key, None), getattr(own, key)
            share = "" if a is None else percent(b / a) if a else "not defined"
            rows.append(SizeRow(label, "", "not known" if a is None else shown(a), shown(b), share))
    for part in narrowed(evidence):
        share = percent(part.kept / part.there)
        rows.append(
            SizeRow(part.name[0].upper() + part.name[1:], "in each layer", f"{part.there:,}", f"{part.kept:,}", share)
        )
    fast, slow = evidence.speeds.get("student"), evidence.speeds.get("teacher")
    if fast and not slow:
        rows.append(SizeRow("Reading", "milliseconds a token", "not known", number(fast.value), "", "", _ends(fast)))
    if fast and slow and slow.value:
        processor = evidence.facts("evaluate").get("processor")
        note = "milliseconds a token, one prompt with its answer at a time"
        if isinstance(processor, str):
            note += f", on {one_line(processor, 80)}"
        share = percent(fast.value / slow.value)
        values = (number(slow.value), number(fast.value), share)
        rows.append(SizeRow("Reading", note, *values, _ends(slow), _ends(fast)))
    return rows


def _ends(speed: Speed) -> str:
    """`2.600 to 3.000`, or nothing where there is no interval."""
    return "" if speed.low is None or speed.high is None else f"{number(speed.low)} to {number(speed.high)}"


def pair(evidence: Evidence) -> tuple[Size | None, Size | None]:
    """How large the student is, and the (first) teacher; None for what is not known."""
    return evidence.sizes.get("student"), evidence.sizes.get(f"teacher:{evidence.recipe.teachers[0].name}")


def scores(evidence: Evidence) -> list[Score]:
    """All scores, name by name, before and after training and then the teacher."""
    order = {name: place for place, name in enumerate((*NAMES, *SUBJECTS))}
    return sorted(evidence.scores, key=lambda s: (order.get(s.name, len(order)), order[s.subject]))


def speeds(evidence: Evidence) -> list[SpeedRow]:
    """Reading speeds in the order of the scores."""
    return [SpeedRow(who, evidence.speeds[who]) for who in SUBJECTS if who in evidence.speeds]


def cost(evidence: Evidence) -> Cost:
    """Money as far as it can be told, and the clock time of each stage."""
    outside = sorted({t.provider for t in evidence.teachers if t.provider != "self-hosted" and not t.file})
    money = "No answer was bought from a provider; what the machine costs was not recorded."
    if outside:
        money = f"Answers came from {', '.join(map(one_line, outside))}; what they cost was not recorded."
    elif any(t.file for t in evidence.teachers):
        money = "Answers that were there already were taken from a file; what they cost was not recorded."
    if spent := _spent(evidence):
        money = spent
    stages = [(entry, seconds(entry)) for entry, _ in evidence.latest]
    return Cost(money + _wasted(evidence), sum(took for _, took in stages), stages)


def _spent(evidence: Evidence) -> str:
    """What the endpoints charged, and how much of it was wasted; empty where no prices were known."""
    money = evidence.facts("collect").get("money")
    if not isinstance(money, dict):
        return ""
    spent, wasted, prices = (money.get(name) for name in ("spent_dollars", "wasted_dollars", "prices"))
    if not isinstance(spent, int | float) or not isinstance(wasted, int | float) or not isinstance(prices, dict):
        return ""
    if "unknown" in prices.values():
        return "" if len(set(prices.values())) == 1 else f"At least {spent:.4f} US dollars; some prices were not known."
    share = f", of which at most {wasted:.4f} bought no usable answer" if wasted else ""
    return f"Answers cost at most {spent:.4f} US dollars{share}."


def _wasted(evidence: Evidence) -> str:
    """What of it was wasted, by kind, and beside it the answers that were cut off and are kept; money where all prices
    were known.
    """
    money = evidence.facts("collect").get("money")
    prices = money.get("prices") if isinstance(money, dict) else None
    if not isinstance(money, dict) or not isinstance(prices, dict):
        return ""
    waste, kept, known = money.get("waste"), money.get("kept_cut_off"), "unknown" not in prices.values()
    kinds = [
        f"{one_line(kind)} {told.get('count')}" + (f" ({told.get('dollars_at_most', 0):.4f})" if known else "")
        for kind, told in (waste.items() if isinstance(waste, dict) else ())
        if isinstance(told, dict)
    ]
    named = f" Wasted, by kind{', with US dollars at most' if known else ''}: {', '.join(kinds)}." if kinds else ""
    if not isinstance(kept, dict) or not (count := kept.get("answers")):
        return named
    price = f" ({kept.get('dollars', 0):.4f} US dollars)" if known else ""
    answers = "answer that was" if count == 1 else "answers that were"
    return f"{named} Not wasted: {count} {answers} cut off at the most tokens allowed{price}, which the recipe keeps."


def seconds(entry: Entry) -> float:
    """How long a stage took by the clock; 0 where the clock went backwards."""
    return max(0.0, (entry.finished - entry.started).total_seconds())


def figures(evidence: Evidence) -> list[Drawn]:
    """The scores as dots and whiskers."""
    found = []
    for name in NAMES:
        scores = [score for score in evidence.scores if score.name == name]
        title, meaning = TITLES[name]
        if (svg := score_dots(name, scores, f"{title}: {_spoken(evidence, name)}")) is not None:
            found.append(Drawn(title, meaning, svg))
    return found


def _spoken(evidence: Evidence, name: str) -> str:
    """The figure for those who cannot see it."""
    told = []
    for subject, label in (("before", "before training"), ("student", "student"), ("teacher", "teacher")):
        score = evidence.score(name, subject)
        if score is not None and score.value is not None:
            told.append(f"{label} {number(score.value)}, interval {interval(score)}")
    return "; ".join(told)


def curve(evidence: Evidence) -> Markup | None:
    """The loss curve."""
    steps = evidence.training.steps
    if not steps:
        return None
    first, last = number(steps[0].loss), number(steps[-1].loss)
    return loss_curve(steps, f"Loss in nats a token: {first} at the first step, {last} at the last")


def curve_caption(evidence: Evidence) -> str:
    """What the curve shows."""
    steps, loss = evidence.training.steps, one_line(evidence.training.loss or evidence.recipe.train.loss_in_words, 40)
    return (
        f"{loss}, {several(len(steps), 'optimiser step')}, on the training prompts. Faint: the steps, in "
        "groups where there are many. Dark: their running mean. This is no score: what the student makes of "
        "prompts it never saw is measured above."
    )


def drops(evidence: Evidence) -> list[tuple[str, int]]:
    """Answers that were not used, by what dropped them."""
    left_out = evidence.counts("render", "left_out").items()
    return [(d.filter, d.answers) for d in evidence.dropped] + [(f"{name}, when rendered", n) for name, n in left_out]


def start(evidence: Evidence) -> str:
    """What the student was before it learned."""
    student, whole = evidence.recipe.student, evidence.count("student", "teacher_layers")
    if isinstance(student, PrunedStudent):
        return f"{evidence.recipe.teachers[0].name}, {kept_of(evidence, 'its', student.layers, whole)}"
    return student.model


def start_licence(evidence: Evidence) -> str:
    """The licence of those weights, as the card has it."""
    said = evidence.facts("card").get("licence")
    return said if isinstance(said, str) else "not recorded"


def use(evidence: Evidence) -> str:
    """The declared use in words."""
    declared = evidence.recipe.use
    money = "commercial" if declared.commercial else "not commercial"
    return f"distribution {declared.distribution}, purpose {declared.purpose}, {money}"


def uses(evidence: Evidence) -> list[tuple[str, str, str]]:
    """Every distribution there is, its meaning, and what was declared of it."""
    declared = evidence.recipe.use
    money = "commercial" if declared.commercial else "not commercial"
    here = f"yes: {declared.purpose}, {money}"
    return [(name, meaning, here if name == declared.distribution else "") for name, meaning in _DISTRIBUTIONS.items()]


class Forecast(NamedTuple):
    """What the gate would say of another distribution."""

    verdict: str
    clause: str
    obligations: tuple[str, ...]


def forecast(evidence: Evidence) -> dict[str, Forecast]:
    """By distribution, with purpose and money as declared. What the gate ruled stands at the declared one; waivers are
    for that use, and are left out of the others. Empty where no gate was asked.
    """
    found: dict[str, Forecast] = {}
    for name in _DISTRIBUTIONS if evidence.rulings else ():
        use = Use.model_validate(evidence.recipe.use.model_dump() | {"distribution": name})
        ruled = evidence.rulings.rulings if evidence.rulings else ()
        whole = strictest(rule_route(one.terms, use, one.day, one.route) for one in ruled)
        if evidence.rulings and name == evidence.recipe.use.distribution:
            whole = evidence.rulings.whole
        told = tuple(f"{o.kind}: {o.value}" for o in whole.obligations)
        found[name] = Forecast(whole.verdict.value, whole.clause, told)
    return found


def timeline(evidence: Evidence) -> list[Event]:
    """Every entry of the ledger, first to last."""
    latest = {digest for _, digest in evidence.latest}
    return [
        Event(
            entry,
            digest,
            seconds(entry),
            digest in latest or not entry.outputs,
            summary(entry.facts),
            _pretty(entry.facts),
        )
        for entry, digest in zip(evidence.entries, evidence.digests, strict=True)
    ]


def summary(facts: Mapping[str, JsonValue]) -> str:
    """The first few whole numbers and short words among the facts of an entry."""
    return "; ".join(text for text, _ in zip(_told(facts), range(6), strict=False))


def _told(facts: Mapping[str, JsonValue]) -> Iterator[str]:
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield f"{label} {value:,}"
        elif (name, value) == ("gate", NOT_ASKED):
            yield "rows are sealed before the terms gate rules on all of them: what it said stands in the entry of gate"
        elif isinstance(value, str) and len(value) <= 24:
            yield f"{label} {value}"


def _pretty(facts: Mapping[str, JsonValue]) -> str:
    """The facts as JSON, without lists of files, whose digests stand beside, and without the gate's envelopes."""
    kept = {name: value for name, value in facts.items() if name not in ("manifests", "gate")}
    return json.dumps(kept, ensure_ascii=False, indent=1) if kept else ""


def resamples(evidence: Evidence) -> str:
    """How many resamples the intervals rest on, in words."""
    said = evidence.facts("evaluate").get("interval")
    count = said.get("resamples") if isinstance(said, dict) else None
    return f"{count:,}" if isinstance(count, int) else "Many"


def precision(evidence: Evidence) -> str:
    """What the models were run in to be scored; empty where it was not recorded."""
    return " and ".join(sorted({found.precision for found in evidence.sizes.values()}))
