"""The student as one GGUF file, for llama.cpp and what is built on it.

Names of tensors and keys, and quantised forms, come from the `gguf` package (ggml-org). Rows of the query and key
projections are reordered head by head: Hugging Face rotates the halves of a head against each other, ggml neighbouring
rows (permute in llama.cpp's convert_hf_to_gguf.py). What describes the run stands under `limbeck.` beside the keys that
GGUF has for licence, base model and data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from numpy.typing import NDArray

from limbeck.errors import ModelError, Problem
from limbeck.export.facts import Facts
from limbeck.export.gguf_words import add_words, read_words, words_problems
from limbeck.export.properties import PREFIX, ledger_properties, teacher_properties, use_properties
from limbeck.models import load_config, load_tokenizer
from limbeck.rundir import atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_ARCHITECTURES = ("LlamaForCausalLM",)
"""What can be written: Llama and SmolLM2, which is one."""
_OTHERS = "use llama.cpp's own converter for others"
_F16_TOP = 65504.0
"""Largest number that 16 bits hold as F16."""
_BLOCK = 32
"""Numbers in a block of Q8_0."""


class _Form(NamedTuple):
    kind: GGMLQuantizationType
    file: LlamaFileType


_FORMS = {
    "f32": _Form(GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": _Form(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": _Form(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": _Form(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_OWN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Forms by what safetensors calls the precision."""


def write_gguf(facts: Facts, out: Path, precision: str = "auto") -> None:
    """Write a run's student, with what the run says of it. As `write_model`."""

    def describe(file: GGUFWriter) -> None:
        _add_run(file, facts)

    write_model(facts.run / "student", out, precision, describe)


