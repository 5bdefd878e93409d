"""The learning rate of every optimiser step."""

from __future__ import annotations

import math


def share_of_peak(step: int, *, schedule: str, warmup: int, steps: int) -> float:
    """The learning rate of step `step`, counted from 0, as a share of the highest, in a training of `steps` steps.

    The rate would be 0 one step before the first, rises evenly to the highest at step `warmup`, and falls from there so
    that it would be 0 one step after the last: along a line, along half a cosine, or not at all. So every step learns.
    Where the warm-up would take all steps or more, the last step has the highest rate.

    From step `warmup` on this is transformers' schedule of the same name. Before, transformers has step / warmup, which
    is 0 at the first step (docs/decisions.md).

    Raises:
        ValueError: `schedule` is not linear, cosine or constant.
    """
    warmup = min(warmup, steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = (steps - step) / (steps - warmup)
    match schedule:
        case "linear":
            return left
        case "cosine":
            return math.sin(math.pi / 2 * left) ** 2  # (1 + cos(pi (1 - left))) / 2, without its cancellation
        case "constant":
            return 1.0
    raise ValueError(f"schedule: {schedule}, expected linear, cosine or constant")
