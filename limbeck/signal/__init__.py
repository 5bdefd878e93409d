"""What a teacher says about each supervised position, as typed signals, and how they are made and stored.

types       the five signals and what may be done with any of them
sampling    threshold sampling and top-k, from a distribution to a signal
encoding    a sampled signal as arrays of small numbers
packing     the arrays as compressed blocks
head        from hidden states to logits by the model's own way
manifest    what a store was made from
store       signals on disk: sharded, checked, resumable
annotate    the stage: RUN/examples to RUN/signals
audit       a store held against a fresh teacher
"""

from limbeck.signal.sampling import from_logits, threshold_sample, topk_signal
from limbeck.signal.types import (
    DenseSignal,
    HiddenSignal,
    SampledSignal,
    Signal,
    SignalKind,
    TextSignal,
    TopKSignal,
    concat,
)

__all__ = [
    "DenseSignal",
    "HiddenSignal",
    "SampledSignal",
    "Signal",
    "SignalKind",
    "TextSignal",
    "TopKSignal",
    "concat",
    "from_logits",
    "threshold_sample",
    "topk_signal",
]
