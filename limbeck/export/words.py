"""Figures, digests and foreign text as a reader sees them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from pydantic import JsonValue

from limbeck.records import Score

_MARKDOWN = re.compile(r"[\\`*\[\]|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What means something inside a line: CommonMark's marks, a table's bars, and what GitHub turns into
links."""
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


def visible(text: str) -> str:
    """Text in which every character shows: controls become their pictures, and marks that turn the direction
    of writing are written out, so that nothing foreign can hide or reorder what stands beside it. Line
    breaks and tabs stay.
    """
    return "".join(_shown(c) for c in text)


def one_line(text: str, limit: int | None = None) -> str:
    """Visible text on one line, white space collapsed; cut to `limit` characters with an ellipsis."""
    line = " ".join(visible(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def markdown(text: str) -> str:
    """Foreign text as Markdown that says exactly that text inside a line: no markup, HTML, links or cells.

    Punctuation is escaped as CommonMark 0.31 section 2.4 allows; what HTML reads as markup becomes entities.
    """
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text)).translate(_ENTITIES)


def short(digest: str) -> str:
    """A digest cut to what people compare: `sha256:` and 12 digits."""
    return digest if len(digest) <= 20 else f"{digest[:19]}…"


def number(value: float) -> str:
    """A figure with the digits that mean something: 0.537, 12.4, 5,213."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def interval(score: Score) -> str:
    """`0.512 to 0.570`, or why there is none."""
    if score.value is None:
        return f"not scored: {one_line(score.unscored or 'no reason given')}"
    if score.low is None or score.high is None:
        return "none: a single prompt"
    return f"{number(score.low)} to {number(score.high)}"


def percent(share: float) -> str:
    """`31.4 %`, with a space that does not break; never 0 or 100 for what is not."""
    text = f"{100 * share:.1f}"
    if text == "0.0" and share > 0:
        text = "below 0.1"
    elif text == "100.0" and share < 1:
        text = "above 99.9"
    return f"{text}\N{NO-BREAK SPACE}%"


def size(count: int) -> str:
    """Bytes: `269.1 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"


def duration(seconds: float) -> str:
    """`0.4 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def several(count: int, one: str, many: str | None = None) -> str:
    """`1 prompt`, `1,200 prompts`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def from_the_words(annotated: Mapping[str, JsonValue]) -> str:
    """What the facts of the stage annotate say of answers that were learned without the teacher's probabilities, as a
    sentence. Empty where none may be (`signal.unmatched: text` lets them), or none was.
    """
    share = annotated.get("from_the_words")
    if annotated.get("unmatched") != "text" or not isinstance(share, int | float):
        return ""
    most = "Most of what" if share > 0.5 else "A part of what"
    what = f"{most} it learned from" if share < 1 else "All that it learned from"
    return (
        f"{what} is the words alone: at {percent(share)} of the places the teacher's probabilities were not used, "
        "since they came for other tokens than the student's or not at all, and the token that was written counts as "
        "certain (signal.unmatched: text)."
    )


def _shown(c: str) -> str:
    code = ord(c)
    if c in "\n\t":
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    kind = unicodedata.category(c)
    if code == 0x7F:
        return "\u2421"
    if kind in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp") or (kind == "Cf" and unicodedata.bidirectional(c) != "BN"):
        return f"\\u{code:04x}"
    return c
