"""The decoder layers of a model: where they are, and the model with only some of them.

Measuring and pruning go through one function, `only`, so what was measured is what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.signal.head import body_of


class Stack(NamedTuple):
    """The list of decoder layers and the module that owns it."""

    owner: nn.Module
    name: str
    """Attribute of `owner` that holds the list."""
    layers: nn.ModuleList
    config: PreTrainedConfig
    """The configuration that counts the layers: the model's, or its text part's."""


def stack_of(model: PreTrainedModel) -> Stack:
    """Find the decoder layers: the only module list as long as the configuration says there are layers.

    Raises:
        ModelError: there is no such list or more than one, or later layers reuse what earlier ones computed.

    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    found = list(_lists(body_of(model), count))
    if len(found) != 1:
        raise ModelError(
            "the model's layers cannot be told apart, so none can be removed",
            [
                Problem(
                    type(model).__name__,
                    ", ".join(f"{type(o).__name__}.{n}" for o, n, _ in found) or "no list of layers",
                    f"one list of {count} layers",
                    "use student: {kind: pretrained, ...}",
                ),
            ],
        )
    if shared := getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            "the model's layers lean on one another, so none can be removed",
            [
                Problem(
                    f"{type(config).__name__}.num_kv_shared_layers",
                    str(shared),
                    "0: every layer with its own keys and values",
                    "use student: {kind: pretrained, ...}",
                ),
            ],
        )
    return Stack(*found[0], config)


def _lists(module: nn.Module, count: int) -> Iterator[tuple[nn.Module, str, nn.ModuleList]]:
    """The outermost module lists of that length (an expert list inside a layer is not one)."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield module, name, child
        else:
            yield from _lists(child, count)


@contextmanager
def only(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """While the block runs, `model` has only the layers `kept` (indices from 0, rising), and its
    configuration says so.

    Lists in the configuration with a value for each layer (`layer_types` and its like) are cut to match, and
    attention modules are renumbered, so that saving, generating with a cache and calling the model all agree.
    """
    stack = stack_of(model)
    with _replaced(stack, [stack.layers[i] for i in kept], kept):
        yield


@contextmanager
def after(model: PreTrainedModel, kept: Sequence[int], output: Any) -> Iterator[None]:
    """Like `only`, but the layers come after one that computes nothing and returns `output`, a captured
    layer output.

    The forward then starts in the middle: its tokens matter for shapes and masks only.
    """
    stack = stack_of(model)
    # The stand-in takes the configuration's values of layer 0; no layer's own values depend on it.
    with _replaced(stack, [_Fixed(output), *(stack.layers[i] for i in kept)], [0, *kept]):
        yield


class _Fixed(nn.Module):
    """A layer that returns what an earlier pass computed."""

    def __init__(self, output: Any):
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._output


@contextmanager
def _replaced(stack: Stack, layers: Sequence[nn.Module], kept: Sequence[int]) -> Iterator[None]:
    config, count = stack.config, len(stack.layers)
    lists = {name: value for name, value in vars(config).items() if _is_per_layer(name, value, count)}
    numbered = [
        (module, module.layer_idx) for layer in layers for module in layer.modules() if hasattr(module, "layer_idx")
    ]
    try:
        setattr(stack.owner, stack.name, nn.ModuleList(layers))
        config.num_hidden_layers = len(layers)
        for name, value in lists.items():
            setattr(config, name, [value[i] for i in kept])
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index  # type: ignore[assignment]
        yield
    finally:
        setattr(stack.owner, stack.name, stack.layers)
        config.num_hidden_layers = count
        for name, value in lists.items():
            setattr(config, name, value)
        for module, index in numbered:
            module.layer_idx = index


def _is_per_layer(name: str, value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and ("layer" in name or "block" in name)


def hidden_of(output: Any) -> Tensor:
    """The hidden states, [B, T, D], in what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output
