"""What both sides share while they train: the arguments, and the clock. Needs transformers, and works on both sides."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from transformers import TrainerCallback

BATCH = 8
"""Sequences a step."""


def arguments(output_dir: str, *, steps: int, learning_rate: float, seed: int) -> dict[str, object]:
    """The same for every trainer: AdamW on float32 weights, products in bf16, cosine to 0 after a warm-up."""
    return {
        "output_dir": output_dir,
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(0.05 * steps),
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": True,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


@dataclass
class Counts:
    """Of one step each, in tokens. Padding is never counted."""

    tokens: list[int] = field(default_factory=list)
    """Of the sequences trained on, prompt and completion."""
    supervised: list[int] = field(default_factory=list)
    """Those the loss is over; where the student writes, the ones it wrote."""


class StepClock(TrainerCallback):
    """Seconds of every optimiser step, with everything that happens from the end of the one before it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """The first step begins."""
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """A step ends and the next begins."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


def figures(clock: StepClock, counts: Counts, history: list[dict[str, float]], skip: int) -> dict[str, object]:
    """A run's figures. The first `skip` steps, in which kernels are chosen and moments made, are left out of rates."""
    skip = min(skip, len(clock.seconds) - 1)
    seconds = sum(clock.seconds[skip:])
    tokens, supervised = sum(counts.tokens[skip:]), sum(counts.supervised[skip:])
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_per_second": supervised / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "supervised": supervised,
        "steps_timed": len(clock.seconds) - skip,
        "step_seconds": clock.seconds,
        "step_tokens": counts.tokens,
        "step_supervised": counts.supervised,
        "losses": [row["loss"] for row in history if "loss" in row],
    }
