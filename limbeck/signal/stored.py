"""The kinds of signal that are stored, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.signal.codec import Codec
from limbeck.signal.encoding import SampledArrays
from limbeck.signal.manifest import SignalKey
from limbeck.signal.sampled import SampledCodec
from limbeck.signal.top_k import TopKArrays, TopKCodec
from limbeck.signal.types import SampledSignal, SignalKind, TopKSignal

StoredArrays = SampledArrays | TopKArrays
StoredSignal = SampledSignal | TopKSignal

CODECS: Mapping[SignalKind, Callable[[SignalKey], Codec[Any, Any]]] = {
    "sampled": SampledCodec.of,
    "top_k": TopKCodec.of,
}


def codec_of(key: SignalKey) -> Codec[Any, Any]:
    """The codec of a store with this key. `Any` stands for the arrays and the signal of its kind."""
    return CODECS[key.kind](key)
