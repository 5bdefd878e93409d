"""Finds text that repeats itself over and over, in any language, by how its characters repeat.

Nothing here knows words: Chinese, Japanese and Thai have no spaces between them. Lengths are counted in
letters of an alphabet; a Chinese, Japanese or Korean character says about as much as three of those and
counts as three.

Two things are called a loop, both seen in answers of small models:

1. The text ends in a unit that is repeated without a break, at least `TURNS` times over `RUN` letters or
   more; over `LONG_RUN` letters or more, three times are enough. A unit of up to four letters, or without any
   letter or digit, always needs `LONG_RUN`: laughter, ruled lines and large numbers written out are no loops.
2. At least `SHARE` of a text of `TEXT` letters or more was said before in the same text, in pieces of `PIECE`
   letters. This finds loops that were left again, and loops whose turns differ a little.

Before comparing, white space is collapsed and list markers (`7.`, `b)`, `-`) at the start of a line are taken
off, so that a numbered list of one and the same sentence is a loop, while a multiplication table, whose
numbers stand inside the line, is none.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

TURNS = 4
"""Turns of the unit at the end of the text."""
RUN = 60
"""Letters those turns cover."""
LONG_RUN = 200
"""Letters from which on three turns are enough, and very short units and units without words are loops
too."""
PIECE = 32
"""Letters of a piece that is looked up in what came before: about six English words."""
TEXT = 160
"""Letters of the shortest text whose repeated share is judged."""
SHARE = 0.6
"""Share of the pieces that came before."""
_WINDOW = 8192
"""Letters at the end of a text in which a repeated unit is looked for."""

_WIDE = (
    "\u1100-\u11ff\u2e80-\u2fdf\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Chinese, Japanese and Korean letters, as ranges of a regular expression."""
_WIDE_CHARACTER = re.compile(f"[{_WIDE}]")
_TRIPLED = re.compile(rf"([{_WIDE}])\1\1")
_ONCE = r"\1"
_MARKER = re.compile(r"^[^\S\n]*(?:(?:\(?\w{1,3}[.)\]:]|[-*+•–])[^\S\n]+)+(?=[^\n]{16})", re.MULTILINE)
"""A list marker of a line that says something. `17. True` keeps its number: many such lines may be right."""
_SPACE = re.compile(r"\s+")


class Loop(NamedTuple):
    """A loop that was found."""

    reason: str
    """What repeats, in words with figures."""


def find_loop(text: str) -> Loop | None:
    """The loop in `text`, or None. Linear in the text's length."""
    letters = _letters(text)
    return _repeated_end(letters) or _repeated_share(letters)


def _letters(text: str) -> str:
    plain = _SPACE.sub(" ", _MARKER.sub("", text)).strip()
    return _WIDE_CHARACTER.sub(r"\g<0>\g<0>\g<0>", plain)


def _repeated_end(letters: str) -> Loop | None:
    """The shortest unit whose turns fill the end of the text."""
    backwards = letters[: -_WINDOW - 1 : -1]
    too_short = 0
    for period, again in enumerate(_matches(backwards)[: len(backwards) // 3 + 1]):
        run = period + again
        turns = 3 if run >= LONG_RUN else TURNS
        if period == 0 or run < max(RUN, turns * period) or (too_short and period % too_short == 0):
            continue
        unit = letters[len(letters) - period :]
        if run >= LONG_RUN or (period > 4 and any(c.isalnum() for c in unit)):
            return Loop(f"ends in {run // period} turns of {_short(_TRIPLED.sub(_ONCE, unit))}")
        too_short = period
    return None


def _matches(text: str) -> list[int]:
    """For every i, how many characters from i on equal the text's beginning (the Z function; 0 at i = 0).

    Gusfield, Algorithms on Strings, Trees and Sequences (1997), section 1.4.
    """
    size, found = len(text), [0] * len(text)
    left = right = 0
    for i in range(1, size):
        length = min(right - i, found[i - left]) if i < right else 0
        while i + length < size and text[length] == text[i + length]:
            length += 1
        found[i] = length
        if i + length > right:
            left, right = i, i + length
    return found


def _repeated_share(letters: str) -> Loop | None:
    """Whether most of the text had been said before. Pieces of more digits and signs than letters may
    repeat.
    """
    if len(letters) < TEXT:
        return None
    words = list(accumulate((c.isalpha() for c in letters), initial=0))
    count = len(letters) - PIECE + 1
    wordy = [letters[i : i + PIECE] for i in range(count) if 2 * (words[i + PIECE] - words[i]) >= PIECE]
    share = (len(wordy) - len(set(wordy))) / count
    return Loop(f"{share:.0%} of it repeats what it said before") if share >= SHARE else None


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
