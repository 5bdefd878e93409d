"""The trainer: `transformers.Trainer` with our loss, our order, and the exact denominator.

What is ours: the loss is a sum of nats over supervised positions, divided by the number of supervised tokens of the
whole optimiser step over all micro-batches and processes; what is learned from comes from a `Feed`; no step has a
learning rate of 0. Everything else (mixed precision, saving, resuming, FSDP and DeepSpeed through accelerate) is the
library's.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType

from limbeck import ranks
from limbeck.models import amx
from limbeck.models.amx.linear import float32_gradients
from limbeck.models.attention import fast_attention
from limbeck.models.compiling import on_cpu
from limbeck.models.gated import fused_gates
from limbeck.models.layers import fused_layers
from limbeck.models.products import joined_once
from limbeck.models.stream import narrow_stream
from limbeck.render.batches import Batch
from limbeck.signal.head import head_of, hidden_states
from limbeck.signal.types import TextSignal, concat
from limbeck.train.adapter import inner
from limbeck.train.feed import Feed, MicroBatch
from limbeck.train.fused import fused_loss
from limbeck.train.losses import LossSpec, terms_of
from limbeck.train.rates import share_of_peak
from limbeck.train.sources import LiveTeacher, SignalSource
from limbeck.train.workspace import kept_buffers

_COMPLETE = "complete"
"""A file put into a checkpoint when all of it is on the disk; a checkpoint without it was cut short."""


class DistillationTrainer(Trainer):
    """Trains `model` on what `feed` brings against the teacher's `source`, with `loss`.

    Learning rates are those of `rates.share_of_peak`, by the schedule, warm-up and highest rate in `args`. With
    `library_rates` they are transformers' own: for a comparison, step by step, with a trainer that has no others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        feed: Feed,
        source: SignalSource,
        loss: LossSpec,
        temperature: float,
        allow_biased: bool = False,
        library_rates: bool = False,
        **kwargs: Any,
    ):
        # The head is proved in parts now: later the model's own forward is ours, and autocast rounds its products.
        head_of(inner(model))
        super().__init__(model=model, **kwargs)
        self._feed, self._source = feed, source
        self._loss, self._temperature, self._allow_biased = loss, temperature, allow_biased
        self._library_rates = library_rates
        self._on_text = any(term.on == "text" for term in terms_of(loss))
        # Our compute_loss already divides by the tokens of the whole step.
        self.loss_is_scaled_for_ga = True
        self._since, self._tokens = time.monotonic(), 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, with attention that is fast on a CPU, and under bf16 with all that flows between the
        layers in it. In the backward pass too, which may compute layers again.
        """
        model = cast("PreTrainedModel", self.model)
        narrow = torch.bfloat16 if self.args.bf16 else None
        with (
            on_cpu(self._feed.tokens),
            amx.for_training(self._feed.tokens if self.args.bf16 else 0),
            fast_attention(model),
            fused_layers(inner(model), narrow),
            narrow_stream(inner(model), narrow),
            fused_gates(model),
            float32_gradients(model),
            self._source.running() if isinstance(self._source, LiveTeacher) else nullcontext(),
            kept_buffers(),
        ):
            return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As the library's, with rates that are above 0 at every step.

        Raises:
            ValueError: a schedule that `rates.share_of_peak` does not have.
        """
        if self.lr_scheduler is None and not self._library_rates:
            share = partial(
                share_of_peak,
                schedule=SchedulerType(self.args.lr_scheduler_type).value,
                warmup=self.args.get_warmup_steps(num_training_steps),
                steps=num_training_steps,
            )
            self.lr_scheduler = LambdaLR(optimizer or cast("torch.optim.Optimizer", self.optimizer), share)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The micro-batches of this process. The schedule has cut them; accelerate must not cut them again."""
        return DataLoader(self._feed, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device):
        """The next micro-batches, and the supervised tokens of the whole step over all processes.

        They are counted after the student has written its answers, where it writes any.
        """
        samples = [item for _, item in zip(range(num_batches), epoch_iterator, strict=False)]
        count = torch.tensor(sum(item["micro_batch"].supervised for item in samples), device=device)
        if self.args.world_size > 1:
            count = cast("torch.Tensor", self.accelerator.gather(count.unsqueeze(0))).sum()
        self._tokens = int(count)
        return samples, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Nats a supervised token: the sum over this micro-batch, over the tokens of the whole step.

        Distributed wrappers average gradients over processes; the factor undoes that, since the denominator already
        counts every process's tokens. It goes into the loss as a weight of each position, so that the gradient needs no
        pass over the head to be scaled.
        """
        passes = cast("MicroBatch", inputs["micro_batch"]).passes
        bare = self.accelerator.unwrap_model(model)
        weight = self.args.world_size / int(cast("torch.Tensor", num_items_in_batch))

        def nats() -> torch.Tensor:
            # One call of the wrapper for all passes: it synchronises gradients once a call.
            return self._nats(inner(bare), passes, weight)

        with self.accelerator.autocast(), joined_once():
            return through_wrapper(model, bare, nats)

    def _nats(self, model: PreTrainedModel, passes: Sequence[Batch], weight: float) -> torch.Tensor:
        """One loss over what all passes predict: the head's weights are made ready, and its gradient added up, once."""
        hidden, signals, targets = [], [], []
        for batch in passes:
            # Where the supervised positions are is asked of the batch as it comes from the host: a GPU would have to
            # finish all that is queued before it could say how many there are.
            predict_N = batch.predict_BT.flatten().nonzero()[:, 0].to(self.args.device)
            there = batch.to(self.args.device)
            signals.append(self._source.take(there).to(there.tokens_BT.device))
            hidden_BTD = hidden_states(model, there.tokens_BT, position_ids_BT=there.positions_BT)
            hidden.append(hidden_BTD.flatten(0, 1).index_select(0, predict_N))
            targets.append(there.targets_N)
        head, signal = head_of(model), concat(signals)
        hidden_ND = torch.cat(hidden)
        return fused_loss(
            hidden_ND,
            head.weight,
            [signal, TextSignal(torch.cat(targets), signal.vocab_size)] if self._on_text else signal,
            loss=self._loss,
            temperature=self._temperature,
            head_bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            weights=torch.full((len(hidden_ND),), weight, device=hidden_ND.device),
            allow_biased=self._allow_biased,
        )

    def _clip_grad_norm(self, model):
        """As the library's. Where the optimiser can, it scales gradients while it reads them for its step, which spares
        two passes over all of them; the norm that is returned is the one before.
        """
        scaled = self._scaling_optimizer()
        if scaled is None:
            return super()._clip_grad_norm(model)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # clip_grad_norm_ multiplies by max_norm / (norm + 1e-6) where that is below 1; the optimiser divides.
        scaled.grad_scale = ((norm + 1e-6) / self.args.max_grad_norm).clamp_(min=1.0)
        return norm

    def _scaling_optimizer(self) -> Any:
        """The optimiser, if it takes a scale of gradients along (torch's fused ones) and one CPU has all of them."""
        found = getattr(self.optimizer, "optimizer", self.optimizer)
        alone = self.args.world_size == 1 and self.args.device.type == "cpu" and not self.is_fsdp_enabled
        fused = type(found) is torch.optim.AdamW and found.defaults.get("fused")
        return found if alone and fused else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the loss curve needs: supervised tokens seen so far, and seconds of training so far."""
        if "loss" in logs:
            now = time.monotonic()
            last = next((row for row in reversed(self.state.log_history) if "seconds" in row), {})
            logs |= {
                "tokens": last.get("tokens", 0) + self._tokens,
                "seconds": last.get("seconds", 0.0) + now - self._since,
            }
            self._since = now
        super().log(logs, start_time)


def through_wrapper(wrapped: torch.nn.Module, bare: torch.nn.Module, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Runs `work` as if it were `bare.forward`, through the distributed wrapper around it.

    DDP and FSDP do their work in the wrapper's call, FSDP2 in hooks around the model's own, so computing from the parts
    of the bare model would skip gradient synchronisation and parameter gathering.
    """
    forward = bare.__dict__.get("forward")
    bare.forward = lambda *_args, **_kwargs: work()  # type: ignore[method-assign]
    try:
        return wrapped()
    finally:
        if forward is None:
            del bare.forward
        else:
            bare.forward = forward  # type: ignore[method-assign]


def _only(items: list[MicroBatch]) -> dict[str, Any]:
    """A micro-batch in the dictionary that the library asks for; it counts tokens by `input_ids`."""
    return {"input_ids": items[0].passes[0].tokens_BT, "micro_batch": items[0]}


class SealCheckpoints(TrainerCallback):
    """Marks a checkpoint complete once all of it is on the disk, so that a kill while saving is seen."""

    def on_save(self, args, state, control, **kwargs):
        """Sync every file of the newest checkpoint, then put the mark in."""
        ranks.collect(None)  # every process writes a part of it
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
