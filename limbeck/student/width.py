"""The width of a model's layers: their attention heads and MLP neurons, and the model with only some of them.

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
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from limbeck.errors import ModelError, Problem
from limbeck.student.layers import stack_of
from limbeck.student.saving import quiet

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("up_proj", "down_proj")
_PROBE = 16
"""Tokens that a narrow model is compared on with the whole one."""
_TOLERANCE = {True: 1e-3, False: 0.1}
"""Largest mean difference of their logits, in standard deviations, by whether they compute in float32: narrower
products are rounded otherwise."""
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
        raise _unfit(
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
        raise _unfit(
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
    config = narrowed(model.config, width)
    try:
        with torch.device("meta"):
            made = type(model)._from_config(config)
    except (ValueError, TypeError, RuntimeError) as error:
        # transformers has no error of its own for numbers that a class cannot have.
        raise _unfit(model, "heads or neurons", [str(error)], "a class that can have this width") from error
    for wanted, find in ((width.heads, attention_of), (width.neurons, mlps_of)):
        if wanted is not None:
            find(made)


def narrowed(config: PreTrainedConfig, width: Width) -> PreTrainedConfig:
    """A copy of a configuration that says this width."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    if width.heads is not None:
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = width.heads
    if width.neurons is not None:
        text.intermediate_size = width.neurons
    return made


def narrow(model: PreTrainedModel, width: Width, kept: Sequence[Kept]) -> PreTrainedModel:
    """A model with only these heads and neurons in its layers, their weights bit for bit; what is not cut may
    share its memory with `model`, which stays as it is.

    Raises:
        ModelError: what `check_width` raises, or weights that do not fit the model made from the configuration.

    """
    config = narrowed(model.config, width)
    with quiet():
        both: Any = type(model).from_pretrained(
            None, config=config, state_dict=_cut(model, width, kept), dtype=model.dtype, output_loading_info=True
        )  # fmt: skip
    made, told = both
    wrong = {*told["missing_keys"], *told["unexpected_keys"], *(str(m[0]) for m in told["mismatched_keys"])}
    if wrong:
        found = f"{len(wrong)} weights that do not fit its configuration: {', '.join(sorted(map(str, wrong))[:4])}"
        raise _unfit(model, "heads or neurons", [found], "the weights that its configuration speaks of")
    made.generation_config = copy.deepcopy(model.generation_config)
    made.to(model.device).requires_grad_(False).eval()
    _prove(model, made, kept)
    return made


def _cut(model: PreTrainedModel, width: Width, kept: Sequence[Kept]) -> dict[str, Tensor]:
    """The model's weights, by name, those of heads and neurons that go left out."""
    names = {id(module): name for name, module in model.named_modules()}
    weights: dict[str, Tensor] = dict(model.state_dict())

    def select(module: nn.Module, dim: int, which: Tensor) -> None:
        for name in ("weight", "bias"):
            key = f"{names[id(module)]}.{name}"
            if key in weights and weights[key].dim() > dim:
                weights[key] = weights[key].index_select(dim, which.to(weights[key].device)).contiguous()

    if width.heads is not None:
        for attention, layer in zip(attention_of(model), kept, strict=True):
            queries, pairs = (_rows(some, width.heads.dim) for some in (layer.attention_heads, layer.key_value_heads))
            select(attention.q_proj, 0, queries)
            select(attention.k_proj, 0, pairs)
            select(attention.v_proj, 0, pairs)
            select(attention.o_proj, 1, queries)
    if width.neurons is not None:
        for mlp, layer in zip(mlps_of(model), kept, strict=True):
            neurons = torch.tensor(layer.neurons)
            for map_ in (mlp.up_proj, getattr(mlp, "gate_proj", None)):
                if map_ is not None:
                    select(map_, 0, neurons)
            select(mlp.down_proj, 1, neurons)
    return weights


def _prove(model: PreTrainedModel, made: PreTrainedModel, kept: Sequence[Kept]) -> None:
    """Compare the narrow model with the whole one in which what goes is silenced, which has to say the same: a
    class whose arithmetic depends on its width in another way would be another model.
    """
    config = model.config.get_text_config()
    tokens_1T = torch.arange(_PROBE, device=model.device)[None] % config.vocab_size
    handles = _silence(model, kept)
    try:
        with torch.inference_mode():
            silenced, narrow_ = (m(input_ids=tokens_1T, use_cache=False).logits.double() for m in (model, made))
    finally:
        for handle in handles:
            handle.remove()
    difference = float((silenced - narrow_).abs().mean() / silenced.std())
    if not difference < _TOLERANCE[model.dtype == torch.float32]:
        found = f"logits that differ by {difference:.2g} standard deviations from the model's with the rest silenced"
        raise _unfit(model, "heads or neurons", [found], "the same logits")


def _silence(model: PreTrainedModel, kept: Sequence[Kept]) -> list[Any]:
    """Hooks that set what the heads and neurons that go give to 0."""
    heads = heads_of(model.config)
    pairs = []
    if heads is not None and kept[0].attention_heads is not None:
        some = [_rows(layer.attention_heads, heads.dim) for layer in kept]
        pairs += zip([attention.o_proj for attention in attention_of(model)], some, strict=True)
    if kept[0].neurons is not None:
        pairs += zip([mlp.down_proj for mlp in mlps_of(model)], [torch.tensor(k.neurons) for k in kept], strict=True)

    def mask(stays: Tensor) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask_D = torch.zeros(given[0].shape[-1], dtype=given[0].dtype, device=given[0].device)
            mask_D[stays.to(mask_D.device)] = 1
            return (given[0] * mask_D, *given[1:])

        return hook

    return [map_.register_forward_pre_hook(mask(stays)) for map_, stays in pairs]


def _rows(heads: tuple[int, ...] | None, dim: int) -> Tensor:
    """The rows of a projection that belong to these heads."""
    return (torch.tensor(heads)[:, None] * dim + torch.arange(dim)).flatten()


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
        raise _unfit(model, what, problems, expected)
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


def _unfit(model: PreTrainedModel, what: str, found: Sequence[str], expected: str) -> ModelError:
    told = "; ".join(dict.fromkeys(found))
    problem = Problem(f"{type(model).__name__}, {what}", told, expected, _REMEDY)
    return ModelError("the teacher's layers cannot be made narrower", [problem])
