"""What a teacher says about each supervised position, as typed signals, and how they are made and stored.

types       the five signals and what may be done with any of them
sampling    threshold sampling and top-k, from a distribution to a signal
codec       what a kind of signal must say to be stored
planes      numbers as compressed planes of bytes
encoding    a sampled signal as arrays of small numbers
packing     the arrays as compressed blocks
sampled     both as a codec
top_k       the codec of a top-k signal
stored      the kinds that are stored, by name
head        from hidden states to logits by the model's own way
manifest    what a store was made from
store       signals on disk: sharded, checked, resumable
endpoint    asking a completions server, with retries
answers     what a server answered, as a top-k signal
served      signals of a teacher that a server runs
told        signals out of log-probabilities that came with the answers
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
