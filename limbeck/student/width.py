"""The width of a model's layers: their attention heads and MLP neurons, and whether some of them can go.

Known are decoder layers of Llama's pattern, which most models of transformers follow: attention by q_proj,
k_proj, v_proj and o_proj, biased or not, norms over head_dim where there are any; an MLP of up_proj and down_proj, and
mostly a gate_proj. Every layer keeps as many heads and neurons as the others, so that `num_attention_heads`,
`num_key_value_heads` and `intermediate_size` in the configuration describe the student; `head_dim` is written
out, for heads x head_dim is no longer the hidden size.

Under grouped-query attention (Ainslie et al., arXiv 2305.13245) the attention heads, those of the queries, come in
groups, and each group shares one key-value head. A head that goes leaves its key-value head to the rest of its
group; a key-value head goes with its whole group; and all groups that stay are of one size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.student.layers import stack_of

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("up_proj", "down_proj")
_REMEDY = "leave this width out of student and remove layers instead, or use student: {kind: pretrained, ...}"


class Heads(NamedTuple):
    """The attention heads of a layer."""

    attention: int
    """Attention heads, those of the queries."""
    key_value: int
    """Key-value heads; each serves attention / key_value attention heads in a row."""
    dim: int
    """Width of a head."""

    @property
    def group(self) -> int:
        """Attention heads to a key-value head."""
        return self.attention // self.key_value


class Width(NamedTuple):
    """What every layer has, or keeps. None is what this part of the model is not asked about."""

    heads: Heads | None
    neurons: int | None


class Kept(NamedTuple):
    """The heads and neurons that a layer keeps, counted from 0 and rising; None is all of them."""

    attention_heads: tuple[int, ...] | None
    key_value_heads: tuple[int, ...] | None
    neurons: tuple[int, ...] | None


def heads_of(config: PreTrainedConfig) -> Heads | None:
    """The heads that a configuration gives every layer, or None where it does not say so in Llama's words."""
    text = config.get_text_config()
    heads, groups = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if not isinstance(heads, int) or not isinstance(groups, int) or not groups or heads % groups:
        return None
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Heads(heads, groups, dim) if isinstance(dim, int) else None


def neurons_of(config: PreTrainedConfig) -> int | None:
    """The MLP neurons that a configuration gives every layer, or None where it does not say."""
    neurons = getattr(config.get_text_config(), "intermediate_size", None)
    return neurons if isinstance(neurons, int) else None


def attention_of(model: PreTrainedModel) -> list[Any]:
    """The attention module of each layer.

    Raises:
        ModelError: a layer whose heads cannot be told apart.

    """
    heads = heads_of(model.config)
    if heads is None:
        found = _said(model.config, "num_attention_heads", "num_key_value_heads", "head_dim")
        raise unfit(
            model, "attention heads", [found], "one number of heads for all layers, a multiple of the key-value heads"
        )
    wide, narrow = heads.attention * heads.dim, heads.key_value * heads.dim
    rows = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
    return _modules(model, "attention heads", _ATTENTION, rows, {"o_proj": wide}, heads.dim)


def mlps_of(model: PreTrainedModel) -> list[Any]:
    """The MLP of each layer.

    Raises:
        ModelError: a layer whose neurons cannot be told apart.

    """
    neurons = neurons_of(model.config)
    if neurons is None:
        raise unfit(
            model, "neurons", [_said(model.config, "intermediate_size")], "one intermediate_size for all layers"
        )
    return _modules(model, "neurons", _MLP, {"gate_proj": neurons, "up_proj": neurons}, {"down_proj": neurons}, None)


