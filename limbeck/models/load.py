"""Tokenizers, configurations and models from a reference. GGUF files are converted once, then read from the
cache.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import ModelError, as_disk_full
from limbeck.models.cache import cache_root, cached
from limbeck.models.processor import Precision, precision_dtype
from limbeck.models.references import refusal
from limbeck.models.sources import Source, resolve
from limbeck.records import Digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_CONVERSION = 1
"""Goes up when converting a GGUF file comes to mean something else, so that old conversions are not used."""

_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Byte-level vocabularies, by the GGUF's name for their pre-tokenizer, for which each digit is a piece of its
own before GPT-2's pattern is applied (llama.cpp, llama-vocab.cpp). SmolLM2's tokenizer.json says the same."""

_GPT2 = frozenset(
    {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum", "exaone4"}
)
"""Those for which GPT-2's pattern is all there is."""

_TROUBLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError)
"""What transformers raises for files it cannot use; it has no error of its own."""

_log = logging.getLogger(__name__)

_held: dict[tuple[Digest, torch.dtype, str], PreTrainedModel] = {}


def load_tokenizer(ref: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model. Raises `ModelError` where it cannot be had or has no tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = resolve(ref)
    path = source.path
    if source.gguf is not None:
        path = cached(f"{_converted(source)}-tokenizer", partial(_convert_tokenizer, source)).path
    with _loading(ref, "a tokenizer that transformers can load"):
        words = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not isinstance(words, PreTrainedTokenizerFast):
        remedy = "save it once through transformers as a fast tokenizer (tokenizer.json)"
        raise refusal(ref, type(words).__name__, "a tokenizer with a tokenizer.json", remedy)
    return words


def load_config(ref: str, precision: Precision = "auto") -> PreTrainedConfig:
    """The configuration of a model. `precision` is the one the model will run in: a GGUF file is converted
    for it.
    """
    from transformers import AutoConfig

    directory = _directory(resolve(ref), precision_dtype(precision))
    with _loading(ref, "a config.json that transformers can read"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_model(ref: str, precision: Precision = "auto", device: str = "cpu") -> PreTrainedModel:
    """A causal language model for inference: evaluation mode, parameters without gradients.

    The last one loaded is kept, and the same call gives it again: copy before you change it. `release` lets
    it go. Raises `ModelError` where it cannot be had, or where a weight is missing or has another shape.
    """
    import torch

    source, dtype = resolve(ref), precision_dtype(precision, device)
    key = source.digest, dtype, device
    if key not in _held:
        _held.clear()
        model = _load(ref, _directory(source, dtype), dtype).requires_grad_(False)
        _held[key] = model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return _held[key].eval()


def release() -> None:
    """Let go of the model that `load_model` keeps."""
    _held.clear()


def _load(ref: str, directory: Path, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with _loading(ref, "a causal language model that transformers can load without code of its own"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **how,
        )
    model, told = loaded
    # transformers fills what is missing, and what has another shape, with random numbers.
    wrong = sorted({*map(str, told["missing_keys"]), *(str(m[0]) for m in told["mismatched_keys"])})
    if wrong:
        found = f"{len(wrong)} weights missing or of another shape: {', '.join(wrong[:4])}"
        raise refusal(ref, found, "all weights of the model in config.json", "take the whole, unchanged model")
    if unused := sorted(map(str, told["unexpected_keys"])):
        some = ", ".join(unused[:4])
        _log.warning("%s: %d weights in its files are no part of the model: %s", ref, len(unused), some)
    return model


def _directory(source: Source, dtype: torch.dtype) -> Path:
    """Where the model lies in Hugging Face layout."""
    if source.gguf is None:
        return source.path
    name = f"{_converted(source)}-{str(dtype).removeprefix('torch.')}"
    return cached(name, partial(_convert_model, source, dtype)).path


def _converted(source: Source) -> str:
    import transformers

    bytes_of = source.digest.removeprefix("sha256:")[:32]
    return f"converted/{bytes_of}-transformers-{transformers.__version__}-{_CONVERSION}"


def _convert_model(source: Source, dtype: torch.dtype, directory: Path) -> None:
    from transformers import GgufConfig

    how = GgufConfig(dequantize=True)
    model = _load(source.ref, source.path, dtype, gguf_file=source.gguf, quantization_config=how)
    with _loading(source.ref, "a model that can be saved"):
        model.save_pretrained(directory)


def _convert_tokenizer(source: Source, directory: Path) -> None:
    from transformers import AutoTokenizer

    with _loading(source.ref, "a GGUF file whose tokenizer transformers can read"):
        words = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf, local_files_only=True)
    _split_as_trained(source, words.backend_tokenizer)
    words.save_pretrained(directory)


def _split_as_trained(source: Source, backend: Any) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that its GGUF file names.

    transformers takes GPT-2's for every name it does not know. For SmolLM2 that encodes a digit after an
    empty line as three tokens where the model was trained on two.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    current = backend.pre_tokenizer
    if not isinstance(current, pre_tokenizers.ByteLevel) or not current.use_regex:
        return
    field = GGUFReader(source.path / str(source.gguf)).get_field("tokenizer.ggml.pre")
    name = field.contents() if field else None
    if name in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), current])
    elif name not in _GPT2:
        found = f"pre-tokenizer {name!r}" if name else "no word on the pre-tokenizer"
        known = f"one of {', '.join(sorted(_DIGITS_FIRST | _GPT2))}, or one that transformers knows"
        remedy = "take the model in Hugging Face layout, whose tokenizer.json says how text is split"
        raise refusal(source.ref, found, known, remedy)


@contextmanager
def _loading(ref: str, expected: str) -> Iterator[None]:
    """Without the progress bars of transformers, and with its errors turned into ours."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers.utils import logging as theirs

    shown, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    # Its report on missing weights would come on top of our error about them.
    theirs.set_verbosity_error()
    try:
        with _one_kind_of_bar():
            yield
    except ModelError:
        raise
    except (*_TROUBLE, SafetensorError, StrictDataclassError) as error:
        if full := as_disk_full(error, cache_root()):
            raise full from None
        found = " ".join(str(error).split())[:240] or type(error).__name__
        remedy = "check that the model's files are whole, or take another model"
        raise refusal(ref, found, expected, remedy) from error
    finally:
        theirs.set_verbosity(verbosity)
        if shown:
            theirs.enable_progress_bar()


@contextmanager
def _one_kind_of_bar() -> Iterator[None]:
    """The GGUF reader of transformers draws a bar that its own switch does not turn off; give it one that it
    does.
    """
    from transformers.utils import logging as theirs

    with suppress(ImportError):
        reader = import_module("transformers.modeling_gguf_pytorch_utils")
        drawn = vars(reader).get("tqdm")
        if drawn is not None:
            vars(reader)["tqdm"] = theirs.tqdm
            try:
                yield
            finally:
                vars(reader)["tqdm"] = drawn
            return
    yield
