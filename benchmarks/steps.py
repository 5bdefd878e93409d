"""What both sides share while they train: the arguments, the order, the clock, and what is said of a run.

Needs transformers, and works on both sides.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

BATCH = 8
"""Sequences a step."""


def arguments(output_dir: str, *, steps: int, learning_rate: float, seed: int) -> dict[str, object]:
    """The same for every trainer: AdamW on float32 weights, products in bf16, a cosine after a warm-up."""
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


def write_order(path: Path, steps: list[list[int]]) -> None:
    """The chats of every step, by their numbers in chats.jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"steps": steps}) + "\n", encoding="utf-8")


def read_order(path: Path) -> list[list[int]]:
    """What `write_order` wrote. Raises ValueError for a step of another size than BATCH: TRL cuts a list into such."""
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    sizes = {len(step) for step in steps}
    if sizes != {BATCH}:
        raise ValueError(
            f"{path}: steps of {sorted(sizes)} chats, expected {BATCH} in each; a multiple of it in --chats"
        )
    return steps


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over all weights, with their names and types, in the order of the names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings(trainer: Trainer, beginning: str) -> dict[str, object]:
    """What a training was really done with, read from the trainer after it: for the sides to be compared in."""
    model = cast("PreTrainedModel", trainer.model)
    optimizer = cast("torch.optim.Optimizer", getattr(trainer.optimizer, "optimizer", trainer.optimizer))
    groups = optimizer.param_groups
    dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    return {
        "beginning": beginning,
        "optimizer": type(optimizer).__name__,
        "betas": sorted({tuple(g["betas"]) for g in groups}),
        "eps": sorted({g["eps"] for g in groups}),
        "weight_decay": sorted({g["weight_decay"] for g in groups}),
        "weights": sum(w.numel() for g in groups for w in g["params"]),
        "weights_in": sorted({str(w.dtype) for g in groups for w in g["params"]}),
        "max_grad_norm": trainer.args.max_grad_norm,
        "dropout": max([getattr(model.config, "attention_dropout", 0.0), *dropouts]),
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
        "gradient_norms": [row["grad_norm"] for row in history if "grad_norm" in row],
        "learning_rates": [row["learning_rate"] for row in history if "loss" in row],
    }
