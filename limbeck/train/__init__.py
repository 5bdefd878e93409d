"""From examples and signals to a student: losses, the fused loss, and the trainer.

losses      divergences as pure functions, and which signals each can use without bias
pairing     a loss against a signal, in its plain form
kernels     value and gradient for a block of rows
fused       the loss from hidden states and head, a chunk of positions at a time
schedule    which examples every step sees, settled beforehand
rates       the learning rate of every step
rollouts    the answers that the student writes while it learns
adapter     a low-rank adapter in place of the student's own weights
feed        from the schedule to the forward passes of each step
sources     where the teacher's signal comes from: a store, or a live teacher
trainer     transformers.Trainer with our loss, our feed, and the exact denominator
stage       RUN/beginning, examples and signals to RUN/student
"""

from importlib import import_module


def __getattr__(name: str) -> object:
    """Modules are imported when they are first used, so that the losses need no transformers."""
    if name in (
        "losses",
        "pairing",
        "kernels",
        "fused",
        "schedule",
        "rates",
        "rollouts",
        "adapter",
        "feed",
        "sources",
        "trainer",
        "stage",
    ):
        return import_module(f"limbeck.train.{name}")
    raise AttributeError(f"module 'limbeck.train' has no attribute {name!r}")
