"""The trainer: `transformers.Trainer` with our loss, our order, and the exact denominator.

What is ours: the loss is a sum of nats over supervised positions, divided by the number of supervised tokens of the
whole optimiser step over all micro-batches and processes; the batches come from a `Schedule`. Everything else (mixed
precision, schedules, saving, resuming, FSDP and DeepSpeed through accelerate) is the library's.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback

from limbeck.records import Example
from limbeck.render.batches import Batch, collate
from limbeck.signal.head import head_of, hidden_states
from limbeck.signal.types import Signal
from limbeck.train.fused import fused_loss
from limbeck.train.losses import LossSpec
from limbeck.train.schedule import Schedule

_COMPLETE = "complete"
"""A file put into a checkpoint when all of it is on the disk; a checkpoint without it was cut short."""


class SignalSource(Protocol):
    """Where a batch's teacher signal comes from: a store on disk, or a live teacher."""

    def take(self, example_ids: Sequence[str]) -> Signal:
        """The signal over the supervised positions of these examples, concatenated in order."""
        ...


class MicroBatches(Dataset[dict[str, Any]]):
    """One micro-batch an item, in the order of the schedule."""

    def __init__(self, examples: Sequence[Example], order: Sequence[Sequence[int]], pad_id: int):
        self._examples, self._order, self._pad_id = examples, order, pad_id

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = collate([self._examples[i] for i in self._order[index]], self._pad_id)
        return {"input_ids": batch.tokens_BT, "batch": batch}


class DistillationTrainer(Trainer):
    """Trains `model` on `examples` against the teacher's `source`, with `loss`, in the order of `schedule`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        examples: Sequence[Example],
        source: SignalSource,
        loss: LossSpec,
        temperature: float,
        schedule: Schedule,
        pad_id: int,
        **kwargs: Any,
    ):
        super().__init__(model=model, **kwargs)
        self._source, self._loss, self._temperature = source, loss, temperature
        processes = self.args.world_size
        self._micro = MicroBatches(examples, schedule.micro_batches(self.args.process_index, processes), pad_id)
        self._tokens_by_step = _running_tokens(examples, schedule)
        # Our compute_loss already divides by the tokens of the whole step.
        self.loss_is_scaled_for_ga = True
        self._since = time.monotonic()

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The micro-batches of this process. The schedule has cut them; accelerate must not cut them again."""
        return DataLoader(self._micro, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device):
        """The next micro-batches, and the supervised tokens of the whole step over all processes."""
        samples = [item for _, item in zip(range(num_batches), epoch_iterator, strict=False)]
        count = torch.tensor(sum(item["batch"].supervised for item in samples), device=device)
        if self.args.world_size > 1:
            count = cast("torch.Tensor", self.accelerator.gather(count.unsqueeze(0))).sum()
        return samples, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Nats a supervised token: the sum over this micro-batch, over the tokens of the whole step.

        Distributed wrappers average gradients over processes; the factor undoes that, since the denominator already
        counts every process's tokens.
        """
        batch = cast("Batch", inputs["batch"]).to(self.args.device)
        signal = self._source.take(batch.example_ids).to(self.args.device)
        bare = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            total = through_wrapper(model, bare, lambda: self._nats(bare, batch, signal))
        return total / cast("torch.Tensor", num_items_in_batch) * self.args.world_size

    def _nats(self, model: PreTrainedModel, batch: Batch, signal: Signal) -> torch.Tensor:
        # No attention mask: padding stands to the right, where causal attention never looks from a real token.
        hidden_BTD = hidden_states(model, batch.tokens_BT)
        head = head_of(model)
        return fused_loss(
            hidden_BTD[batch.predict_BT],
            head.weight,
            signal,
            loss=self._loss,
            temperature=self._temperature,
            head_bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the loss curve needs: supervised tokens seen so far, and seconds of training so far."""
        if "loss" in logs:
            now = time.monotonic()
            before = next((row["seconds"] for row in reversed(self.state.log_history) if "seconds" in row), 0.0)
            logs |= {
                "tokens": self._tokens_by_step[self.state.global_step - 1],
                "seconds": before + now - self._since,
            }
            self._since = now
        super().log(logs, start_time)


def through_wrapper(wrapped: torch.nn.Module, bare: torch.nn.Module, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Runs `work` as if it were `bare.forward`, through the distributed wrapper around it.

    DDP and FSDP do their work in the wrapper's call, so computing from the parts of the bare model would skip gradient
    synchronisation and parameter gathering.
    """
    if wrapped is bare:
        return work()
    forward = bare.forward
    bare.forward = lambda *_args, **_kwargs: work()  # type: ignore[method-assign]
    try:
        return wrapped()
    finally:
        bare.forward = forward  # type: ignore[method-assign]


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def _running_tokens(examples: Sequence[Example], schedule: Schedule) -> list[int]:
    total, running = 0, []
    for step in schedule.steps:
        total += sum(examples[i].supervised for micro in step for i in micro)
        running.append(total)
    return running


class SealCheckpoints(TrainerCallback):
    """Marks a checkpoint complete once all of it is on the disk, so that a kill while saving is seen."""

    def on_save(self, args, state, control, **kwargs):
        """Sync every file of the newest checkpoint, then put the mark in."""
        if not state.is_world_process_zero:
            return
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in directory.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        (directory / _COMPLETE).write_text(json.dumps({"step": state.global_step}), encoding="utf-8")


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint under `directory`; those that were cut short are removed."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in found if (path / _COMPLETE).is_file()]
    for path in set(found) - set(complete):
        shutil.rmtree(path)
    return complete[-1] if complete else None