def write_model(
    directory: Path, out: Path, precision: str = "auto", describe: Callable[[GGUFWriter], None] = lambda _: None
) -> None:
    """Write a model directory as a GGUF file, whole or not at all. `precision`: `f32`, `f16`, `bf16`, `q8_0`, or `auto`
    for the model's own. Vectors stay in float32.

    Raises:
        ModelError: an architecture, a setting or a tokenizer that is not among those that can be written, or weights
            too large for the precision; all of them listed.
    """
    config, words = load_config(str(directory)), load_tokenizer(str(directory))
    if problems := _problems(config) + words_problems(words, config.vocab_size):
        raise ModelError("this student cannot be written as GGUF", problems)
    weights = _Weights(directory, config)
    form = _FORMS[weights.own if precision == "auto" else precision]
    with atomic(out) as half:
        file = GGUFWriter(half, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
        _add_model(file, config, form)
        describe(file)
        add_words(file, read_words(words, config.vocab_size))
        # Twice over the weights: a file says the shapes of all tensors before the first one, and memory holds one.
        for name in weights.names:
            array, kind = _stored(name, weights.read(name), form)
            file.add_tensor_info(weights.gguf_name(name), array.shape, array.dtype, array.nbytes, kind)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for name in weights.names:
            file.write_tensor_data(_stored(name, weights.read(name), form).array)
        file.close()


def _problems(config: PreTrainedConfig) -> list[Problem]:
    found = (config.architectures or ["none"])[0]
    if found not in _ARCHITECTURES:
        return [Problem("student: architecture", found, " or ".join(_ARCHITECTURES), _OTHERS)]
    rope = getattr(config, "rope_parameters", None) or {}
    wanted = {
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "hidden_act": (getattr(config, "hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    return [
        Problem(f"student: {key}", str(value), str(due), _OTHERS)
        for key, (value, due) in wanted.items()
        if value != due
    ]


class _Weights:
    """A student's tensors, read one at a time, rows ordered as ggml has them."""

    def __init__(self, student: Path, config: PreTrainedConfig):
        from safetensors import safe_open

        self._config, self._open = config, safe_open
        self._names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self._files: dict[str, Path] = {}
        kinds = set()
        for path in sorted(student.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self._files[name] = path
                    kinds.add(file.get_slice(name).get_dtype())
        unknown = [name for name in self._files if self._names.get_name(name, (".weight",)) is None]
        if unknown or not kinds <= _OWN.keys():
            found = ", ".join(sorted(unknown)[:4] or sorted(kinds))
            problem = Problem("student: weights", found, "tensors of a Llama, as F32, F16 or BF16", _OTHERS)
            raise ModelError("this student cannot be written as GGUF", [problem])
        self.own = "f32" if "F32" in kinds else _OWN[kinds.pop()]

    @property
    def names(self) -> list[str]:
        """As safetensors has them, sorted by layer; tied heads are no tensor of their own."""
        tied = self._config.tie_word_embeddings
        return sorted(name for name in self._files if not (tied and name == "lm_head.weight"))

    def gguf_name(self, name: str) -> str:
        """As ggml has it."""
        found = self._names.get_name(name, (".weight",))
        assert found is not None
        return found

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32, which holds every 16-bit float exactly."""
        with self._open(self._files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        array = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            return permuted(array, self._config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return permuted(array, self._config.num_key_value_heads)
        return array


def permuted(rows_RD: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a projection [heads * head width, D]: in each head, row i of the first half and row i of the second
    become neighbours.
    """
    halves = rows_RD.reshape(heads, 2, rows_RD.shape[0] // heads // 2, rows_RD.shape[1])
    return halves.swapaxes(1, 2).reshape(rows_RD.shape)


class _Data(NamedTuple):
    array: NDArray
    kind: GGMLQuantizationType


def _stored(name: str, array: NDArray[np.float32], form: _Form) -> _Data:
    """A tensor as it is stored: vectors in float32; a matrix whose rows are no whole number of blocks in F16."""
    kind = form.kind if array.ndim > 1 else GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.Q8_0 and array.shape[-1] % _BLOCK:
        kind = GGMLQuantizationType.F16
    if kind is GGMLQuantizationType.F16 and (top := float(np.abs(array).max(initial=0))) > _F16_TOP:
        remedy = "use --precision bf16 or f32"
        problem = Problem(f"student: {name}", f"{top:g}", "at most 65504", remedy)
        raise ModelError("weights too large for F16", [problem])
    return _Data(quantize(array, kind), kind)


def _add_model(file: GGUFWriter, config: PreTrainedConfig, form: _Form) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    file.add_file_type(form.file)
    if form.kind is GGMLQuantizationType.Q8_0:
        file.add_quantization_version(GGML_QUANT_VERSION)
    file.add_vocab_size(config.vocab_size)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(head)
    file.add_value_length(head)
    file.add_rope_dimension_count(head)
    file.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    file.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_run(file: GGUFWriter, facts: Facts) -> None:
    """What the run says of the student."""
    file.add_name(facts.name)
    file.add_version(facts.version)
    file.add_description(f"Distilled from the answers of {', '.join(t.seen.name for t in facts.teachers)}")
    if facts.licence:
        file.add_license(facts.licence)
    file.add_tags(["text-generation", "distillation", "limbeck"])
    file.add_base_model_count(1)
    file.add_base_model_name(0, facts.base)
    file.add_dataset_count(len(facts.teachers))
    for place, teacher in enumerate(facts.teachers):
        file.add_dataset_name(place, f"answers of {teacher.seen.name}")
        told = f"{100 * teacher.share:.4g} % of the supervised tokens; terms {teacher.seen.terms}"
        file.add_dataset_description(place, told)
        _add_properties(file, f"limbeck.teacher.{place}.", [("name", teacher.seen.name), *teacher_properties(teacher)])
    _add_properties(file, "limbeck.", [("manifest", facts.weights), *ledger_properties(facts), *use_properties(facts)])


def _add_properties(file: GGUFWriter, prefix: str, properties: list[tuple[str, str]]) -> None:
    for name, values in _grouped(properties):
        key = prefix + name.removeprefix(PREFIX).replace(":", ".")
        if len(values) == 1:
            file.add_string(key, values[0])
        else:
            file.add_array(key, values)


def _grouped(properties: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, value in properties:
        found.setdefault(name, []).append(value)
    yield from found.items()
