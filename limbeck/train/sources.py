"""Where a batch's teacher signal comes from: a store on disk, or a teacher that runs beside the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import PreTrainedModel

from limbeck.models.inference import fast_reading
from limbeck.render.batches import Batch
from limbeck.signal.head import Head, head_of, hidden_states
from limbeck.signal.store import SignalStore
from limbeck.signal.types import HiddenSignal, Signal


class SignalSource(Protocol):
    """What the trainer asks at every step."""

    def take(self, batch: Batch) -> Signal:
        """The signal over the supervised positions of the batch, in the order of its `targets_N`."""
        ...


class Stored:
    """A store on disk, by the ids of the examples. It knows nothing of what the student writes."""

    def __init__(self, store: SignalStore):
        self._store = store

    def take(self, batch: Batch) -> Signal:
        """The stored signal. Raises `InputError` for an example that the store does not hold."""
        return self._store.take(batch.example_ids)


class LiveTeacher:
    """A teacher in memory: its last hidden states and its head, for whatever was written.

    Exact, and of the size of the hidden states: the teacher's logits are made inside the loss, a chunk at a time. The
    model is put in evaluation mode and asked without gradient, so equal batches have equal signals.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        self._model, self._vocab_size = model.eval(), vocab_size
        head = head_of(model)
        # Made once: signals of several passes are of one teacher where their heads are the same tensor.
        self._head = Head(
            head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, the teacher computes as `models.inference.fast_reading` has it."""
        with fast_reading(self._model):
            yield

    @torch.no_grad()
    def take(self, batch: Batch) -> HiddenSignal:
        """The signal over the first `vocab_size` ids, on the teacher's device."""
        device = self._model.device
        there = batch.to(device)
        with torch.autocast(device.type, enabled=False):
            hidden_BTD = hidden_states(self._model, there.tokens_BT, position_ids_BT=there.positions_BT)
        head = self._head
        return HiddenSignal(
            hidden_BTD[there.predict_BT],
            head.weight,
            self._vocab_size,
            head.bias,
            head.scale,
            head.softcap,
        )
