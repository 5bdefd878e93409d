"""The report's figures: inline SVG, the same bytes for the same numbers, with text that is text.

Colours and type come from the page: figures carry no font of their own, and no address, script or date.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from limbeck.export.evidence import Step
from limbeck.export.words import number
from limbeck.records import Score

INK, MUTED, RULE, ACCENT = "#1d2329", "#66707a", "#d8dde2", "#0f6b80"
POINTS = 400
"""Points a curve is drawn with at most; more steps are averaged in equal groups."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "limbeck", "font.size": 9.5, "axes.edgecolor": RULE,
    "axes.linewidth": 0.8, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "text.color": INK, "axes.spines.top": False, "axes.spines.right": False, "path.simplify": False,
}  # fmt: skip
_NOTHING = {"Creator": None, "Date": None, "Format": None, "Type": None}
_ROWS = (("before", "before training"), ("student", "student"), ("teacher", "teacher"))


class Scale(NamedTuple):
    """How one score is drawn: on an axis from 0, to a fixed end or the largest figure, or from 1 by powers
    of 10.
    """

    log: bool = False
    high: float | None = None


SCALES = {"agreement_top1": Scale(high=1.0), "perplexity_on_teacher": Scale(log=True)}


def loss_curve(steps: Sequence[Step], label: str) -> Markup | None:
    """Loss against supervised tokens seen: each step (or group of steps) faint, a running mean over it. None
    with fewer than two finite losses.
    """
    finite = [step for step in steps if np.isfinite(step.loss)]
    if len(finite) < 2:
        return None
    tokens, losses = (np.array([getattr(step, key) for step in finite], float) for key in ("tokens", "loss"))
    groups = np.array_split(np.arange(len(finite)), min(POINTS, len(finite)))
    x, y = (np.array([column[group].mean() for group in groups]) for column in (tokens, losses))
    mean = running_mean(y, max(1, len(y) // 30))
    with _drawing(6.6, 2.7) as (figure, axes):
        axes.plot(x, y, color=ACCENT, alpha=0.28, linewidth=0.9, gid="each")
        axes.plot(x, mean, color=ACCENT, linewidth=1.8, gid="mean")
        axes.set_xlabel("supervised tokens seen")
        axes.set_ylabel("nats a token")
        axes.set_ylim(min(0.0, float(y.min()) * 1.05), None)
        axes.set_xlim(0, None)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        figure.subplots_adjust(left=0.085, right=0.99, top=0.965, bottom=0.17)
        return _svg(figure, "loss", label)


def running_mean(values_N: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    """The mean of each value and its neighbours up to `half` away, as many on either side: near the ends
    fewer, so that the curve begins and ends where the values do.
    """
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    place_N = np.arange(len(values_N))
    reach_N = np.minimum(half, np.minimum(place_N, place_N[::-1]))
    return (sums[place_N + reach_N + 1] - sums[place_N - reach_N]) / (2 * reach_N + 1)


def score_dots(name: str, scores: Sequence[Score], label: str) -> Markup | None:
    """One score of the three subjects: a dot for the value, a whisker for the interval, the figure beside
    it. None where nothing was scored.
    """
    by_subject = {score.subject: score for score in scores if score.value is not None}
    if not by_subject:
        return None
    with _drawing(4.7, 1.2) as (figure, axes):
        for place, (subject, _) in enumerate(reversed(_ROWS)):
            _dot(axes, place, subject, by_subject.get(subject))
        axes.set_yticks(range(3), [row for _, row in reversed(_ROWS)])
        axes.set_ylim(-0.6, 2.6)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        _scale(axes, SCALES.get(name, Scale()), list(by_subject.values()))
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        figure.subplots_adjust(left=0.225, right=0.87, top=0.99, bottom=0.22)
        return _svg(figure, name, label)


def _dot(axes: Axes, place: int, subject: str, score: Score | None) -> None:
    right = (1.04, place)
    frame = axes.get_yaxis_transform()
    if score is None or score.value is None:
        axes.text(*right, "none", transform=frame, va="center", color=MUTED, clip_on=False)
        return
    colour = {"student": ACCENT, "teacher": INK}.get(subject, MUTED)
    if score.low is not None and score.high is not None:
        axes.plot([score.low, score.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="round")
    face = "white" if subject == "before" else colour
    axes.plot(
        [score.value],
        [place],
        "o",
        markersize=5.5,
        color=colour,
        markerfacecolor=face,
        clip_on=False,
        zorder=3,
    )
    weight = "bold" if subject == "student" else "normal"
    axes.text(*right, number(score.value), transform=frame, va="center", color=colour, weight=weight, clip_on=False)


def _scale(axes: Axes, scale: Scale, scores: Sequence[Score]) -> None:
    ends = [end for s in scores for end in (s.value, s.low, s.high) if end is not None]
    if scale.log:
        axes.set_xscale("log")
        axes.set_xlim(0.85, max(10.0, max(ends) * 1.3))
        axes.xaxis.set_major_locator(LogLocator(base=10, numticks=5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    high = max([1e-3, *ends]) if scale.high is None else scale.high
    # Room on both sides, so that a dot on the edge hides no word; ticks only where values can be.
    axes.set_xlim(-0.03 * high, 1.03 * high)
    axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, high) if 0 <= tick <= 1.03 * high])


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches, in the report's style and in nobody else's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an SVG element that fits into a page beside others: its own ids, the page's type, no
    addresses.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_NOTHING, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">") + 1 :].strip()
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"font-family: [^;\"]*(; )?", "", re.sub(r"\bfont: ([^;\"]*)", _font, body))
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(label)}">'
    return Markup(f"{head}{body}")


def _font(match: re.Match[str]) -> str:
    """Weight and size of CSS's short form, without its family."""
    size = re.search(r"[\d.]+px", match[1])
    weight = re.match(r"(bold|\d{3})\b", match[1])
    return f"font-size: {size[0] if size else 'inherit'}; font-weight: {weight[1] if weight else 'normal'}"
