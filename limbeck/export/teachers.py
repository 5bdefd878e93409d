"""How a teacher's answers came, in words: by which route, in batches or out of a file, on which days, drawn how."""

from __future__ import annotations

import datetime as dt
from pathlib import PurePath

from limbeck.export.evidence import Evidence, TeacherSeen
from limbeck.export.words import several
from limbeck.recipe import EndpointTeacher, FileTeacher
from limbeck.terms.terms import OWN_MODEL, register


def reached(seen: TeacherSeen) -> str:
    """`self-hosted`; `api.openai.com, maker-api, 40 of 50 answers in 2 batches`; or out of which file."""
    if seen.file is not None:
        by = "" if seen.provider == "unknown" else f", run by {seen.provider}"
        return f"answers of the file {PurePath(seen.file).name}; as declared, route {seen.route}{by}"
    where = seen.provider if seen.provider == seen.route else f"{seen.provider}, {seen.route}"
    return f"{where}, {in_batches(seen)}" if seen.batched else where


def owner(seen: TeacherSeen) -> str:
    """Whose a teacher is, as far as its terms say."""
    if seen.terms == OWN_MODEL:
        return "The recipe declares the model to be one's own."
    found = register().get(seen.terms)
    if found is None:
        return "Not recorded."
    return f"{found.holder}, as the register names the holder of these terms; the run itself recorded no owner."


def source_name(source: str) -> str:
    """A file of prompts without the directories it lay in, which are nobody else's business."""
    return PurePath(source).name if PurePath(source).is_absolute() else source


def in_batches(seen: TeacherSeen) -> str:
    """How many answers came by the provider's batch API."""
    share = "all answers" if seen.batched == seen.answers else f"{seen.batched:,} of {several(seen.answers, 'answer')}"
    return f"{share} by its batch API, in {several(seen.batches, 'batch', 'batches')}"


def written(first: dt.date | None, last: dt.date | None) -> str:
    """On which days: one, from the first to the last, or on none that was said."""
    if first is None or last is None:
        return "on a day that nobody said"
    return f"on {first}" if first == last else f"from {first} to {last}"


def drawn(evidence: Evidence) -> str:
    """How the answers were drawn, in a sentence or more. Of answers out of a file nobody here knows it."""
    recipe, told = evidence.recipe, []
    files = [t for t in recipe.teachers if isinstance(t, FileTeacher)]
    if len(files) < len(recipe.teachers):
        whose = f"All but those of {_names(files)} were drawn" if files else "Drawn"
        most = several(recipe.collect.max_tokens, "token")
        told.append(f"{whose} at temperature {recipe.collect.temperature:g}, top-p {recipe.collect.top_p:g}, "
                    f"at most {most} an answer.")  # fmt: skip
    told += [
        f"{t.name} was not told {' or '.join(t.omit)}, and took what its provider has for that."
        for t in recipe.teachers
        if isinstance(t, EndpointTeacher) and t.omit
    ]
    if files:
        told.append(f"Those of {_names(files)} were there already; how they were drawn is not recorded.")
    return " ".join(told)


def _names(teachers: list[FileTeacher]) -> str:
    return " and ".join(t.name for t in teachers)