def check_width(model: PreTrainedModel, width: Width) -> None:
    """Whether a model can have this width; its weights are not read, so it may be on torch's meta device.

    Raises:
        ModelError: its heads or neurons cannot be told apart, or its class does not take the width from its
            configuration. All that is wrong, in one error.

    """
    problems: list[Problem] = []
    for wanted, find in ((width.heads, attention_of), (width.neurons, mlps_of)):
        if wanted is not None:
            try:
                find(model)
            except ModelError as error:
                problems += error.problems
    if problems:
        raise ModelError("the teacher's layers cannot be made narrower", problems)
    made = _made(model, narrowed(model.config, width))
    for wanted, find in ((width.heads, attention_of), (width.neurons, mlps_of)):
        if wanted is not None:
            find(made)


def _made(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, as the configuration will make it when it is loaded again."""
    try:
        read = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return type(model)._from_config(read)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        # transformers has no error of its own for numbers that a class cannot have.
        found = " ".join(str(error).split())
        expected = (
            "numbers that transformers loads; for Llama, a number of attention heads that divides the hidden size"
        )
        raise unfit(model, "heads or neurons", [found], expected, f"set another number, or {_REMEDY}") from error


def narrowed(config: PreTrainedConfig, width: Width) -> PreTrainedConfig:
    """A copy of a configuration that says this width."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    if width.heads is not None:
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = width.heads
    if width.neurons is not None:
        text.intermediate_size = width.neurons
    return made


def _modules(
    model: PreTrainedModel,
    what: str,
    names: tuple[str, ...],
    rows: dict[str, int],
    columns: dict[str, int],
    norm: int | None,
) -> list[Any]:
    """The one module of each layer that has linear maps of these names and sizes, and beside them nothing that
    a cut would change: numbers, and weights over one head (`norm` wide).
    """
    found, problems = [], []
    for layer in stack_of(model).layers:
        fitting = [m for m in layer.modules() if {*names} <= {name for name, _ in m.named_children()}]
        if len(fitting) != 1:
            inside = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n, m in layer.named_modules() if _is_leaf(m)))
            problems.append(
                f"{len(fitting)} modules with {', '.join(names)} in {type(layer).__name__}, which has {inside}"
            )
            continue
        problems += _misfits(fitting[0], rows, columns, norm)
        found.append(fitting[0])
    if problems:
        expected = f"one module with {', '.join(names)} in each layer, and no other weights that depend on the {what}"
        raise unfit(model, what, problems, expected)
    return found


def _misfits(module: nn.Module, rows: dict[str, int], columns: dict[str, int], norm: int | None) -> Iterator[str]:
    """What keeps the linear maps of these names from being cut, and other weights that would have to be."""
    kind = type(module).__name__
    for name, part in module.named_children():
        if name not in rows.keys() | columns.keys():
            continue
        if type(part) is not nn.Linear:
            yield f"{kind}.{name} is a {type(part).__name__}, not a Linear"
        elif (rows.get(name), columns.get(name)) not in (
            (part.weight.shape[0], None), (None, part.weight.shape[1])
        ):  # fmt: skip
            size = f"{rows[name]} rows" if name in rows else f"{columns[name]} columns"
            yield f"{kind}.{name} is {_shape(part.weight)}, not of the {size} that its configuration says"
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        own = name.partition(".")[0] in rows.keys() | columns.keys()
        if not own and weight.numel() != 1 and tuple(weight.shape) != (norm,):
            yield f"{kind}.{name}, {_shape(weight)}"


def _shape(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape))


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _said(config: PreTrainedConfig, *names: str) -> str:
    text = config.get_text_config()
    return ", ".join(f"{name}: {getattr(text, name, 'not there')}" for name in names)


def unfit(model: PreTrainedModel, what: str, found: Sequence[str], expected: str, remedy: str = _REMEDY) -> ModelError:
    """The error for a model whose heads or neurons, `what`, cannot be cut; `found` says why, each reason once."""
    told = "; ".join(dict.fromkeys(found))
    problem = Problem(f"{type(model).__name__}, {what}", told, expected, remedy)
    return ModelError("the teacher's layers cannot be made narrower", [problem])
