"""Several processes that train one student together: `torchrun --nproc-per-node 2 -m limbeck run RECIPE --out RUN`.

All are started with the same command. The first (rank 0) does every stage, holds RUN and writes the ledger. The others
wait until it comes to a stage that all take part in, do that, and wait again, until they may leave. If one fails, the
launcher ends them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""How long the others wait. Collecting may take days; a process that fails is noticed by the launcher, not by this."""


def rank() -> int:
    """The number of this process; 0 for the first, and where there is only one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process writes what all of them make."""
    return rank() == 0


def follow(work: Callable[[], object]) -> None:
    """What all but the first do: take part in `work` each time the first calls for it, until it dismisses them."""
    while share(None):
        work()


def call() -> None:
    """The first process calls the others to work."""
    share(True)


def dismiss() -> None:
    """The first process lets the others go."""
    share(False)


def share(value: T) -> T:
    """The first process's value, in every process. Each waits here until all have come."""
    if count() == 1:
        return value
    import torch.distributed

    _join()
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def collect(value: T) -> list[T]:
    """Every process's value, in every process, in the order of their numbers."""
    if count() == 1:
        return [value]
    import torch.distributed

    _join()
    held: list[T | None] = [None] * count()
    torch.distributed.all_gather_object(held, value)
    return held  # pyright: ignore[reportReturnType]


def _join() -> None:
    import torch
    import torch.distributed

    if not torch.distributed.is_initialized():
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Objects travel by gloo, tensors on a GPU by NCCL.
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
